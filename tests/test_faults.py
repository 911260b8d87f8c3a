"""Several processes under faults: one dies, hangs, gets a signal or has a full disk; nothing is lost.

tools/drill.py does this with real torchrun, for as many rounds as wanted; its smallest form is run here too.
"""

import math
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

import checkpoint
from tests.ranks import Job, train_in_fork
from tests.test_resume import TINY, at_step, kill_me, last_step, prepare, records
from tools import drill

MANY = [f for f in TINY if "micro" not in f and "batch_size" not in f] + ["--batch_size=8", "--micro_batch_size=2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A corpus, and in straight/ an undisturbed run of 2 processes with FSDP."""
    root = tmp_path_factory.mktemp("faults")
    prepare(root)
    codes, output = start(root, "straight")
    assert codes == [0, 0], output
    return root


def flags(root, run, *more):
    short = ["--max_steps=8", "--checkpoint_interval=2", "--eval_interval=4", "--rank_timeout=20", "--parallel=fsdp"]
    return [*MANY, f"--data_dir={root / 'data'}", f"--out_dir={root / run}", *short, *more]


def start(root, run, *more, world=2, hook=None):
    return train_in_fork(flags(root, run, *more), str(root / f"{run}.log"), world, hook)


def on_rank(wanted, hook):
    """The hook on one process alone."""
    return lambda train: hook(train) if os.environ["RANK"] == str(wanted) else None


def check_same_run(root, run):
    assert records(root / run) == records(root / "straight")
    assert [r["step"] for r in records(root / run) if "loss" in r] == list(range(1, 9))
    a, b = (checkpoint.load_weights(str(root / r / "step-00000008")) for r in (run, "straight"))
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def check_losses(root, run, tolerance):
    """The straight run's losses but for rounding, each step once."""
    ours, theirs = records(root / run), records(root / "straight")
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        name = "loss" if "loss" in a else "val_loss"
        assert a[name] == pytest.approx(b[name], abs=tolerance), (a["step"], a[name], b[name])


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_of_one_ends_the_others_and_nothing_is_lost(root, victim):
    run = f"killed{victim}"
    codes, output = start(root, run, hook=on_rank(victim, at_step(6, kill_me)))
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, -signal.SIGKILL), output
    assert "another process is gone" in output
    codes, output = start(root, run)
    assert codes == [0, 0] and f"going on from {root / run}/step-00000004" in output, output
    check_same_run(root, run)


@pytest.mark.parametrize("name", ["dcp_call", "rng_state"])
def test_kill_of_one_inside_a_save(root, name):
    """In the middle of the third save: process 1 dies before its shards are written, or before they are hashed."""

    def hook(train):
        inner, calls = getattr(checkpoint, name), []

        def deadly(*args, **kwargs):
            calls.append(1)
            return kill_me() if len(calls) == 3 else inner(*args, **kwargs)

        setattr(checkpoint, name, deadly)

    run = "save " + name
    codes, output = start(root, run, hook=on_rank(1, hook))
    assert codes[1] == -signal.SIGKILL and codes[0] != 0, output
    assert os.path.isdir(root / run / ".tmp-step-00000006")
    codes, output = start(root, run)
    assert codes == [0, 0] and "step-00000004" in output, output
    check_same_run(root, run)


def test_a_signal_to_one_stops_all_at_the_same_step(root):
    codes, output = start(root, "signal", hook=on_rank(1, at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM))))
    assert codes == [0, 0] and "stopped by a signal after step 5" in output, output
    assert checkpoint.step_of(checkpoint.latest_complete(str(root / "signal"))) == 5
    codes, output = start(root, "signal")
    assert codes == [0, 0], output
    check_same_run(root, "signal")


@pytest.mark.parametrize("victim", [0, 1])
def test_full_disk_under_one_process(root, victim):
    run, limit = f"full{victim}", 20_000  # above metrics.jsonl, below a shard

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    codes, output = start(root, run, hook=on_rank(victim, at_step(5, fill)))
    assert codes == [1, 1] and output.count("error:") == 1, output
    assert "step 6 could not be saved" in output and "File too large" in output and "Traceback" not in output
    assert "step-00000002, step-00000004. Make room" in output
    assert not any(n.startswith(".tmp") for n in os.listdir(root / run))
    codes, output = start(root, run)
    assert codes == [0, 0] and "going on from" in output, output
    check_same_run(root, run)


def test_a_process_that_hangs_ends_the_run_with_a_message(root):
    with Job(flags(root, "hang", "--rank_timeout=4"), str(root / "hang.log"), 2) as job:
        end = time.monotonic() + 60
        while last_step(root / "hang") < 3 and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(job.processes[1].pid, signal.SIGSTOP)
        job.processes[0].join(60)
        assert job.processes[0].exitcode == 1, job.output()
        assert "did not answer within rank_timeout=4" in job.output()
    codes, output = start(root, "hang")
    assert codes == [0, 0], output
    check_same_run(root, "hang")


def test_fsdp_recompute_accumulation_resume(root):
    """FSDP x recomputation x two micro-batches a process x kill -9 and resume, bit for bit; then on 4, 2 and 1."""
    more = ("--recompute=mhc", "--recompute_block=2")
    codes, output = start(root, "all", *more, hook=at_step(7, kill_me))
    assert codes == [-signal.SIGKILL] * 2, output
    codes, output = start(root, "all", *more)
    assert codes == [0, 0] and "step-00000006" in output, output
    check_same_run(root, "all")  # recomputation is bit-equal to none, so straight/ is the same run
    PIPELINE = "fsdp --pipeline_size=2 --pipeline_schedule=1f1b"
    layouts = ((2, 4, "fsdp"), (4, 2, "fsdp --expert_size=2"), (6, 4, PIPELINE), (8, 1, "none"))
    for steps, world, parallel in layouts:
        stop = at_step(steps, lambda: os.kill(os.getpid(), signal.SIGTERM)) if steps < 8 else None
        micro = "--micro_batch_size=1" if world == 4 else "--micro_batch_size=2"
        layout = f"--parallel={parallel}".split()
        codes, output = start(root, "layouts", *layout, micro, *more, world=world, hook=stop)
        assert codes == [0] * world, output
    check_losses(root, "layouts", 1e-5)


# -- the drill itself -----------------------------------------------------------------------------------------------


def test_the_drill_in_little(tmp_path):
    """Real torchrun, which brings the run back by itself after a kill -9 of one process inside a save."""
    command = [
        sys.executable,
        "tools/drill.py",
        "--rounds=1",
        "--seed=12",
        "--ranks=2",
        f"--folder={tmp_path / 'drill'}",
    ]
    cwd = os.path.dirname(checkpoint.__file__)
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("1 rounds, 0 lost\n"), done.stdout + done.stderr
    assert "inside a save" in done.stdout and "equal the undisturbed run's, bit for bit" in done.stdout
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as f:
                assert str(tmp_path) not in f.read(), f"process {pid} was left behind"
        except OSError:
            continue


class Fake:
    """A run as the drill sees it, of the directory of a real one."""

    def __init__(self, out_dir):
        self.out_dir = str(out_dir)

    records = drill.Run.records


def test_the_drill_sees_a_difference(root, tmp_path):
    """One loss changed in its last bit, a record missing, a weight changed: each is a lost round."""
    straight, other = Fake(root / "straight"), tmp_path / "other"

    def copy():
        subprocess.run(["rm", "-rf", str(other)], check=True)
        subprocess.run(["cp", "-r", str(root / "straight"), str(other)], check=True)
        return Fake(other)

    assert drill.first_difference(copy(), straight) is None
    run = copy()
    lines = (other / "metrics.jsonl").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith('{"step": 5, "loss"'))
    digits = lines[at].split('"loss": ')[1].split(",")[0]
    changed = lines[at].replace(digits, repr(math.nextafter(float(digits), 9.0)))
    (other / "metrics.jsonl").write_text("\n".join([*lines[:at], changed, *lines[at + 1 :]]) + "\n")
    assert drill.first_difference(run, straight) == 5
    (other / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert drill.first_difference(run, straight) is not None
    run = copy()
    shard = next((other / "step-00000008").glob("shard-00002*"))
    with open(shard, "r+b") as f:
        f.seek(-3, 2)
        f.write(b"\x15")
    assert drill.first_difference(run, straight) == 8
