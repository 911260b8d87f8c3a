"""Break a training run on purpose, over and over, and show that nothing is lost but the steps since the last save.

    python tools/drill.py --rounds=50              # about 20 minutes on two cores; `make drill`
    python tools/drill.py --rounds=16 --seed=3     # every kind of fault once

One tiny run of `ranks` gloo processes under torchrun --max-restarts is disturbed once a round, in the middle of
training or of a save. After each fault the run has to come back, through torchrun or through the same command given
again, from the newest checkpoint that a fault has not damaged. At the end an undisturbed run makes the same number of
steps: every loss and every weight must be equal to the last bit. The last line says `N rounds, L lost`; a round is lost
if the run did not come back, came back from an older checkpoint than it had, said nothing of what had happened, or if
the final losses differ from a step of that round on. Exit code 0 only if none is lost. Linux only (/proc, prlimit).

    kill -9 of     one process | all processes | all and torchrun too (a power failure); each also inside a save
    full disk      one process may not write files of more than 20 kB from now on (RLIMIT_FSIZE) | process 0 cannot
                   write the next record into metrics.jsonl
    damage         a shard of the newest checkpoint truncated | one bit of one of its files flipped | all checkpoints
                   broken: the run has to stop with one line and change nothing, until they are put back
    unreadable     a shard is behind a link to a disk that is not mounted: as before, until it is put back
    strangers      a file that is not ours in the newest checkpoint's folder: it is ignored, and survives
    SIGTERM        to torchrun | to one process: the step is finished and saved, the processes exit with 0
    hang           one process is stopped (SIGSTOP): rank_timeout has to end the run with a clear message
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules in the root
import program

if __name__ == "__main__":
    program.begin()  # before torch, and before anything that takes long to import

import os
import random
import re
import resource
import signal
import subprocess
import threading
import time
import uuid

from safetensors.torch import load_file

import checkpoint
import owned
from configurator import above, at_least, configure, one_of, some
from records import METRIC, Missing, RecordError, read_lines

rounds = 50  # faults
ranks = 4  # processes
parallel = "fsdp"  # how they share the model: 'ddp' | 'fsdp'
seed = 0  # of the faults
folder = "out/drill"  # emptied first, if an earlier drill has made it
checkpoint_interval = 4  # steps
rank_timeout = 12  # seconds that a hanging process is waited for
minutes = 60.0  # the drill gives up after these; rounds not made are lost

RULES = {
    "rounds": at_least(1), "ranks": at_least(2, 64), "parallel": one_of("ddp", "fsdp"), "seed": at_least(0),
    "folder": some("a folder"), "checkpoint_interval": at_least(1, 1000), "rank_timeout": at_least(2, 3600),
    "minutes": above(0, 10**5),
}  # fmt: skip
TINY = (
    "--seq_len=16 --n_layer=1 --first_k_dense_replace=0 --n_embd=32 --n_head=2 --kv_lora_rank=16 --qk_nope_head_dim=8 "
    "--qk_rope_head_dim=8 --v_head_dim=8 --n_routed_experts=4 --num_experts_per_tok=2 --moe_intermediate_size=16 "
    "--micro_batch_size=1 --lr=1e-3 --warmup_steps=2 --lr_schedule=constant --eval_interval=30 --eval_sequences=4 "
    "--device=cpu --impl=ref"
).split()
FOR_EVER = 10**9  # max_steps while faults are made
PATIENCE = 120  # seconds for a run to make a step, or to end
MARK = f"MHC_DRILL={uuid.uuid4().hex}"  # in the environment of every process started here, and of no other


class Lost(Exception):
    """What a round has shown that it should not have."""


# -- processes ------------------------------------------------------------------------------------------------------


def our_processes():
    """{pid: RANK, or None for torchrun} of all living processes that this drill has started, by their environment."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as f:
                environment = f.read().decode(errors="replace").split("\0")
            with open(f"/proc/{pid}/stat") as f:
                dead = f.read().rsplit(")", 1)[1].split()[0] in "ZX"
        except OSError:  # it has ended, or is not ours to look at
            continue
        if MARK in environment and not dead:
            rank = [v for v in environment if v.startswith("RANK=")]
            found[int(pid)] = int(rank[0][5:]) if rank else None
    return found


def workers():
    """{rank: pid}."""
    return {rank: pid for pid, rank in our_processes().items() if rank is not None}


def kill(pids, number=signal.SIGKILL):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def clear_away():
    """No process of this drill lives after this."""
    end = time.monotonic() + 20
    while (left := our_processes()) and time.monotonic() < end:
        kill(left)
        time.sleep(0.05)
    if left:
        raise Lost(f"processes {sorted(left)} cannot be killed")


class Run:
    """The run in `folder`/name: starts torchrun, looks at records, checkpoints and output."""

    def __init__(self, name, data):
        self.out_dir, self.log, self.data = os.path.join(folder, name), os.path.join(folder, f"{name}.log"), data
        self.torchrun, self.read_from, self.done, self.saved = None, 0, 0, 0
        self.strangers = []  # files that are not ours, put into its folders

    def start(self, max_steps=FOR_EVER, restarts=1000):
        """torchrun, which brings the run back by itself after a fault that it survives."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [f"--max-restarts={restarts}", "--shutdown-timeout=5", "train.py", *TINY, f"--parallel={parallel}"]
        command += [f"--batch_size={ranks}", f"--rank_timeout={rank_timeout}", f"--data_dir={self.data}"]
        command += [f"--out_dir={self.out_dir}", f"--max_steps={max_steps}"]
        command += [f"--checkpoint_interval={checkpoint_interval}"]
        key, value = MARK.split("=")
        environment = os.environ | {key: value, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.torchrun = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        open(self.log, "ab").close()  # said() may be asked before the first line
        # through a pipe: a process whose disk is full must still be able to say so
        threading.Thread(target=self.keep_output, args=(self.torchrun.stdout,), daemon=True).start()

    def keep_output(self, pipe):
        with open(self.log, "ab", buffering=0) as log:
            for line in pipe:
                log.write(line)

    def said(self):
        """What was printed since new_page()."""
        with open(self.log, "rb") as f:
            f.seek(self.read_from)
            return f.read().decode(errors="replace")

    def new_page(self):
        self.read_from = os.path.getsize(self.log)

    def look(self):
        """Note what is done and saved."""
        self.done, self.saved = self.step(), max(self.checkpoints(), default=0)

    def records(self):
        """metrics.jsonl; a line that is being written is left out. Raises Lost if another is damaged."""
        try:
            return list(read_lines(os.path.join(self.out_dir, "metrics.jsonl"), METRIC, going_on=True))
        except Missing:
            return []
        except RecordError as e:
            raise Lost(str(e)) from None

    def step(self):
        """Steps done, by the records."""
        return max((r["step"] for r in self.records() if "loss" in r), default=0)

    def checkpoints(self):
        """Steps of the checkpoints that are there, oldest first."""
        return [checkpoint.step_of(f) for f in checkpoint.step_folders(self.out_dir)]

    def saving(self):
        return os.path.isdir(self.out_dir) and any(n.startswith(".tmp-step") for n in os.listdir(self.out_dir))

    def wait(self, what, condition, patience=PATIENCE):
        """Until condition() is true. Raises Lost if it is not in time, or torchrun has given up."""
        end = time.monotonic() + patience
        while not condition():
            if time.monotonic() > end:
                raise Lost(f"waited {patience} s for {what}")
            time.sleep(0.002)

    def wait_for_step(self, step):
        def there():
            if self.torchrun.poll() is not None and self.step() < step:
                raise Lost(f"torchrun ended with {self.torchrun.returncode}")
            return self.step() >= step

        self.wait(f"step {step}", there)


# -- faults: each returns what it did; afterwards the run is expected to come back by itself or to need a start -------


def kill_one(run, rng):
    victim = rng.randrange(ranks)
    kill([workers()[victim]])
    return f"kill -9 of process {victim}"


def kill_all(run, rng):
    kill(workers().values())
    return "kill -9 of all processes"


def power_failure(run, rng):
    kill([run.torchrun.pid, *workers().values()])
    clear_away()
    run.torchrun.wait()
    return "kill -9 of torchrun and all processes"


def inside_a_save(fault):
    """The same fault while a save is going on."""

    def inside(run, rng):
        run.wait("a save", run.saving)
        run.look()
        time.sleep(rng.random() * 0.05)
        caught = run.saving()
        return fault(run, rng) + (" inside a save" if caught else " at the end of a save")

    return inside


def full_disk(run, rng):
    victim = rng.randrange(ranks)
    resource.prlimit(workers()[victim], resource.RLIMIT_FSIZE, (20_000, 20_000))
    run.wait("a message about the full disk", lambda: "File too large" in run.said())
    if "could not be saved" not in run.said() and "could not be written" not in run.said():
        raise Lost("the full disk was not reported")
    return f"full disk under process {victim}"


def full_metrics(run, rng):
    """Not one record more than there is."""
    limit = os.path.getsize(os.path.join(run.out_dir, "metrics.jsonl")) + 10
    resource.prlimit(workers()[0], resource.RLIMIT_FSIZE, (limit, limit))
    run.wait("a message about the full disk", lambda: "File too large" in run.said())
    if "metrics.jsonl could not be written" not in run.said() and "could not be saved" not in run.said():
        raise Lost("the full disk was not reported")
    return f"full disk at byte {limit} of metrics.jsonl"


def stranger(run, rng):
    """A file manager has been in the folder of the newest checkpoint; then the power fails."""
    run.wait("a checkpoint", run.checkpoints)
    power_failure(run, rng)
    newest = checkpoint.step_folders(run.out_dir)[-1]
    path = os.path.join(newest, ".DS_Store")
    with open(path, "w") as f:
        f.write("not ours")
    run.strangers.append(path)
    return f"a stranger's file in {os.path.basename(newest)}, then kill -9 of all"


def must_refuse(run, words):
    """Start the run, which must stop with one line and leave everything as it is."""

    def state():
        paths = [p for p in Path(run.out_dir).rglob("*") if p.name not in (".lock", "latest")]
        return {p: p.read_bytes() for p in paths if p.is_file()} | {p: None for p in paths if not p.is_file()}

    before = state()
    run.new_page()
    run.start(restarts=0)
    run.wait("the run to refuse", lambda: run.torchrun.poll() is not None and not workers())
    said = [line for line in run.said().splitlines() if line.startswith("error:")]
    if len(said) != 1 or words not in said[0]:
        raise Lost(f"wanted one line with {words!r}, got {said}")
    if state() != before:
        raise Lost("a start that was refused changed something")


def unreadable(run, rng):
    """A shard of the newest checkpoint lies on a disk that is not mounted."""
    run.wait("a checkpoint", run.checkpoints)
    power_failure(run, rng)
    newest = checkpoint.step_folders(run.out_dir)[-1]
    path = os.path.join(newest, rng.choice([n for n in sorted(os.listdir(newest)) if n.startswith("shard")]))
    kept = os.path.join(folder, "kept", os.path.basename(path))
    os.makedirs(os.path.dirname(kept), exist_ok=True)
    os.rename(path, kept)
    os.symlink("/not/mounted", path)
    must_refuse(run, "is a link to /not/mounted, which is not there")
    os.remove(path)
    os.rename(kept, path)
    return f"{os.path.relpath(path, run.out_dir)} could not be read"


def all_broken(run, rng):
    """Every checkpoint is damaged; afterwards copies are put back."""
    run.wait("a checkpoint", run.checkpoints)
    power_failure(run, rng)
    shards = [p for p in sorted(Path(run.out_dir).glob("step-*/shard*"))]
    whole = {p: p.read_bytes() for p in shards}
    for p in shards:
        os.truncate(p, rng.randrange(len(whole[p])))
    must_refuse(run, "checkpoints can be used")
    for p, content in whole.items():
        p.write_bytes(content)
    return f"all of {len(run.checkpoints())} checkpoints damaged"


def damage(run, rng, how):
    """Stop everything, spoil the newest checkpoint and start again: it must be named and not used.

    Of the last two, one at a time: if the one before was spoilt in an earlier round and there was no save since, the
    run goes on to the next save first. Two spoilt of two kept would be more than keep_checkpoints=2 can bear."""

    def two():
        saved = run.checkpoints()
        return len(saved) > 1 and saved[-1] - saved[-2] <= checkpoint_interval

    run.wait("two checkpoints in a row", two)
    run.look()
    power_failure(run, rng)
    newest = checkpoint.step_folders(run.out_dir)[-1]
    files = [n for n in sorted(os.listdir(newest)) if how == "flipped" or n.startswith("shard")]
    path = os.path.join(newest, rng.choice(files))
    size = os.path.getsize(path)
    if how == "flipped":
        with open(path, "r+b") as f:
            byte = os.pread(f.fileno(), 1, at := rng.randrange(size))[0]
            os.pwrite(f.fileno(), bytes([byte ^ 1 << rng.randrange(8)]), at)
        what = f"a bit of byte {at} flipped in"
    else:
        os.truncate(path, at := rng.randrange(size))
        what = f"truncated to {at} of {size} bytes:"
    return f"{what} {os.path.relpath(path, run.out_dir)}"


def truncated(run, rng):
    return damage(run, rng, "truncated")


def flipped(run, rng):
    return damage(run, rng, "flipped")


def sigterm(run, pid, whom):
    kill([pid], signal.SIGTERM)
    run.wait("the run to stop", lambda: run.torchrun.poll() is not None and not workers())
    if "stopped by a signal" not in run.said():
        raise Lost("SIGTERM did not stop the run in order")
    if run.checkpoints()[-1] != run.step():
        raise Lost(f"SIGTERM at step {run.step()} was not saved: there is {run.checkpoints()[-1]}")
    if whom != "torchrun" and run.torchrun.returncode != 0:  # torchrun itself reports the signal it got
        raise Lost(f"SIGTERM to {whom}: exit code {run.torchrun.returncode}")
    return f"SIGTERM to {whom}"


def sigterm_torchrun(run, rng):
    return sigterm(run, run.torchrun.pid, "torchrun")


def sigterm_one(run, rng):
    victim = rng.randrange(ranks)
    return sigterm(run, workers()[victim], f"process {victim}")


def hang(run, rng):
    victim = rng.randrange(ranks)
    kill([workers()[victim]], signal.SIGSTOP)
    run.wait("a message about a process that hangs", lambda: "did not answer within" in run.said(), 30 + rank_timeout)
    return f"process {victim} hangs"


FAULTS = [
    kill_one, inside_a_save(kill_one), power_failure, truncated, hang, inside_a_save(power_failure), flipped,
    sigterm_torchrun, full_disk, inside_a_save(kill_all), sigterm_one, kill_all, unreadable, stranger, all_broken,
    full_metrics,
]  # fmt: skip


# -- rounds ---------------------------------------------------------------------------------------------------------


def last_whole(run):
    """Step of the newest checkpoint that matches its manifest; 0: none."""
    whole = [f for f in checkpoint.step_folders(run.out_dir) if checkpoint.problem_with(f) is None]
    return checkpoint.step_of(whole[-1]) if whole else 0


def one_round(run, fault, rng):
    """Let it run, break it, see it come back. -> a line for the reader. Raises Lost."""
    run.wait_for_step(run.step() + rng.randrange(1, 2 * checkpoint_interval))
    time.sleep(rng.random() * 0.1)
    run.look()
    run.new_page()
    what = fault(run, rng)
    start = time.monotonic()
    spoilt = fault in (truncated, flipped)
    dead = run.torchrun.poll() is not None
    if dead:
        run.look()
        run.saved = last_whole(run)
        run.new_page()
        run.start()
    run.wait("the run to come back", lambda: "parameters ->" in run.said())
    at = int((re.findall(r"going on from \S*step-(\d+)", run.said()) or [0])[-1])
    if at < run.saved or dead and at != run.saved:
        raise Lost(f"{what}: came back from step {at}, but {run.saved} was saved")
    if run.done - at > checkpoint_interval * (1 + spoilt):
        raise Lost(f"{what}: {run.done - at} steps lost, with a save every {checkpoint_interval}")
    if spoilt and "is broken and not used" not in run.said():
        raise Lost(f"{what}: the damage was not reported")
    run.wait_for_step(at + 1)
    if gone := [p for p in run.strangers if not os.path.exists(p)]:
        raise Lost(f"{what}: a file that was not ours is gone: {gone[0]}")
    again = f", {run.done - at} steps to do again" if run.done > at else ""
    return f"{what}, at step {run.done}; back from {at} in {time.monotonic() - start:.1f} s{again}"


def losses(run):
    """metrics.jsonl without what the clock and the machine decide."""
    return [{k: v for k, v in r.items() if k not in ("step_ms", "peak_MB")} for r in run.records()]


def shards(run):
    """All tensors of the newest checkpoint, by file and key."""
    newest = checkpoint.step_folders(run.out_dir)[-1]
    names = [n for n in sorted(os.listdir(newest)) if n.startswith("shard")]
    return {(n, k): t for n in names for k, t in load_file(os.path.join(newest, n)).items()}


def first_difference(run, straight):
    """The first step at which two runs' records differ, None if they are equal and so are their last weights."""
    ours, theirs = losses(run), losses(straight)
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            print(f"disturbed:   {a}\nundisturbed: {b}")
            return b["step"]
    if len(ours) != len(theirs):
        return len(theirs)
    a, b = shards(run), shards(straight)
    if a.keys() != b.keys() or not all(a[k].equal(b[k]) for k in a):
        print("the losses agree, the weights or the optimizer's moments do not")
        return theirs[-1]["step"]
    return None


def finish(run, straight):
    """Let the disturbed run end in order, and make an undisturbed one of the same length."""
    if run.torchrun is None:
        raise Lost("no round was made")
    kill([run.torchrun.pid], signal.SIGTERM)
    run.wait("the run to stop", lambda: run.torchrun.poll() is not None)
    clear_away()
    max_steps = run.step() + checkpoint_interval
    for r in (run, straight):
        r.start(max_steps)
        r.wait("the run to end", lambda r=r: r.torchrun.poll() is not None, PATIENCE + max_steps)
        if r.torchrun.returncode:
            raise Lost(f"the run ended with {r.torchrun.returncode}: see {r.log}")
    return max_steps


def corpus():
    """A few thousand bytes of text, prepared."""
    text = os.path.join(folder, "text")
    os.mkdir(text)
    for part in ("a", "b"):
        with open(os.path.join(text, f"{part}.txt"), "w") as f:
            f.write(" ".join(f"{part}{i} times {j} is {i * j}." for i in range(40) for j in range(30)))
    data = os.path.join(folder, "data")
    command = [sys.executable, "prepare_data.py", f"--dataset={text}", "--tokenizer=bytes", f"--data_dir={data}"]
    subprocess.run([*command, "--val_fraction=0.5"], check=True, stdout=subprocess.DEVNULL)
    return data


def drill():
    """All rounds, and the comparison. -> {round: why it is lost}."""
    rng, end, lost, ended_at = random.Random(seed), time.monotonic() + 60 * minutes, {}, []
    data = corpus()
    run, straight = Run("disturbed", data), Run("undisturbed", data)
    order = []
    for r in range(rounds):
        order = order or rng.sample(FAULTS, len(FAULTS))  # every kind comes up equally often
        fault = order.pop()
        try:
            if time.monotonic() > end:
                raise Lost(f"not made: {minutes} minutes are over")
            if run.torchrun is None or run.torchrun.poll() is not None:
                run.start()
            line = one_round(run, fault, rng)
        except Lost as e:
            lost[r] = line = f"LOST: {e}"
            clear_away()
            if run.torchrun:
                run.torchrun.wait()
        ended_at.append(run.step())
        print(f"round {r + 1}/{rounds}: {line}", flush=True)
    try:
        steps = finish(run, straight)
        if (step := first_difference(run, straight)) is not None:
            r = next((r for r, at in enumerate(ended_at) if step <= at), rounds - 1)
            lost[r] = f"the runs differ from step {step} on"
            print(f"round {r + 1}: LOST: {lost[r]}")
        else:
            print(f"{steps} steps: all losses, weights and moments equal the undisturbed run's, bit for bit")
    except Lost as e:
        print(f"LOST: {e}")
        lost = {r: str(e) for r in range(rounds)}  # nothing was shown
    return lost


def main():
    global folder
    configure(globals(), RULES)
    folder = os.path.abspath(folder)
    os.chdir(Path(__file__).resolve().parent.parent)
    owned.check_removable(folder, "drill")
    owned.remove(folder, "drill")
    owned.make(folder, "drill")
    try:
        lost = drill()
    finally:  # after Ctrl-C and SIGTERM too: no orphans
        clear_away()
    print(f"{rounds} rounds, {len(lost)} lost")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    program.run(main, owned.NotOurs)
