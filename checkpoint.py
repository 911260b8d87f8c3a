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

A checkpoint is whole, broken or unreadable. Whole: all that its manifest names is there and matches; other files in the
folder are strangers' and are ignored. Broken ones are passed over for the one before; if no whole one is left the run
stops, and never starts anew because of that. Neither does it for one that cannot be read just now (a permission, an I/O
error, a disk that is not mounted): what it holds is not known. What may be deleted or overwritten is said in owned.py.

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
import binascii
import contextlib
import hashlib
import json
import os
import re
import struct
import sys
import warnings
from dataclasses import fields, replace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import owned
import records
from mhc import resolve_impl
from model import GPT, GPTConfig
from owned import NotOurs, sync_folder, write_json
from records import Missing, RecordError, Unreadable, each, integer, names_in, open_file, parse, read_json, string

FORMAT = 1
STEP_FOLDER = re.compile(r"step-(\d{8,})")
FILE_BYTES = 2 << 30  # of one file: safetensors are serialised in memory, so this bounds a save's extra memory


RULES = {int: integer(0, 2**40), float: records.number(), str: string(0, 1000), bool: records.boolean}
SETTINGS = {f"{f.name}?": RULES[f.type] for f in fields(GPTConfig)}  # of a run, as far as they fix the model
ORIGIN = {"command?": [records.anything], "commit?": records.null_or(string()), "data": each(string())}
CONFIG = {"settings": SETTINGS, **ORIGIN}
STATE = {
    "step": integer(0), "best": records.boolean, "world": integer(1), "rng": [each(string())],
    "state": {"origin?": ORIGIN}, "settings": SETTINGS,
}  # fmt: skip
MANIFEST = {
    "format": records.anything,
    "files": each({"size": integer(0), "sha256": records.sha256}, records.file_name),
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message says which, why, and what to do.

    code: the program's exit code: 2 if nothing was begun, because of what is there."""

    on_every_rank = True  # rank 0 alone tells it

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


# -- processes ------------------------------------------------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def on_every_rank(work):
    """work() of every process, as a list by rank. If it fails on one, all raise CheckpointError naming it: a process
    that went on alone would wait for the others for ever."""
    try:
        mine = work(), None, 0
    except Exception as e:
        mine = None, reason(e), exit_code(e)
    everyones = [mine]
    if dist.is_initialized():
        everyones = [None] * world()
        dist.all_gather_object(everyones, mine)
    for r, (_, failed, code) in enumerate(everyones):
        if failed:
            raise CheckpointError(failed + (f" (process {r})" if world() > 1 else ""), code)
    return [result for result, _, _ in everyones]


def on_rank_0(work):
    """work() of process 0 alone; all wait for it and get its result."""
    return on_every_rank(lambda: work() if rank() == 0 else None)[0]


def reason(error):
    """What an exception says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    if isinstance(error, (CheckpointError, NotOurs, RecordError)):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def exit_code(error):
    """2 for what is refused as it stands, 1 for what has failed."""
    return 2 if isinstance(error, (NotOurs, RecordError)) else getattr(error, "code", 1)


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


def describe(folder, names):
    """{name: {size, sha256}} of these files."""
    found = {}
    for name in names:
        with program.naming(path := os.path.join(folder, name)), open_file(path) as f:
            found[name] = {"size": os.fstat(f.fileno()).st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}
    return found


def step_folder(out_dir, step):
    return os.path.join(out_dir, f"step-{step:08d}")


def step_of(folder):
    return int(STEP_FOLDER.fullmatch(os.path.basename(os.path.normpath(folder)))[1])


def names_of(out_dir):
    """What is in a run folder; nothing if there is none. Raises CheckpointError if it cannot be read."""
    try:
        return names_in(out_dir)
    except Missing:
        return []
    except RecordError as e:
        raise CheckpointError(str(e), 2) from None


def step_folders(out_dir):
    """The checkpoints of a run, oldest first; whether they are whole is not looked at."""
    names = [n for n in names_of(out_dir) if STEP_FOLDER.fullmatch(n)]
    folders = [os.path.join(out_dir, n) for n in sorted(names, key=lambda n: (len(n), n))]
    return [folder for folder in folders if holds_a_checkpoint(folder)]


def holds_a_checkpoint(folder):
    """Whether anything of a checkpoint is in a folder. Raises CheckpointError if that cannot be seen just now."""
    try:
        return any(owned.is_name("step", name) for name in names_in(folder))
    except Unreadable as e:
        raise unreadable(folder, e) from None
    except RecordError:
        return False  # a file of that name, or one that was pruned just now


def unreadable(folder, error):
    return CheckpointError(
        f"{error}; whether {os.path.basename(folder)} is whole is not known, and nothing was changed: make it "
        "readable, or move it out of the run folder to do without it",
        2,
    )


def remove_folder(folder):
    """Remove a checkpoint. Rename first, so that a kill in the middle does not leave a step folder that looks damaged;
    one with a stranger's file in it stays in its place with that file."""
    if not owned.is_folder(folder):
        raise NotOurs(f"{folder}: is no folder of ours, so it is not removed; move it away")
    ours = "step"
    with contextlib.suppress(RecordError):  # what its manifest names is ours; if it has none, what has our names
        ours = frozenset(read_json(os.path.join(folder, "manifest.json"), MANIFEST)["files"]) | {"manifest.json"}
    if not owned.strangers(folder, ours):
        doomed = os.path.join(os.path.dirname(folder), ".tmp-old-" + os.path.basename(folder))
        owned.remove(doomed, "step")
        if not os.path.lexists(doomed):
            os.rename(folder, doomed)
            folder = doomed
    owned.remove(folder, ours, last="manifest.json")


def problem_with(folder, share=0, shares=1):
    """None if a checkpoint matches its manifest, else what is wrong. Of the files, every shares-th is hashed.

    Raises CheckpointError if it cannot be read just now, or is a copy of another step's: neither is a damage."""
    try:
        there = set(names_in(folder))
        manifest = read_json(os.path.join(folder, "manifest.json"), MANIFEST)
        if manifest["format"] != FORMAT:
            return f"manifest.json is of format {manifest['format']!r}, this program reads {FORMAT}"
        for name, wanted in sorted(manifest["files"].items())[share::shares]:
            if name not in there:
                return f"{name} is missing"
            found = describe(folder, [name])[name]
            if found["size"] != wanted["size"]:
                return f"{name} has {found['size']} bytes, its manifest says {wanted['size']}"
            if found["sha256"] != wanted["sha256"]:
                return f"{name} was altered: its sha256 is not the manifest's"
        if not {"state.json"} <= manifest["files"].keys():
            return "manifest.json names no state.json"
        step = read_state(folder)["step"]
    except Unreadable as e:
        raise unreadable(folder, e) from None
    except RecordError as e:  # missing, or not what it should be
        return str(e).removeprefix(folder + os.sep)
    except OSError as e:
        raise unreadable(folder, reason(e)) from None
    if step != step_of(folder):
        raise CheckpointError(
            f"{folder}: holds step {step}: a copy of step-{step:08d} under another step's name is not used; rename it, "
            "or move it out of the run folder",
            2,
        )
    return None


def read_state(folder):
    """state.json of a checkpoint. Raises RecordError."""
    path = os.path.join(folder, "state.json")
    record = read_json(path, STATE, nan=True)
    if len(record["rng"]) != record["world"]:
        raise RecordError(f"{path}: rng: wanted {record['world']}, one for each process, got {len(record['rng'])}")
    return record


# -- saving ---------------------------------------------------------------------------------------------------------


def keyed(weights, moments):
    """{key: tensor or DTensor} of all there is to keep: the model's state dict and the `state` of the optimizer's."""
    tensors = {f"model.{name}": p for name, p in weights.items()}
    for name, state in moments.items():
        tensors |= {f"optim.{name}.{key}": value for key, value in state.items()}
    return tensors


def of_all(tensors):
    """{key: (shape, bytes)} of the tensors of all processes: in a pipeline each has its own."""
    mine = {key: (t.shape, t.numel() * t.element_size()) for key, t in tensors.items()}
    return {key: what for found in on_every_rank(lambda: mine) for key, what in found.items()}


def file_of_each(tensors):
    """{key: number of the file it goes to, from 1}, so that no file of a process is much above FILE_BYTES."""
    files, filled = {}, 0
    for key, (_, size) in of_all(tensors).items():
        files[key] = 1 + filled // FILE_BYTES
        filled += size // world()
    return files


def rng_state():
    """This process's generators, as text for JSON."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(bytes(s.tolist())).decode() for name, s in states.items()}


def set_rng_state(states):
    try:
        states = {name: torch.tensor(list(base64.b64decode(s)), dtype=torch.uint8) for name, s in states.items()}
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except (binascii.Error, KeyError, RuntimeError, TypeError) as e:
        raise CheckpointError(
            f"state.json: rng: not the state of a generator of torch {torch.__version__} ({e})"
        ) from None


def save(out_dir, step, model, optimizer, state, settings, keep=2, best=False):
    """Write out_dir/step-<step>, durably, and remove what is older than the last `keep`. Every process calls it.

    state: a dict of what else the run needs to go on, as JSON can hold it; load() returns it.
    settings: the run's settings; load_model() finds the GPTConfig in them.
    keep: complete checkpoints to retain; at least 2, so that a corrupted one has a fallback. Room is needed for
    keep + 1, and one more for the best: the newest saved with best=True is kept besides.
    Raises CheckpointError on every process if it fails on one (a full disk, say); what was there before is untouched.
    The folder gets our mark, if it has none and nothing in it is somebody else's.
    """
    if keep < 2:
        raise ValueError(f"keep={keep}: wanted at least 2 checkpoints, in case the newest is damaged")
    folder, tmp = step_folder(out_dir, step), os.path.join(out_dir, f".tmp-step-{step:08d}")
    try:
        on_rank_0(
            lambda: (
                owned.make(out_dir, "run", looks_like_a_run),
                owned.remove(tmp, "step"),
                os.makedirs(tmp, exist_ok=True),
            )
        )
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
        if rank() == 0 and owned.is_folder(tmp):
            owned.remove(tmp, "step")
        left = [os.path.basename(f) for f in step_folders(out_dir)]
        raise CheckpointError(
            f"step {step} could not be saved in {out_dir}: {e}; earlier checkpoints are untouched: "
            f"{', '.join(left) or 'there are none'}. Make room and run the same command again to go on from the newest",
            e.code,
        ) from e
    on_rank_0(lambda: prune(out_dir, keep))


def publish(tmp, folder, record, files):
    """Complete a folder whose shards are written, and give it its name."""
    write_json(os.path.join(tmp, "state.json"), record)
    files = files | describe(tmp, ["state.json"])
    write_json(os.path.join(tmp, "manifest.json"), {"format": FORMAT, "files": files})
    sync_folder(tmp)
    if os.path.lexists(folder):  # this step was saved before: by a run that went on, or it is about to be replaced
        remove_folder(folder)
    if os.path.lexists(folder):  # a stranger's file is in it
        for name in sorted([*files, "manifest.json"], key=lambda n: n == "manifest.json"):
            os.rename(os.path.join(tmp, name), os.path.join(folder, name))
        owned.remove(tmp, "step")
    else:
        os.rename(tmp, folder)
    sync_folder(os.path.dirname(folder))
    point_to(folder)


def point_to(folder):
    """Set the link `latest`, which is for people; whatever else has that name stays."""
    link = os.path.join(os.path.dirname(folder), "latest")
    try:
        if os.path.lexists(link) and not STEP_FOLDER.fullmatch(os.readlink(link)):
            return
        if os.path.lexists(new := os.path.join(os.path.dirname(folder), ".tmp-latest")) and os.readlink(new):
            os.remove(new)
        os.symlink(os.path.basename(folder), new)
        os.replace(new, link)
    except OSError as e:  # some file systems have no links, or another thing has that name; the checkpoint is complete
        print(f"note: {link} could not be set ({reason(e)})", file=sys.stderr)


def is_best(folder):
    try:
        return read_state(folder)["best"]
    except RecordError:
        return False  # damaged since it was written: not worth keeping for being the best


def prune(out_dir, keep):
    """Remove all checkpoints but the last `keep` and the best."""
    folders = [f for f in step_folders(out_dir) if os.path.exists(os.path.join(f, "manifest.json"))]
    folders = [f for f in folders if owned.is_folder(f)]  # one behind a link is somebody's arrangement
    best = [f for f in folders if is_best(f)]
    for folder in folders[:-keep]:
        if folder not in best[-1:]:
            remove_folder(folder)


# -- finding and loading --------------------------------------------------------------------------------------------


def usable(out_dir):
    """-> the newest checkpoint of a run that matches its manifest, or None, and the broken ones that are newer.

    Broken ones are named on stderr. With several processes all call it, each hashes a part of the files, and all get
    the same answer. Raises CheckpointError if there are checkpoints and none of them can be used."""
    broken, newest = [], ""
    for folder in reversed(on_rank_0(lambda: step_folders(out_dir))):
        problems = on_every_rank(lambda folder=folder: problem_with(folder, rank(), world()))
        problem = next((p for p in problems if p), None)
        if problem is None:
            return folder, broken
        if rank() == 0:
            print(f"warning: {folder} is broken and not used: {problem}", file=sys.stderr)
        broken.append(folder)
        newest = newest or f"{os.path.basename(folder)}: {problem}"
    if broken:
        raise CheckpointError(
            f"{out_dir}: none of its {len(broken)} checkpoints can be used ({newest}), and nothing was changed: put "
            "back a copy of one, or train anew with --init_from=scratch, which moves all of it aside",
            2,
        )
    return None, []


def latest_complete(out_dir):
    """The newest checkpoint of a run that matches its manifest; None if there is none at all. Raises as usable()."""
    return usable(out_dir)[0]


def looks_like_a_run(folder):
    """Whether a folder without our mark is a run's of before there were marks: its config.json, or a checkpoint's
    manifest, is one of ours."""
    candidates = [("config.json", CONFIG)]
    candidates += [(os.path.join(n, "manifest.json"), MANIFEST) for n in names_in(folder) if STEP_FOLDER.fullmatch(n)]
    for name, kind in candidates:
        with contextlib.suppress(RecordError):
            read_json(os.path.join(folder, name), kind)
            return True
    return False


class ShardReader(HuggingFaceStorageReader):
    """DCP's reader, which would take every *.safetensors in the folder for a shard, kept to those of the manifest."""

    def __init__(self, folder):
        super().__init__(folder)
        files = [n for n in read_json(os.path.join(folder, "manifest.json"), MANIFEST)["files"] if n != "state.json"]
        self.fs.ls = lambda path: [os.path.join(path, name) for name in files]


def stored_tensors(folder):
    """-> a reader of a checkpoint's shards, and {key: its TensorStorageMetadata}. Raises CheckpointError."""
    try:
        reader = ShardReader(folder)
        return reader, reader.read_metadata().state_dict_metadata
    except Exception as e:  # whatever the library meets in a header that it has not written
        raise CheckpointError(f"{folder}: its shards cannot be read: {reason(e)}") from None


def load(folder, model, optimizer=None):
    """Put a checkpoint into a model (bare, DDP or FSDP2) and its optimizer, in place. -> the `state` given to save().

    The number of processes and the way they share the model may differ from those that saved. RNG states come back if
    the number is the same. The files are taken as they are: run_folder.resume_point and latest_complete verify them.
    """
    found = []
    on_every_rank(lambda: found.extend((read_state(folder), *stored_tensors(folder))))
    record, reader, metadata = found
    stored = {k: v.size for k, v in metadata.items()}
    weights, moments = get_model_state_dict(model), {"state": {}}
    if optimizer is None:
        stored = {k: size for k, size in stored.items() if k.startswith("model.")}
    elif any(k.startswith("optim.") for k in stored):  # else: saved before any step was taken
        optimizer.zero_grad()  # with gradients there, torch would not make the state that is to be filled
        moments = get_optimizer_state_dict(model, optimizer)
    tensors = keyed(weights, moments["state"])
    check_fit(folder, stored, {k: shape for k, (shape, _) in of_all(tensors).items()})
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
    reader, stored = stored_tensors(folder)
    tensors = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in stored.items() if k.startswith("model.")}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as e:
        raise CheckpointError(f"{folder}: its shards cannot be read: {reason(e)}") from None
    weights = {k[6:]: t for k, t in tensors.items()}
    return {k: t if dtype is None or stays_wide(k) else t.to(dtype) for k, t in weights.items()}


def stays_wide(name):
    """Whether a parameter belongs to the mappings, or selects experts: never rounded."""
    maps = "_residual." in name or name.startswith("collapse_head.")
    return maps or name.endswith(("mlp.gate.weight", "e_score_correction_bias"))


def find(path):
    """A run folder or one checkpoint -> the folder of a whole checkpoint. Raises CheckpointError."""
    if STEP_FOLDER.fullmatch(os.path.basename(os.path.realpath(path))):
        folder = os.path.realpath(path)
        if problem := problem_with(folder):
            raise CheckpointError(f"{path} is broken: {problem}; use another checkpoint, or the run folder")
        return folder
    folder = latest_complete(path)
    if folder is None:
        raise CheckpointError(f"{path}: wanted a run folder with a whole step-... checkpoint in it, or one such folder")
    return folder


def load_model(path, device="cpu", dtype=None):
    """A run folder (its newest whole checkpoint) or one step folder -> the model in eval mode, and the run's settings.

    dtype: for the matrices, e.g. torch.bfloat16; the mappings stay fp32. The settings are those of the run and, where
    the checkpoint says it, `tokenizer_sha256` of the corpus it was trained on. Raises CheckpointError if there is no
    whole checkpoint, if it does not hold what its settings describe, or a weight is not finite.
    """
    folder = find(path)
    record = read_state(folder)
    model = model_of(folder, record["settings"], device)
    weights = load_weights(folder, dtype)
    if bad := next((k for k, t in weights.items() if t.is_floating_point() and not t.isfinite().all()), None):
        raise CheckpointError(
            f"{folder}: {bad} holds what is no number: take a checkpoint from before the run diverged"
        )
    model.load_state_dict(weights, assign=True)
    data = record["state"].get("origin", {"data": {}})["data"]
    told = {"tokenizer_sha256": data["tokenizer"]} if "tokenizer" in data else {}
    return model.requires_grad_(False).to(device).eval(), record["settings"] | told


def model_of(folder, settings, device):
    """The model that a checkpoint's settings describe, for this device, without values, once it is known to fit what is
    stored: a wrong number in them must not ask for a terabyte. Raises CheckpointError."""
    stored = {k[6:]: tuple(v.size) for k, v in stored_tensors(folder)[1].items() if k.startswith("model.")}
    layers = 1 + max((int(m[1]) for k in stored if (m := re.match(r"layers\.(\d+)\.", k))), default=-1)
    try:
        config = GPTConfig(**{f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings})
        if config.n_layer != layers:
            raise ValueError(f"n_layer={config.n_layer}, but its shards have {layers}")
        config = runnable(config, device)
        with torch.device("meta"):
            wanted = {k: tuple(t.shape) for k, t in GPT(config).state_dict().items()}
    except (ValueError, RuntimeError, OverflowError) as e:  # of torch: sizes whose product no tensor can have
        own = (
            "; if it is your own, give its file too, as in training: mine.py" if str(e).startswith("residual=") else ""
        )
        why = str(e).splitlines()[0] + own
        raise CheckpointError(
            f"{folder} is of a model that cannot be built here: state.json: settings: {why}"
        ) from None
    check_fit(folder, stored, wanted)
    return GPT(config)


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
    in this machine's memory. The file appears when it is complete; a kill leaves nothing. Raises NotOurs for a target
    that is no file of ours, and CheckpointError."""
    owned.check_place(file)
    owned.check_file(file, is_export)
    record = read_state(folder)
    about = {"format": "pt", "step": str(record["step"]), "settings": json.dumps(record["settings"]), "made_by": "mhc"}
    try:
        with owned.whole_file(file, is_export, binary=True) as f:
            write_safetensors(f, load_weights(folder, dtype), about)
    except OSError as e:
        raise CheckpointError(f"{file} could not be written: {reason(e)}") from None


SAFETENSORS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
               torch.int64: "I64", torch.int32: "I32"}  # fmt: skip


def write_safetensors(f, tensors, about):
    """The format that safetensors.torch.save_file writes, into a file without a name (its own makes one that a kill
    would leave behind): 8 bytes with the header's length, the header, the tensors. about: {str: str}."""
    header, at = {"__metadata__": about}, 0
    names = sorted(
        tensors, key=lambda k: (-tensors[k].element_size(), k)
    )  # so that each begins at a multiple of its size
    for name in names:
        t = tensors[name]
        end = at + t.numel() * t.element_size()
        header[name] = {"dtype": SAFETENSORS[t.dtype], "shape": list(t.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    f.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        f.write(tensors[name].contiguous().flatten().view(torch.uint8).numpy())


def is_export(file):
    """Whether a file is one that export() has made: its header says so."""
    about = {"__metadata__": {"settings": string(), "step": string()}}
    try:
        with open_file(file) as f:
            length = struct.unpack("<Q", f.read(8))[0]
            parse(f.read(min(length, 64 << 20)), about, file)
    except (OSError, RecordError, struct.error):
        return False
    return True


# -- command line ---------------------------------------------------------------------------------------------------


def verify(path):
    """Print of each checkpoint of a run (or of the one named) whether it is whole. -> how many are not, of how many."""
    folders, bad = step_folders(path) or [find(path)], 0
    for folder in folders:
        try:
            problem = problem_with(folder)
            problem = problem and f"BROKEN: {problem}"
        except CheckpointError as e:
            problem = f"NOT USED: {e}"
        print(f"{folder}: {problem or 'whole'}")
        bad += problem is not None
    return bad, len(folders)


def main(argv):
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    flags = [a for a in argv if a.startswith("--")]
    paths = [a for a in argv if not a.startswith("--")]
    dtype = dtypes.get(flags[0].removeprefix("--dtype="), "unknown") if flags else None
    if not 1 <= len(paths) <= 2 or len(flags) > 1 or dtype == "unknown" or flags and len(paths) == 1:
        owned.refuse(f"usage: python checkpoint.py RUN_OR_STEP_FOLDER [FILE.safetensors [--dtype={'|'.join(dtypes)}]]")
    if len(paths) == 1:
        bad, n = verify(paths[0])
        if bad:
            sys.exit(f"error: {bad} of {n} checkpoints in {paths[0]} cannot be used")
        return
    file = paths[1]
    owned.check_place(file)
    owned.check_file(file, is_export)
    folder = find(paths[0])
    export(folder, file, dtype)
    print(f"{folder} -> {file} ({os.path.getsize(file) / 1e6:.1f} MB)")


if __name__ == "__main__":
    program.run(lambda: main(sys.argv[1:]), CheckpointError, NotOurs)
