"""Checkpoints that survive kills, full disks and flipped bits; the same code for one process, DDP and FSDP2.

    python checkpoint.py out/run                          # list the checkpoints of a run and verify each
    python checkpoint.py out/run model.safetensors        # the newest one's weights, whole, in one file
    python checkpoint.py out/run/step-00000100 model.safetensors --dtype=bfloat16

Layout of a run folder (on a file system that all processes see):

    out/run/step-00000100/    a checkpoint: it has this name only once it is complete
        shard-00001-model-00001-of-00001.safetensors ...   tensors, one set of files a process
        state.json            step, settings, command line, commit, data hashes, RNG states, what else train.py wants
        manifest.json         size and sha256 of every other file
    out/run/latest            symbolic link to the newest: for people, nothing here reads it
    out/run/.tmp-step-...     a save that is going on, or was killed; removed at the next start
    out/run/broken-step-...   set aside at a resume because it did not match its manifest; never removed by us

Tensors go through torch.distributed.checkpoint (DCP), each process writing its own shards, and are read back into any
number of processes: FSDP on 4 -> 2 -> 1, DDP <-> FSDP. Keys are `model.<parameter>` and `optim.<parameter>.exp_avg` ...
with the model's own global parameter names, so another layout can find them.

Nothing is unpickled from a file. DCP's default storage keeps its table of contents as a pickle; its Hugging Face
storage keeps it in the safetensors headers, and that is the one used. What is not a tensor is JSON.
Hyperparameters of the optimizer (LR, betas, decay) are settings, not state: a resumed run takes them from its command.

The order of a save: every process writes its shards under .tmp-step-N and fsyncs them; each hashes its own; process 0
writes state.json and manifest.json, fsyncs, renames the folder and fsyncs its parent. A kill at any moment leaves
either the old state or the new. DCP would not notice a shard that is missing or altered: the manifest does.
Saving is synchronous: DCP's async_save crashed on gloo in trials, one run of two even on a group of its own, and is not
offered. All processes wait for the slowest to write and hash its shards: rank_timeout must be longer than that.
"""

import program

if __name__ == "__main__":
    program.begin()  # before torch, and before anything that takes long to import

import base64
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
import warnings
from dataclasses import fields, replace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mhc import resolve_impl
from model import GPT, GPTConfig

FORMAT = 1
STEP_FOLDER = re.compile(r"step-(\d{8,})")
FILE_BYTES = 2 << 30  # of one file: safetensors are serialised in memory, so this bounds a save's extra memory


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message says which, why, and what to do."""

    on_every_rank = True  # rank 0 alone tells it


# -- processes ------------------------------------------------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def on_every_rank(work):
    """work() of every process, as a list by rank. If it fails on one, all raise CheckpointError naming it: a process
    that went on alone would wait for the others for ever."""
    try:
        mine = work(), None
    except Exception as e:
        mine = None, reason(e)
    everyones = [mine]
    if dist.is_initialized():
        everyones = [None] * world()
        dist.all_gather_object(everyones, mine)
    for r, (_, failed) in enumerate(everyones):
        if failed:
            raise CheckpointError(failed + (f" (process {r})" if world() > 1 else ""))
    return [result for result, _ in everyones]


def on_rank_0(work):
    """work() of process 0 alone; all wait for it and get its result."""
    return on_every_rank(lambda: work() if rank() == 0 else None)[0]


def reason(error):
    """What an exception says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def dcp_call(function, tensors, **storage):
    """dcp.save or dcp.load; its exception, which every process gets, as a CheckpointError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is nothing to warn of
            function(tensors, no_dist=not dist.is_initialized(), **storage)
    except CheckpointException as e:
        r, (error, _) = next(iter(e.failures.items()))
        raise CheckpointError(reason(error) + (f" (process {r})" if world() > 1 else "")) from None


# -- files ----------------------------------------------------------------------------------------------------------


def fsync_folder(path):
    """Make the names in a folder durable, as fsync of a file does its bytes."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def whole_file(path):
    """A text file to write, which gets its name once it is complete and durable; else nothing is left of it."""
    try:
        with program.naming(path), open(path + ".tmp", "w") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + ".tmp")
        raise


def write_json(path, value):
    with whole_file(path) as f:
        json.dump(value, f, indent=1)


def read_json(path):
    with open(path) as f:
        return json.load(f)


def describe(folder, names):
    """{name: {size, sha256}} of these files."""
    found = {}
    for name in names:
        with open(os.path.join(folder, name), "rb") as f:
            found[name] = {"size": os.fstat(f.fileno()).st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}
    return found


def step_folder(out_dir, step):
    return os.path.join(out_dir, f"step-{step:08d}")


def step_of(folder):
    return int(STEP_FOLDER.fullmatch(os.path.basename(os.path.normpath(folder)))[1])


def step_folders(out_dir):
    """The checkpoints of a run, oldest first; whether they are whole is not looked at."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    return [os.path.join(out_dir, n) for n in sorted(names, key=lambda n: (len(n), n)) if STEP_FOLDER.fullmatch(n)]


def free_name(path):
    """path, or path-2, path-3 ...: the first that is not there."""
    names = itertools.chain([path], (f"{path}-{k}" for k in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def remove_folder(folder):
    """Rename first, so that a kill in the middle does not leave a step folder that looks damaged."""
    doomed = os.path.join(os.path.dirname(folder), ".tmp-old-" + os.path.basename(folder))
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def problem_with(folder, share=0, shares=1):
    """None if a checkpoint matches its manifest, else what is wrong. Of the files, every shares-th is hashed."""
    try:
        manifest = read_json(os.path.join(folder, "manifest.json"))
        if manifest["format"] != FORMAT:
            return f"manifest.json is of format {manifest['format']!r}, this program reads {FORMAT}"
        files = manifest["files"]
        for name in sorted(set(files) | set(os.listdir(folder)) - {"manifest.json"})[share::shares]:
            path = os.path.join(folder, name)
            if name not in files:
                return f"{name} is not in manifest.json"  # a shard of some other checkpoint would be read as ours
            if not os.path.exists(path):
                return f"{name} is missing"
            if os.path.getsize(path) != files[name]["size"]:
                return f"{name} has {os.path.getsize(path)} bytes, its manifest says {files[name]['size']}"
            if describe(folder, [name])[name]["sha256"] != files[name]["sha256"]:
                return f"{name} was altered: its sha256 is not the manifest's"
    except FileNotFoundError as e:
        return f"{os.path.basename(e.filename)} is missing"
    except OSError as e:
        return reason(e)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return f"manifest.json cannot be read ({type(e).__name__}: {e})"
    return None


# -- saving ---------------------------------------------------------------------------------------------------------


def keyed(weights, moments):
    """{key: tensor or DTensor} of all there is to keep: the model's state dict and the `state` of the optimizer's."""
    tensors = {f"model.{name}": p for name, p in weights.items()}
    for name, state in moments.items():
        tensors |= {f"optim.{name}.{key}": value for key, value in state.items()}
    return tensors


def file_of_each(tensors):
    """{key: number of the file it goes to, from 1}, so that no file of a process is much above FILE_BYTES."""
    files, filled = {}, 0
    for key, t in tensors.items():
        files[key] = 1 + filled // FILE_BYTES
        filled += t.numel() * t.element_size() // world()
    return files


def rng_state():
    """This process's generators, as text for JSON."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(bytes(s.tolist())).decode() for name, s in states.items()}


def set_rng_state(states):
    states = {name: torch.tensor(list(base64.b64decode(s)), dtype=torch.uint8) for name, s in states.items()}
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def save(out_dir, step, model, optimizer, state, settings, keep=2, best=False):
    """Write out_dir/step-<step>, durably, and remove what is older than the last `keep`. Every process calls it.

    state: a dict of what else the run needs to go on, as JSON can hold it; load() returns it.
    settings: the run's settings; load_model() finds the GPTConfig in them.
    keep: complete checkpoints to retain; at least 2, so that a corrupted one has a fallback. Room is needed for
    keep + 1, and one more for the best: the newest saved with best=True is kept besides.
    Raises CheckpointError on every process if it fails on one (a full disk, say); what was there before is untouched.
    """
    if keep < 2:
        raise ValueError(f"keep={keep}: wanted at least 2 checkpoints, in case the newest is damaged")
    folder, tmp = step_folder(out_dir, step), os.path.join(out_dir, f".tmp-step-{step:08d}")
    try:
        on_rank_0(lambda: (shutil.rmtree(tmp, ignore_errors=True), os.makedirs(tmp)))
        moments = get_optimizer_state_dict(model, optimizer)["state"] if optimizer is not None else {}
        tensors = keyed(get_model_state_dict(model), moments)
        writer = HuggingFaceStorageWriter(tmp, save_distributed=True, fqn_to_index_mapping=file_of_each(tensors))
        dcp_call(dcp.save, tensors, storage_writer=writer)
        prefix = f"shard-{rank() + 1:05d}-"  # the writer counts from 1
        found = on_every_rank(
            lambda: (describe(tmp, [n for n in os.listdir(tmp) if n.startswith(prefix)]), rng_state())
        )
        record = {
            "step": step,
            "best": best,
            "world": world(),
            "state": state,
            "settings": settings,
            "command": [sys.executable, *sys.argv],
            "rng": [rng for _, rng in found],
        }
        files = {name: what for mine, _ in found for name, what in mine.items()}
        on_rank_0(lambda: publish(tmp, folder, record, files))
    except CheckpointError as e:
        if rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        left = [os.path.basename(f) for f in step_folders(out_dir)]
        raise CheckpointError(
            f"step {step} could not be saved in {out_dir}: {e}; earlier checkpoints are untouched: "
            f"{', '.join(left) or 'there are none'}. Make room and run the same command again to go on from the newest"
        ) from e
    on_rank_0(lambda: prune(out_dir, keep))


def publish(tmp, folder, record, files):
    """Complete a folder whose shards are written, and give it its name."""
    write_json(os.path.join(tmp, "state.json"), record)
    files = files | describe(tmp, ["state.json"])
    write_json(os.path.join(tmp, "manifest.json"), {"format": FORMAT, "files": files})
    fsync_folder(tmp)
    if os.path.exists(folder):  # this step was saved before: by a run that went on, or it is about to be replaced
        remove_folder(folder)
    os.rename(tmp, folder)
    fsync_folder(os.path.dirname(folder))
    link = os.path.join(os.path.dirname(folder), "latest")
    try:
        if os.path.lexists(link + ".tmp"):
            os.remove(link + ".tmp")
        os.symlink(os.path.basename(folder), link + ".tmp")
        os.replace(link + ".tmp", link)
    except OSError as e:  # some file systems have no links; the checkpoint itself is complete
        print(f"note: {link} could not be set ({reason(e)})", file=sys.stderr)


def is_best(folder):
    try:
        return read_json(os.path.join(folder, "state.json"))["best"]
    except (OSError, ValueError, KeyError):
        return False  # damaged since it was written: not worth keeping for being the best


def prune(out_dir, keep):
    """Remove all checkpoints but the last `keep` and the best."""
    folders = [f for f in step_folders(out_dir) if os.path.exists(os.path.join(f, "manifest.json"))]
    best = [f for f in folders if is_best(f)]
    for folder in folders[:-keep]:
        if folder not in best[-1:]:
            remove_folder(folder)


# -- finding and loading --------------------------------------------------------------------------------------------


def latest_complete(out_dir, found_broken=lambda folder, problem: None):
    """The newest checkpoint of a run that matches its manifest, or None. Broken ones are named on stderr.

    With several processes all call it, each hashes a part of the files, and all get the same answer.
    """
    for folder in reversed(on_rank_0(lambda: step_folders(out_dir))):
        problems = on_every_rank(lambda folder=folder: problem_with(folder, rank(), world()))
        problem = next((p for p in problems if p), None)
        if problem is None:
            return folder
        if rank() == 0:
            print(f"warning: {folder} is broken and not used: {problem}", file=sys.stderr)
        found_broken(folder, problem)
    return None


def resume_point(out_dir):
    """What a run goes on from: the newest whole checkpoint, or None. Every process calls it, before the first save.

    Clears away the remains of killed saves, and renames broken checkpoints to broken-step-..., so that they do not
    count among the last ones kept. Takes the lock of the folder: see lock().
    """

    def clean():
        os.makedirs(out_dir, exist_ok=True)
        lock(out_dir)
        for name in os.listdir(out_dir):
            if name.startswith(".tmp-"):
                shutil.rmtree(os.path.join(out_dir, name))

    def set_aside(folder, problem):
        on_rank_0(lambda: os.rename(folder, free_name(os.path.join(out_dir, "broken-" + os.path.basename(folder)))))

    on_rank_0(clean)
    return latest_complete(out_dir, set_aside)


def load(folder, model, optimizer=None):
    """Put a checkpoint into a model (bare, DDP or FSDP2) and its optimizer, in place. -> the `state` given to save().

    The number of processes and the way they share the model may differ from those that saved. RNG states come back if
    the number is the same. The files are taken as they are: resume_point and latest_complete verify them.
    """
    record = read_json(os.path.join(folder, "state.json"))
    reader, stored = HuggingFaceStorageReader(folder), {}
    on_every_rank(lambda: stored.update((k, v.size) for k, v in reader.read_metadata().state_dict_metadata.items()))
    weights, moments = get_model_state_dict(model), {"state": {}}
    if optimizer is None:
        stored = {k: size for k, size in stored.items() if k.startswith("model.")}
    elif any(k.startswith("optim.") for k in stored):  # else: saved before any step was taken
        optimizer.zero_grad()  # with gradients there, torch would not make the state that is to be filled
        moments = get_optimizer_state_dict(model, optimizer)
    tensors = keyed(weights, moments["state"])
    check_fit(folder, stored, {k: t.shape for k, t in tensors.items()})
    dcp_call(dcp.load, tensors, storage_reader=reader)  # in place: fills weights and moments
    set_model_state_dict(model, weights)  # as DCP's contract wants it, though today these are the same tensors
    if moments["state"]:
        set_optimizer_state_dict(model, optimizer, moments)
    if record["world"] == world():
        set_rng_state(record["rng"][rank()])
    return record["state"]


def check_fit(folder, stored, wanted):
    """Raise CheckpointError unless a checkpoint holds exactly these tensors: {key: shape} each."""
    for key in stored.keys() | wanted.keys():
        if stored.get(key) != wanted.get(key):
            here, there = (tuple(d[key]) if key in d else "nothing" for d in (wanted, stored))
            raise CheckpointError(f"{folder} does not fit this model: {key} is {there} there and {here} here")


def load_weights(folder, dtype=None):
    """{parameter: whole CPU tensor} of a checkpoint, on one process, whatever wrote it. The optimizer is not read.

    dtype: cast matrices to it; the mappings (phi, theta, alpha, b) and what selects experts stay as they are.
    """
    reader = HuggingFaceStorageReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in stored.items() if k.startswith("model.")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    weights = {k[6:]: t for k, t in tensors.items()}
    return {k: t if dtype is None or stays_wide(k) else t.to(dtype) for k, t in weights.items()}


def stays_wide(name):
    """Whether a parameter belongs to the mappings, or selects experts: never rounded."""
    maps = "_residual." in name or name.startswith("collapse_head.")
    return maps or name.endswith(("mlp.gate.weight", "e_score_correction_bias"))


def find(path):
    """A run folder or one checkpoint -> the folder of a whole checkpoint. Raises CheckpointError."""
    if STEP_FOLDER.fullmatch(os.path.basename(os.path.realpath(path))):
        if problem := problem_with(path):
            raise CheckpointError(f"{path} is broken: {problem}; use another checkpoint, or the run folder")
        return os.path.realpath(path)
    folder = latest_complete(path)
    if folder is None:
        raise CheckpointError(f"{path}: wanted a run folder with a whole step-... checkpoint in it, or one such folder")
    return folder


def load_model(path, device="cpu", dtype=None):
    """A run folder (its newest whole checkpoint) or one step folder -> the model in eval mode, and the run's settings.

    dtype: for the matrices, e.g. torch.bfloat16; the mappings stay fp32. Raises CheckpointError if there is none whole.
    """
    folder = find(path)
    settings = read_json(os.path.join(folder, "state.json"))["settings"]
    try:
        config = GPTConfig(**{f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings})
    except ValueError as e:
        own = (
            "; if it is your own, give its file too, as in training: mine.py" if str(e).startswith("residual=") else ""
        )
        raise CheckpointError(f"{folder} is of a model that cannot be built here: {e}{own}") from None
    model = GPT(runnable(config, device))
    weights = load_weights(folder, dtype)
    check_fit(folder, {k: t.shape for k, t in weights.items()}, {k: t.shape for k, t in model.state_dict().items()})
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).to(device).eval(), settings


def runnable(config, device):
    """config, with impl='auto' if what it was trained with cannot run on this device: the weights are the same."""
    try:
        resolve_impl(config.impl, device)
    except ValueError as e:
        print(f"note: trained with impl={config.impl!r}, here 'auto' takes its place: {e}", file=sys.stderr)
        return replace(config, impl="auto")
    return config


def export(folder, file, dtype=None):
    """The weights of one checkpoint, whole, in one safetensors file; settings and step are in its header. They must fit
    in this machine's memory. The file appears when it is complete."""
    record = read_json(os.path.join(folder, "state.json"))
    header = {"format": "pt", "step": str(record["step"]), "settings": json.dumps(record["settings"])}
    try:
        save_file(load_weights(folder, dtype), file + ".tmp", metadata=header)
        with open(file + ".tmp", "rb") as f:
            os.fsync(f.fileno())
        os.replace(file + ".tmp", file)
    except BaseException as e:
        if os.path.exists(file + ".tmp"):
            os.remove(file + ".tmp")
        if not isinstance(e, Exception):  # Ctrl-C
            raise
        raise CheckpointError(f"{file} could not be written: {reason(e)}") from None


# -- a run: one at a time in a folder, the same one, or anew; stopping it --------------------------------------------

held_locks = {}  # {folder: open file}: a lock lasts as long as its process, so a killed run leaves none behind


def lock(out_dir):
    """Refuse to run in a folder where another run is going on: each would remove the other's half-written files."""
    if os.path.realpath(out_dir) in held_locks:
        return
    f = open(os.path.join(out_dir, ".lock"), "w")
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
        record = read_json(os.path.join(folder, "state.json"))
        was = record["settings"] | {"data": record["state"]["origin"]["data"]}
    elif os.path.exists(path := os.path.join(out_dir, "config.json")):
        record = read_json(path)
        was = record["settings"] | {"data": record["data"]}
    else:
        return {}
    now = origin["settings"] | {"data": origin["data"]}
    fixed = {f.name for f in fields(GPTConfig)} - {"impl"} | {"data", "seed", "batch_size"}
    differ = {k: (was[k], now[k]) for k in now if k in was and was[k] != now[k]}
    for name in sorted(differ.keys() & fixed):
        a, b = differ[name]
        if name == "data":
            a, b = "other data", f"the data given (its shards' sha256 is {b['train'][:8]}..., not {a['train'][:8]}...)"
        else:
            a, b = f"{name}={a!r}", f"{name}={b!r}"
        raise CheckpointError(
            f"{out_dir} holds a run with {a}, not with {b}: to go on with it, give it the same {name}; "
            "to start another, use another out_dir, or --init_from=scratch, which moves the old run aside"
        )
    return differ


def move_aside(out_dir):
    """For --init_from=scratch: rename a run folder to <out_dir>.old (.old-2 ...). -> its new name, None if not there.

    Nothing is removed. A worker that torchrun restarts goes on with the run it began instead."""
    if not os.path.isdir(out_dir) or not os.listdir(out_dir) or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return None
    lock(out_dir)
    held_locks.pop(os.path.realpath(out_dir)).close()
    aside = free_name(os.path.normpath(out_dir) + ".old")
    os.rename(out_dir, aside)
    return aside


def trim_records(path, step, evaluated=True):
    """Drop from a .jsonl file what will be written again: the records of steps after `step`, the evaluation at `step`
    unless the checkpoint has it, and a torn last line."""
    if not os.path.exists(path):
        return
    with open(path) as f, whole_file(path) as new:
        for line in f:
            try:
                record = json.loads(line)
                if record["step"] < step or record["step"] == step and (evaluated or "val_loss" not in record):
                    new.write(line.rstrip("\n") + "\n")
            except ValueError:  # the line being written when the run was killed
                continue


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


# -- command line ---------------------------------------------------------------------------------------------------


def main(argv):
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    flags = [a for a in argv if a.startswith("--")]
    paths = [a for a in argv if not a.startswith("--")]
    dtype = dtypes.get(flags[0].removeprefix("--dtype="), "unknown") if flags else None
    if not 1 <= len(paths) <= 2 or len(flags) > 1 or dtype == "unknown":
        sys.exit(f"usage: python checkpoint.py RUN_OR_STEP_FOLDER [FILE.safetensors [--dtype={'|'.join(dtypes)}]]")
    if len(paths) == 2:
        folder = find(paths[0])
        export(folder, paths[1], dtype)
        print(f"{folder} -> {paths[1]} ({os.path.getsize(paths[1]) / 1e6:.1f} MB)")
        return
    for folder in step_folders(paths[0]) or [find(paths[0])]:
        problem = problem_with(folder)
        print(f"{folder}: " + (f"BROKEN: {problem}" if problem else "whole"))


if __name__ == "__main__":
    program.run(lambda: main(sys.argv[1:]), CheckpointError)
