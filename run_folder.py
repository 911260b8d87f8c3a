"""A run's folder: one run at a time in it, the same run as before or a new one, and how a run is stopped.

What is in the folder is described in checkpoint.py, which reads and writes it. train.py calls this, in this order:
move_aside (--init_from=scratch), resume_point, same_run, trim_records, and Stop in the loop.
"""

import fcntl
import os
import re
import signal
import time
from dataclasses import fields

import torch
import torch.distributed as dist

import owned
import program
import records
from checkpoint import (
    CONFIG,
    CheckpointError,
    looks_like_a_run,
    names_of,
    on_rank_0,
    read_state,
    reason,
    usable,
)
from model import GPTConfig
from owned import NotOurs, free_name
from records import Missing, RecordError, integer, parse, read_json

OVERWRITTEN = ("config.json", "metrics.jsonl", "metrics-dropped.jsonl", "maps.npz", "trace.json")  # in a run folder


def resume_point(out_dir):
    """What a run goes on from: the newest whole checkpoint, or None. Every process calls it, before the first save.

    Clears away the remains of killed saves, and renames broken checkpoints to broken-step-..., so that they do not
    count among the last ones kept. Takes the lock of the folder: see lock(). Raises CheckpointError if there are
    checkpoints and none can be used, or if the folder is not ours; then nothing is changed.
    """

    def take():
        if not records.is_utf8(out_dir):  # it could be written, and never read again
            raise CheckpointError(f"{out_dir!a}: wanted a name in UTF-8: safetensors reads no others", 2)
        owned.make(out_dir, "run", looks_like_a_run)
        lock(out_dir)
        for name in OVERWRITTEN:
            owned.check_file(os.path.join(out_dir, name))

    def clear_away():
        for name in names_of(out_dir):
            path = os.path.join(out_dir, name)
            if re.fullmatch(r"\.tmp-(old-)?step-\d{8,}", name) and owned.is_folder(path):
                owned.remove(path, "step")

    def set_aside(folder):
        os.rename(folder, free_name(os.path.join(out_dir, "broken-" + os.path.basename(folder))))

    on_rank_0(take)
    folder, broken = usable(out_dir)
    before = [n for n in on_rank_0(lambda: names_of(out_dir)) if re.fullmatch(r"broken-step-\d{8,}(-\d+)?", n)]
    if folder is None and before:
        raise CheckpointError(
            f"{out_dir}: has no checkpoint but broken ones ({', '.join(before)}): put back a copy of one, or train "
            "anew with --init_from=scratch, which moves all of it aside",
            2,
        )
    on_rank_0(clear_away)
    on_rank_0(lambda: [set_aside(f) for f in broken])
    return folder


held_locks = {}  # {folder: open file}: a lock lasts as long as its process, so a killed run leaves none behind


def lock(out_dir):
    """Refuse to run in a folder where another run is going on: each would remove the other's half-written files."""
    if os.path.realpath(out_dir) in held_locks:
        return
    path = os.path.join(out_dir, ".lock")
    owned.check_file(path)
    f = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        raise CheckpointError(f"{out_dir}: another run is going on here; wait for it, or use another out_dir") from None
    except OSError as e:
        print(f"warning: {out_dir} cannot be locked ({reason(e)}): see to it that one run at a time uses it")
    held_locks[os.path.realpath(out_dir)] = f


def same_run(out_dir, folder, origin):
    """Raise CheckpointError if out_dir holds a run of another model, other data or another order of data.

    folder: the run's newest checkpoint, None: the run has only its config.json, or nothing at all.
    origin: of the run that is starting: {"settings", "data", ...} as config.json keeps it.
    What fixes every weight and every batch must agree; LR, schedule, precision, number of processes, intervals ... may
    differ from one start to the next: -> {name: (was, is)} of those that do.
    """
    if folder:
        record = read_state(folder)
        if "origin" not in record["state"]:
            raise CheckpointError(f"{folder}/state.json: does not say which data it was trained on: not train.py's")
        then = record["state"]["origin"]
    else:
        try:
            then = record = read_json(os.path.join(out_dir, "config.json"), CONFIG)
        except Missing:
            return {}
        except RecordError as e:
            raise CheckpointError(f"{e}; move it away, or use another out_dir", 2) from None
    was = record["settings"] | {"data": then["data"]}
    now = origin["settings"] | {"data": {k: v for k, v in origin["data"].items() if k in then["data"]}}
    fixed = {f.name for f in fields(GPTConfig)} - {"impl"} | {"data", "seed", "batch_size"}
    differ = {k: (was[k], now[k]) for k in now if k in was and was[k] != now[k]}
    for name in sorted(differ.keys() & fixed):
        a, b = differ[name]
        if name == "data":
            what = next(k for k in b if a[k] != b[k])
            a, b = "other data", f"the data given (the sha256 of {what} is {b[what][:8]}..., not {a[what][:8]}...)"
        else:
            a, b = f"{name}={a!r}", f"{name}={b!r}"
        raise CheckpointError(
            f"{out_dir} holds a run with {a}, not with {b}: to go on with it, give it the same {name}; "
            "to start another, use another out_dir, or --init_from=scratch, which moves the old run aside"
        )
    if then.get("commit") and origin["commit"] and then["commit"] != origin["commit"]:
        differ["commit"] = then["commit"], origin["commit"]
    return differ


def move_aside(out_dir):
    """For --init_from=scratch: rename a run folder to <out_dir>.old (.old-2 ...). -> its new name, None if not there.

    Nothing is removed. A worker that torchrun restarts goes on with the run it began instead."""
    if not names_of(out_dir) or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return None
    if not owned.is_folder(out_dir):
        raise NotOurs(f"{out_dir}: is a link, and only a folder of ours is moved aside; name the folder itself")
    if owned.what_is(out_dir) != "run" and not looks_like_a_run(out_dir):
        raise NotOurs(f"{out_dir}: is not known to be a run of ours, so it is not moved aside; use another out_dir")
    lock(out_dir)
    held_locks.pop(os.path.realpath(out_dir)).close()
    aside = free_name(os.path.normpath(out_dir) + ".old")
    os.rename(out_dir, aside)
    return aside


def trim_records(path, step, evaluated=True):
    """Take out of metrics.jsonl what will be written again: the records of steps after `step`, the evaluation at `step`
    unless the checkpoint has it, a torn last line. -> the number of lines taken out; they are in metrics-dropped.jsonl,
    behind those of before."""
    owned.check_file(path)
    aside = path.removesuffix(".jsonl") + "-dropped.jsonl"
    owned.check_file(aside)
    try:
        dropped = [line for _, line in records.raw_lines(path) if not stays(line, step, evaluated)]
    except Missing:
        return 0
    if dropped:
        with program.naming(aside), open(aside, "ab") as f:
            f.writelines(line.rstrip(b"\n") + b"\n" for line in dropped)
            f.flush()
            os.fsync(f.fileno())
        with owned.whole_file(path, binary=True) as f:
            f.writelines(line for _, line in records.raw_lines(path) if stays(line, step, evaluated))
    return len(dropped)


def stays(line, step, evaluated):
    """Whether a line of metrics.jsonl is a whole record of what was done by `step`."""
    try:
        record = parse(line, {"step": integer(0)}, "a record")
    except RecordError:  # the line being written when the run was killed
        return False
    done = record["step"] < step or record["step"] == step and (evaluated or "val_loss" not in record)
    return done and line.endswith(b"\n")


class Stop:
    """SIGTERM and Ctrl-C as a wish: `stop()` is true on every process at the same step once any has got one.

    Asking is one all-reduce of one number. A second Ctrl-C, a while after the first, ends the program at once (torchrun
    passes on the Ctrl-C that the terminal has sent to all: that is not a second one).
    """

    heard = None  # the number of the first signal

    def __init__(self, device="cpu"):
        self.device, self.asked_at = device, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.asked_at is None:
            self.asked_at, Stop.heard = time.monotonic(), number
        elif number == signal.SIGINT and time.monotonic() - self.asked_at > 2:
            raise KeyboardInterrupt

    def __call__(self):
        if not dist.is_initialized():
            return self.asked_at is not None
        answer = torch.tensor(float(self.asked_at is not None), device=self.device)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        return bool(answer)
