"""One table of mistakes over all programs: what is typed or lies about, the exit code, the words that must be named,
and what must still be on the disk: everything, unchanged, but for what a row says may change.

Each row has a copy of a small world of its own, and calls the program's main in this process. The line that says what
is wrong is one line, the last on stderr. Below the table: real files with one thing changed in them, by hypothesis.
"""

import contextlib
import importlib
import io
import json
import os
import re
import resource
import shutil
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoint
import figures
import owned
import program
import run_folder
from data import Corpus, DataError, sha256_file
from owned import NotOurs
from tests.ranks import train_in_fork
from tokenizer import load_tokenizer

TINY = (
    "--seq_len=16 --n_layer=1 --first_k_dense_replace=0 --n_embd=16 --n_head=2 --kv_lora_rank=8 --qk_nope_head_dim=4 "
    "--qk_rope_head_dim=4 --v_head_dim=4 --n_routed_experts=4 --num_experts_per_tok=2 --moe_intermediate_size=8 "
    "--batch_size=2 --micro_batch_size=2 --eval_sequences=2 --eval_interval=2 --checkpoint_interval=2 --max_steps=4 "
    "--device=cpu --impl=ref"
).split()
SHARD = "shard-00001-model-00001-of-00001.safetensors"
KNOWN = (checkpoint.CheckpointError, DataError, NotOurs)


# -- the world --------------------------------------------------------------------------------------------------------


def prepare(root, name, words):
    """A corpus of a few thousand bytes, made in this process."""
    text = root / f"text_{name}"
    text.mkdir()
    for part in ("a", "b"):
        lines = [f"{part}{i} {words} {j} is {i * j}." for i in range(20) for j in range(20)]
        (text / f"{part}.txt").write_text(" ".join(lines))
    flags = [f"--dataset={text}", f"--data_dir={root / name}", "--val_fraction=0.5"]
    assert call("prepare_data", [*flags, f"--tokenizer={'bytes' if name == 'data' else 'bpe300'}"]) == (0, "")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """run/ with checkpoints of steps 2 and 4; its corpus data/, and other/ with another tokenizer; somebody's files."""
    root = tmp_path_factory.mktemp("world")
    prepare(root, "data", "times")
    prepare(root, "other", "plus")
    flags = [*TINY, f"--data_dir={root / 'data'}", f"--out_dir={root / 'run'}"]
    codes, output = train_in_fork(flags, str(root / "log"))
    assert codes == [0], output
    checkpoint.export(str(root / "run" / "step-00000004"), str(root / "weights.safetensors"))
    (root / "thesis.txt").write_text("not to be lost")
    theirs = root / "theirs"
    theirs.mkdir()
    (theirs / "chapter.txt").write_text("not to be lost either")
    os.symlink(theirs, root / "link")
    os.symlink(root / "thesis.txt", root / "filelink")
    os.mkfifo(root / "fifo")
    return root


def copy(world, root):
    """The world again, at another place: what in it says where it lies is changed."""
    for path in sorted(world.rglob("*")):
        new = root / path.relative_to(world)
        if path.is_symlink():
            os.symlink(os.readlink(path).replace(str(world), str(root)), new)
        elif path.is_dir():
            new.mkdir()
        elif path.is_fifo():
            os.mkfifo(new)
        else:
            shutil.copyfile(path, new)
    for path in (*root.glob("run/step-*/state.json"), *root.glob("*/meta.json"), root / "run" / "config.json"):
        path.write_text(path.read_text().replace(str(world), str(root)))
        if path.name == "state.json":
            sign(path.parent)
    return root


def sign(step):
    """A manifest that fits what is in a checkpoint's folder, as a stranger's program would write it."""
    files = checkpoint.describe(str(step), [n for n in os.listdir(step) if n != "manifest.json"])
    (step / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def lies_there(root):
    """{path: what it is and holds} of everything below root."""
    found = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else path.stat().st_mode
    return found


def call(name, argv):
    """A program as its command line calls it, in this process -> exit code, stderr."""
    module = importlib.import_module(name)
    before, argv_before, said = dict(vars(module)), sys.argv, io.StringIO()
    main = {"checkpoint": lambda: module.main(sys.argv[1:]), "prepare_data": lambda: module.command()}.get(name)
    sys.argv = [name + ".py", *argv]
    code = 0
    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), \
                contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), errors="backslashreplace")):  # fmt: skip
            patch.setattr(program, "handle_signals", lambda handler: None)
            patch.setattr(program, "watch_signals", lambda: None)
            patch.setattr(sys, "stdin", None)
            patch.chdir(os.getcwd())  # tools/drill.py changes it
            program.run(main or module.main, *KNOWN)
    except SystemExit as e:
        code = e.code
        if isinstance(code, str):  # sys.exit(text)
            said.write(code + "\n")
            code = 1
    finally:
        sys.argv = argv_before
        vars(module).update(before)
        while run_folder.held_locks:
            run_folder.held_locks.popitem()[1].close()
    return code or 0, said.getvalue()


# -- what can be done to a world --------------------------------------------------------------------------------------


def write(path, content):
    """Replace what is there."""

    def damage(root):
        target = root / path
        if target.is_symlink() or target.is_file():
            target.unlink()
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def clear(root, path):
    target = root / path
    shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink(missing_ok=True)
    target.parent.mkdir(exist_ok=True, parents=True)
    return target


def link(path, to):
    return lambda root: os.symlink(to.format(root=root), clear(root, path))


def fifo(path):
    return lambda root: os.mkfifo(clear(root, path))


def folder(path):
    return lambda root: clear(root, path).mkdir()


def cut(path, keep=100):
    return lambda root: os.truncate(root / path, keep)


def flip(path, at):
    def damage(root):
        content = bytearray((root / path).read_bytes())
        content[at] ^= 1
        (root / path).write_bytes(content)

    return damage


def move(a, b):
    return lambda root: os.rename(root / a, root / b)


def copytree(a, b):
    return lambda root: shutil.copytree(root / a, root / b, symlinks=True)


def unmark(path):
    return lambda root: os.remove(root / path / owned.MARK)


def edit(path, **changes):
    """Fields of a JSON file, a.b.c as a__b__c; where a checksum covers the file, that is made to fit."""

    def damage(root):
        target = root / path
        value = json.loads(target.read_text())
        for name, new in changes.items():
            *inner, last = name.split("__")
            at = value
            for key in inner:
                at = at[key]
            at[last] = new
        target.write_text(json.dumps(value))
        if target.name == "state.json":
            sign(target.parent)
        if target.name == "tokenizer.json":
            edit(os.path.join(os.path.dirname(path), "meta.json"), tokenizer_sha256=sha256_file(target))(root)

    return damage


def raw_state(content):
    """state.json as these bytes, under a manifest that fits."""

    def damage(root):
        step = root / "run" / "step-00000004"
        (step / "state.json").write_bytes(content)
        sign(step)

    return damage


def nan_weights(root):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = root / "run" / "step-00000004" / SHARD
    with safe_open(path, "pt") as f:
        about = f.metadata()
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, path, about)
    sign(path.parent)


def also(*damages):
    def damage(root):
        for each in damages:
            each(root)

    return damage


def other_tokenizer(root):
    """Another corpus at the same path, of which nothing but the tokenizer need be looked at."""
    shutil.rmtree(root / "data")
    shutil.copytree(root / "other", root / "data")


BOTH = also(*(cut(f"run/step-0000000{n}/{SHARD}") for n in (2, 4)))
S4 = "run/step-00000004"


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    program: str
    argv: str  # {root}: where the world lies
    code: int
    named: str  # in the last line on stderr
    damage: object = lambda root: None
    may_change: str = "$^"  # paths, as a regular expression


RUN = "--out_dir={root}/run --data_dir={root}/data"
NEW = "--out_dir={root}/new --data_dir={root}/data"
DATA = "--dataset={root}/text_data --tokenizer=bytes --val_fraction=0.5 --data_dir={root}/"
LOCK = r"run/\.lock"


def train(argv, code, named, damage=lambda root: None, may_change=LOCK):
    return Row("train", argv, code, named, damage, may_change)


def draw(code, named, damage):
    return Row("figures", "{root}/run --out={root}/x.png", code, named, damage, "x.png" if code == 0 else "$^")


DIVERGED = """{"step": 0, "val_loss": 5.5, "params": 7, "composite_fwd_max": [1.0, 1.5], "composite_fwd_min": [1.0]}
{"step": 1, "loss": 5.5, "grad_norm": null, "step_ms": 3}
{"step": 2, "loss": null, "grad_norm": 1e300}
{"step": 3, "loss": 1e300, "grad_norm": 0.0}
{"step": 3, "val_loss": null, "bits_per_byte": null, "composite_fwd_max": [1.0, null], "composite_fwd_min": [null, 0.5],
""".replace(",\n", ', "single_bwd_max": [], "composite_bwd_max": [1e300], "composite_bwd_min": [null], "peak_MB": 1}\n')


def data(argv, code, named, damage=lambda root: None):
    return Row("prepare_data", DATA + argv, code, named, damage)


ROWS = [
    # checkpoint.py: verifying
    Row("checkpoint", "", 2, "usage"), Row("checkpoint", "a b c", 2, "usage"),
    Row("checkpoint", "{root}/run {root}/x --dtype=int8", 2, "usage"),
    Row("checkpoint", "{root}/run --dtype=float16", 2, "usage"),
    Row("checkpoint", "{root}/nowhere", 1, "wanted a run folder"),
    Row("checkpoint", "{root}/theirs", 1, "wanted a run folder"),
    Row("checkpoint", "{root}/thesis.txt", 2, "wanted a folder, got a file"),
    Row("checkpoint", "{root}/run", 1, "1 of 2 checkpoints", cut(f"{S4}/state.json")),
    Row("checkpoint", "{root}/run", 1, "2 of 2 checkpoints", BOTH),
    Row("checkpoint", "{root}/run", 1, "1 of 2 checkpoints", flip(f"{S4}/{SHARD}", 5000)),
    Row("checkpoint", "{root}/run", 1, "1 of 2 checkpoints", raw_state(b"[" * 10**5)),
    Row("checkpoint", "{root}/run", 1, "1 of 2 checkpoints", edit(f"{S4}/state.json", step="4")),
    Row("checkpoint", "{root}/run", 1, "1 of 2 checkpoints", folder(f"{S4}/manifest.json")),
    Row("checkpoint", "{root}/run", 1, "1 of 2 checkpoints", fifo(f"{S4}/{SHARD}")),
    Row("checkpoint", "{root}/run", 1, "1 of 3 checkpoints", copytree(S4, "run/step-00000007")),
    Row("checkpoint", "{root}/run", 0, "", write(f"{S4}/.DS_Store", b"\0")),
    # checkpoint.py: exporting
    Row("checkpoint", "{root}/run {root}/run/step-00000004/model.safetensors", 2, "lies inside the checkpoint"),
    Row("checkpoint", "{root}/run {root}/run/latest/x", 2, "lies inside the checkpoint"),
    Row("checkpoint", "{root}/run {root}/thesis.txt", 2, "was not made by this program"),
    Row("checkpoint", "{root}/run {root}/run/metrics.jsonl", 2, "was not made by this program"),
    Row("checkpoint", "{root}/run {root}/filelink", 2, "is a link"),
    Row("checkpoint", "{root}/run {root}/fifo", 2, "is a FIFO"),
    Row("checkpoint", "{root}/run {root}/theirs", 2, "is a folder"),
    Row("checkpoint", "{root}/run /dev/null", 2, "is a device"),
    Row("checkpoint", "{root}/run {root}/nowhere/x", 1, "nowhere"),
    Row("checkpoint", "{root}/run {root}/thesis.txt/x", 1, "thesis.txt"),
    Row("checkpoint", "{root}/run/step-00000004 {root}/x", 1, "is broken", cut(f"{S4}/{SHARD}")),
    Row("checkpoint", "{root}/run {root}/x", 2, "none of its 2 checkpoints", BOTH),
    Row("checkpoint", "{root}/run {root}/x", 2, "is a link to /not/there", link(f"{S4}/{SHARD}", "/not/there")),
    Row("checkpoint", "{root}/run {root}/x", 2, "holds step 4", copytree(S4, "run/step-00000007")),
    Row("checkpoint", "{root}/run {root}/weights.safetensors", 0, "", may_change="weights.safetensors"),
    # train.py: whose folder is it?
    train("--out_dir={root}/theirs --data_dir={root}/data", 2, "metrics.jsonl", write("theirs/metrics.jsonl", "{}\n")),
    train("--out_dir={root}/theirs --data_dir={root}/data", 2, "config.json", write("theirs/config.json", '{"a": 1}')),
    train("--out_dir={root}/theirs --data_dir={root}/data", 2, "step-00000001", folder("theirs/step-00000001")),
    train("--out_dir={root}/thesis.txt --data_dir={root}/data", 2, "thesis.txt"),
    train("--out_dir={root}/fifo --data_dir={root}/data", 2, "fifo"),
    train("--out_dir={root}/other --data_dir={root}/data", 2, "holds a corpus, not a run"),
    train("--out_dir={root}/run/step-00000004/new --data_dir={root}/data", 2, "lies inside the checkpoint"),
    *(
        train(RUN, 2, f"{name}: is a link", link(f"run/{name}", "{root}/thesis.txt"))
        for name in (".lock", "config.json", "metrics.jsonl", "metrics-dropped.jsonl", "maps.npz", "trace.json")
    ),
    train(RUN, 2, "metrics.jsonl: is a folder", folder("run/metrics.jsonl")),
    train(RUN, 2, ".lock: is a FIFO", fifo("run/.lock")),
    train(RUN + " --init_from=scratch", 2, "lock: is a link", link("run/.lock", "{root}/thesis.txt")),
    train("--out_dir={root}/theirs --data_dir={root}/data --init_from=scratch", 2, "not known to be a run"),
    train("--out_dir={root}/link --data_dir={root}/data --init_from=scratch", 2, "is a link"),
    # train.py: what is there cannot be gone on with
    train(RUN, 2, "none of its 2 checkpoints can be used", BOTH),
    train(RUN, 2, "none of its 2 checkpoints can be used", also(unmark("run"), BOTH), r"run/\.(lock|made_by_mhc)"),
    train(RUN, 2, "no checkpoint but broken ones", also(move(S4, "run/broken-step-00000004"),
                                                         move("run/step-00000002", "run/broken-step-00000002"))),
    train(RUN, 2, "is a link to /not/there", link(f"{S4}/{SHARD}", "/not/there")),
    train(RUN, 2, "is a link to /not/there", link(S4, "/not/there")),
    train(RUN, 2, "holds step 4", copytree(S4, "run/step-00000007")),
    train(RUN, 2, "config.json", also(*(lambda root, n=n: clear(root, f"run/step-0000000{n}") for n in (2, 4)),
                                      write("run/config.json", "[]"))),
    train(RUN + " --n_embd=32", 1, "n_embd=16, not with n_embd=32"),
    train("--out_dir={root}/run --data_dir={root}/other", 1, "other data"),
    train(RUN, 2, "state.skipped", edit(f"{S4}/state.json", state__skipped="none")),
    train(RUN, 1, "rng", edit(f"{S4}/state.json", rng=[{"cpu": "!!"}])),
    # train.py: the corpus
    train("--out_dir={root}/new --data_dir={root}/nowhere", 2, "no prepared corpus"),
    train("--out_dir={root}/new --data_dir={root}/thesis.txt", 2, "thesis.txt"),
    train(NEW, 2, "meta.json", write("data/meta.json", "[]")),
    train(NEW, 2, "meta.json", write("data/meta.json", b"\xff\xfe")),
    train(NEW, 2, "meta.json", write("data/meta.json", b'{"a":' * 10**5)),
    train(NEW, 2, "meta.json", folder("data/meta.json")), train(NEW, 2, "meta.json", fifo("data/meta.json")),
    train(NEW, 2, "splits.'train'.files[0].name", edit("data/meta.json", splits__train__files=[{"name": "../x"}])),
    train(NEW, 2, "vocab_size", edit("data/meta.json", vocab_size=-1)),
    train(NEW, 2, "bytes_per_token", edit("data/meta.json", splits__val__bytes_per_token="x")),
    train(NEW, 2, "train_000000.bin: truncated", cut("data/train_000000.bin", 3000)),
    train(NEW, 2, "train_000000.bin: altered", flip("data/train_000000.bin", 2000)),
    train(NEW, 2, "train_000000.bin", fifo("data/train_000000.bin")),
    train(NEW, 2, "train_000000.bin", link("data/train_000000.bin", "/not/there")),
    # prepare_data.py
    data("new", 1, "wanted python", lambda root: shutil.rmtree(root / "text_data")),
    data("new", 1, "a.txt: not UTF-8", write("text_data/a.txt", b"caf\xe9")),
    data("new", 1, "x.txt", fifo("text_data/x.txt")),
    data("new", 1, "line 1 is not JSON", write("text_data/x.jsonl", b"[" * 10**5)),
    data("other", 1, "use --overwrite=True"),
    data("data", 1, "missing, or altered", flip("data/train_000000.bin", 2000)),
    data("theirs", 2, "is no prepared corpus"), data("link", 2, "is no prepared corpus"),
    data("thesis.txt", 2, "thesis.txt"), data("run/step-00000004/new", 2, "lies inside the checkpoint"),
    data("theirs --overwrite=True", 2, "not known to be a corpus", write("theirs/meta.json", '{"splits": {}}')),
    data("link --overwrite=True", 2, "is a link"),
    data("data --overwrite=True", 2, "notes.txt", write("data/notes.txt", "x")),
    data("data --overwrite=True", 2, "train_000000.bin", link("data/train_000000.bin", "{root}/thesis.txt")),
    *(
        data("data --overwrite=True", 2, f"data.{suffix}", damage)
        for suffix in ("old", "tmp")
        for damage in (link(f"data.{suffix}", "{root}/theirs"), write(f"data.{suffix}", "x"),
                       write(f"data.{suffix}/train_000000.bin", "x"), copytree("run", f"data.{suffix}"))
    ),
    data("new", 2, "new.old", write("new.old/chapter.txt", "x")),
    data("new", 1, "journal.json", also(copytree("data", "new.tmp"), write("new.tmp/journal.json", '{"parts": 1}'))),
    # sample.py
    Row("sample", "{root}/nowhere", 2, "wanted a run folder"), Row("sample", "", 2, "wanted one run folder"),
    Row("sample", "{root}/run", 2, "none of its 2 checkpoints", BOTH),
    Row("sample", "{root}/run", 2, "norm.weight holds what is no number", nan_weights),
    Row("sample", "{root}/run", 2, "tokenizer is not the one", other_tokenizer),
    Row("sample", "{root}/run --data_dir={root}/other", 2, "tokenizer is not the one"),
    Row("sample", "{root}/run", 2, "tokenizer.json: altered", flip("data/tokenizer.json", 30)),
    Row("sample", "{root}/run", 2, "tokenizer is not the one", edit("data/tokenizer.json", ranks=[["YQ==", 0]])),
    Row("sample", "{root}/run", 2, "tokenizer.json", fifo("data/tokenizer.json")),
    Row("sample", "{root}/run", 2, "no prepared corpus", lambda root: shutil.rmtree(root / "data")),
    Row("sample", "{root}/run/step-00000004", 2, "settings.n_layer", edit(f"{S4}/state.json", settings__n_layer="1")),
    Row("sample", "{root}/run/step-00000004", 2, "n_layer=7", edit(f"{S4}/state.json", settings__n_layer=7)),
    Row("sample", "{root}/run/step-00000004", 2, "does not fit", edit(f"{S4}/state.json", settings__n_embd=2**20)),
    Row("sample", "{root}/run --prompt=FILE:{root}/nowhere", 2, "cannot be read"),
    Row("sample", "{root}/run --prompt=FILE:{root}/theirs", 2, "cannot be read"),
    Row("sample", "{root}/run --prompt=FILE:{root}/weights.safetensors", 2, "wanted UTF-8"),
    Row("sample", "{root}/run --prompt=FILE:/dev/zero", 2, "wanted at most"),
    # eval.py
    Row("eval", "{root}/nowhere", 2, "wanted a run folder"), Row("eval", "", 2, "no checkpoint given"),
    Row("eval", "{root}/run --tasks=chess", 2, "unknown task 'chess'", may_change="run/eval"),
    Row("eval", "{root}/run --tasks=loss", 2, "none of its 2 checkpoints", BOTH),
    # figures.py
    Row("figures", "", 2, "wanted run folders"), Row("figures", "{root}/theirs", 2, "not a run folder"),
    Row("figures", "{root}/run --out={root}/thesis.txt", 2, "wanted a name that ends in"),
    Row("figures", "{root}/run --out={root}/x.png", 2, "x.png", write("x.png", "x")),
    Row("figures", "{root}/run --out={root}/x.png", 2, "is a link", link("x.png", "{root}/thesis.txt")),
    Row("figures", "{root}/run --out={root}/nowhere/x.png", 2, "no folder"),
    Row("figures", "{root}/run --out={root}/run/step-00000004/x.png", 2, "lies inside the checkpoint"),
    draw(2, "metrics.jsonl:2", write("run/metrics.jsonl", '{"step": 0}\n[]\n')),
    draw(2, "metrics.jsonl:1: loss", write("run/metrics.jsonl", '{"step": 0, "loss": "x"}\n')),
    draw(2, "metrics.jsonl", fifo("run/metrics.jsonl")),
    draw(2, "no evaluation", write("run/metrics.jsonl", '{"step": 0}\n')),
    draw(2, "settings.residual", edit("run/config.json", settings__residual=3)),
    draw(2, "config.json", write("run/config.json", "null")),
    draw(2, "maps.npz", write("run/maps.npz", "PK\3\4")), draw(2, "maps.npz", folder("run/maps.npz")),
    draw(0, "", write("run/metrics.jsonl", DIVERGED + '{"step": 4, "half writ')),
    draw(0, "", write("run/metrics.jsonl", '{"step": 0, "val_loss": null}\n')),
    # tools/drill.py
    Row("tools.drill", "--folder={root}/theirs", 2, "not known to be a drill"),
    Row("tools.drill", "--folder={root}/link", 2, "is a link"), Row("tools.drill", "--folder={root}/run", 2, "run"),
    Row("tools.drill", "--folder={root}/thesis.txt", 2, "is a file"), Row("tools.drill", "--minutes=0", 2, "minutes=0"),
    Row("tools.drill", "--folder={root}/drill", 2, "chapter.txt",
        also(lambda root: owned.make(str(root / "drill"), "drill"), write("drill/data/chapter.txt", "x"))),
]  # fmt: skip


def test_the_table_is_as_long_as_it_should_be():
    programs = {"train", "prepare_data", "checkpoint", "sample", "eval", "figures", "tools.drill"}
    assert len(ROWS) >= 80 and {row.program for row in ROWS} >= programs


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.program} {row.argv[-30:]} {row.named}".replace("\0", "0"))
def test_a_mistake_is_one_line_and_loses_nothing(world, tmp_path, row):
    root = copy(world, tmp_path)
    row.damage(root)
    before = lies_there(root)
    argv = row.argv.format(root=root).split(" ") if row.argv else []
    code, said = call(row.program, [*(TINY if row.program == "train" else []), *argv])
    after = lies_there(root)
    assert code == row.code, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1] if said.strip() else ""
    assert row.named in last and (code == 0 or last.startswith("error: ")), said
    assert [line for line in said.splitlines() if line.startswith("error:")] == ([last] if code else [])
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert not {name for name in changed if not re.fullmatch(row.may_change, name)}


# -- real files with one thing changed in them ------------------------------------------------------------------------

FUZZ = settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
some_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def places(value, path=()):
    """Paths to some of the values in a JSON value: of a list only the first."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def changed(value, draw):
    """A copy of a JSON value in which one value is another, or gone; as bytes, perhaps with one byte changed."""
    value = json.loads(json.dumps(value))
    *inner, last = draw(st.sampled_from([p for p in places(value) if p]))
    at = value
    for key in inner:
        at = at[key]
    if draw(st.booleans()) or isinstance(at, list):
        at[last] = draw(some_json)
    else:
        del at[last]
    content = bytearray(json.dumps(value).encode())
    if draw(st.integers(0, 3)) == 0:
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


def use_checkpoint(root):
    checkpoint.load_model(str(root / "run" / "step-00000004"))
    run_folder.same_run(str(root / "run"), str(root / "run" / "step-00000004"), json.loads(CONFIG_JSON[root]))


def use_corpus(root):
    Corpus(str(root / "data"), "train", 16).sequences([0])
    load_tokenizer(str(root / "data"))


def use_figures(root):
    """All but the rendering, which takes a second."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            runs = [figures.Run(str(root / "run"))]
            figures.print_table(runs)
            figures.draw(runs)
    except SystemExit as e:
        assert e.code == 2
        raise DataError(said.getvalue().strip().removeprefix("error: ")) from None
    finally:
        figures.plt.close("all")


def use_run(root):
    run_folder.same_run(str(root / "run"), None, json.loads(CONFIG_JSON[root]))


CONFIG_JSON = {}
READERS = {
    f"{S4}/state.json": use_checkpoint, f"{S4}/manifest.json": use_checkpoint, "data/meta.json": use_corpus,
    "data/tokenizer.json": use_corpus, "run/config.json": use_run, "run/metrics.jsonl": use_figures,
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_a_real_file_with_one_thing_changed_is_used_or_refused_in_one_line(world, tmp_path, name):
    root = copy(world, tmp_path)
    CONFIG_JSON[root] = (root / "run" / "config.json").read_text()
    lines = (root / name).read_text().splitlines() if name.endswith("l") else [(root / name).read_text()]
    refused = []

    @FUZZ
    @given(st.data())
    def one(data):
        content = [line.encode() for line in lines]
        at = data.draw(st.integers(0, len(lines) - 1))
        content[at] = changed(json.loads(lines[at]), data.draw)
        (root / name).write_bytes(b"\n".join(content) + b"\n")
        if name.endswith("state.json"):
            sign((root / name).parent)
        if name.endswith("tokenizer.json"):
            edit("data/meta.json", tokenizer_sha256=sha256_file(root / name))(root)
        try:
            READERS[name](root)
        except KNOWN as e:
            refused.append(str(e))
            assert "\n" not in str(e) and len(str(e)) < 1500

    one()
    assert len(refused) >= 5


def test_names_that_are_not_utf8(world, tmp_path):
    """A corpus may have one; a run may not, since safetensors would not read it again."""
    root = copy(world, tmp_path)
    run, data = (os.fsdecode(os.fsencode(root) + name) for name in (b"/run\xff", b"/data\xff"))
    os.rename(root / "data", data)
    codes, output = train_in_fork([*TINY, f"--data_dir={data}", f"--out_dir={root}/new"], str(root / "log"))
    assert codes == [0], output
    assert call("sample", [f"{root}/new", "--max_new_tokens=2"])[0] == 0
    code, said = call("train", [*TINY, f"--data_dir={data}", f"--out_dir={run}"])
    assert code == 2 and "wanted a name in UTF-8" in said and not os.path.exists(run)
    os.rename(root / "new", run)
    assert call("checkpoint", [run])[0] == 0 and call("figures", [run, f"--out={root}/x.png"])[0] == 0
    code, said = call("sample", [run])
    assert code == 2 and said.count("\nerror:") + said.startswith("error:") == 1


@pytest.mark.parametrize("program, flags", [("figures", ["--out={root}/x.png"]), ("checkpoint", ["{root}/x"])])
def test_a_full_disk_leaves_nothing_half_written(world, tmp_path, program, flags):
    root = copy(world, tmp_path)
    before, old = lies_there(root), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))
    try:
        code, said = call(program, [str(root / "run"), *(flag.format(root=root) for flag in flags)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert code in (1, 2) and f"{root}/x" in said and "File too large" in said and said.count("\nerror:") <= 1
    assert lies_there(root) == before


def test_a_shard_altered_in_the_middle_is_noticed_in_the_background(world, tmp_path, monkeypatch):
    """Its first and last bytes are looked at when it is opened, all of it then."""
    import data

    root = copy(world, tmp_path)
    monkeypatch.setattr(data, "MEGABYTE", 1 << 10)
    meta = json.loads((root / "data" / "meta.json").read_text())
    path = root / "data" / "train_000000.bin"
    meta["splits"]["train"]["files"][0]["ends_sha256"] = data.ends_sha256(path)
    (root / "data" / "meta.json").write_text(json.dumps(meta))
    flip("data/train_000000.bin", path.stat().st_size // 2)(root)
    corpus = Corpus(str(root / "data"), "train", 16)
    corpus.check_in_background()
    corpus.thread.join(20)
    with pytest.raises(DataError, match="train_000000.bin: altered since it was written: wanted sha256"):
        corpus.sequences([0])


@pytest.mark.parametrize("damage", [cut("data/train_000000.bin", 2000), flip("data/train_000000.bin", 2000)])
def test_a_shard_cut_or_written_to_while_it_is_in_use_is_one_line(world, tmp_path, damage):
    root = copy(world, tmp_path)
    corpus = Corpus(str(root / "data"), "train", 16)
    corpus.sequences([0, corpus.n_sequences - 1])
    damage(root)
    with pytest.raises(DataError, match="train_000000.bin: was altered or cut since this program began"):
        corpus.sequences([0])
