"""tools/gpu_hour.py on a CPU: the whole script, interpreted, with pretended times; stages that fail, or are late."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import records
from owned import NotOurs
from tests import conftest
from tests.kernel_cases import needs_triton
from tools import gpu_hour

pytestmark = needs_triton

PRETEND = """
import sys, time, torch
torch.set_num_threads(1)
from tools import gpu_hour as g, kernel_report as k
from model import GPT, GPTConfig

TINY = dict(vocab_size=96, seq_len=16, n_layer=2, n_embd=32, n_head=2, kv_lora_rank=16, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=8, intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=16)
g.DEVICE = "cpu"
g.SIZES |= dict(C=64, tokens=20, ladder=(16, 32), copy=4096, gemm=64, heads=((24, 16, 2, 16),), blocks_3b=2,
                vocab_3b=64, steps=2, train=(4, 4), jobs=2)
g.settings_of = lambda path: (GPTConfig(**TINY), 1)
g.TRAIN_FLAGS = [f"--{name}={value}" for name, value in TINY.items() if name != "vocab_size"]
g.TRAIN_FLAGS += ["--micro_batch_size=2", "--lr=0.05", "--warmup_steps=1"]
g.synchronise = lambda: None
pretended = iter(range(1, 10**6))
def pretend(f, *_):
    f()
    return next(pretended) / 10
g.graph_ms = g.eager_ms = g.peak_GB = pretend
g.card = lambda: {"card": "none, pretended"}
torch.compile = lambda f, **_: f
GPT.compile_sublayers = lambda self: None
k.kernel_times = lambda tensors: {"streams_kernel": 0.5}
k.candidates = lambda row: [(*row[:2], 4, 1), (*row[:2], 4, 2), (*row[:2], 2, 1)]
def compile_row(kernel, row, C, n, T):
    return {(4, 1): 0, (4, 2): 40, (2, 1): None}[row[2:]]
k.compile_row = compile_row
"""
RUN = "\nwith k.hardware_arithmetic():\n    g.program.run(g.main, g.owned.NotOurs, g.RecordError)\n"


def run(code, *flags):
    """The script after some code, in a process of its own, which forks before it has computed anything."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PRETEND + code + RUN, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All stages, `tests` on a file that has one test for a GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "test_one.py").write_text("import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    pass\n")
    (folder / "gpu.json").write_text('{"made_by": "mhc", "what": "gpu", "stages": {}}')  # one of ours is replaced
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    done = run(f"g.TESTS = ['-c', {str(folder / 'pytest.ini')!r}, {str(folder)!r}]", f"--out={folder}/gpu.json")
    return done, records.read_json(str(folder / "gpu.json"), records.GPU_REPORT)["stages"], folder


def test_every_stage_leaves_its_numbers(whole):
    done, stages, _ = whole
    assert done.returncode == 0 and {s["status"] for s in stages.values()} == {"done"}, done.stdout + done.stderr
    assert list(stages) == "versions ceilings boundary attention kernels steps training tests retune".split()
    assert len(stages["boundary"]["records"]) == 7 and all(r["good"] for r in stages["boundary"]["records"])
    timed = {(r["what"], r["way"], r["tokens"]) for r in stages["kernels"]["records"] if "way" in r}
    names, ways = ("mHC", "single-pass", "HC"), ("forward", "forward + backward")
    assert timed >= {(name, way, T) for name in names for way in ways for T in (16, 32)}
    assert {T for name, _, T in timed if name == "twin compiled"} == {32}  # compiled for one number of tokens
    assert all("share" in r for r in stages["kernels"]["records"] if "way" in r)
    forms = {(r["what"], r["sublayers"], r["form"]) for r in stages["steps"]["records"] if "graph_ms" in r}
    cases = ("gpt_124m", "not compiled"), ("3B blocks", "not compiled"), ("gpt_124m", "compiled")
    assert forms == {(*case, form) for case in cases for form in ("baseline", "HC", "mHC", "single-pass")}
    (training,) = stages["training"]["records"]
    assert training["steps"] == 4 and training["last_loss"] < training["first_loss"]
    summaries = [r["summary"] for r in stages["tests"]["records"]]
    assert len(summaries) == 2 and all("1 passed" in s for s in summaries)  # a process a share; no conftest.py there


def test_spillers_and_what_cannot_be_compiled_are_not_timed(whole):
    tuned = whole[1]["retune"]["records"]
    assert [r["what"] for r in tuned] == ["streams", "read", "read_backward", "phi_backward", "streams_backward"]
    assert all(r["tried"] == 2 and r["dropped"] == 2 or r["tried"] == 1 and r["dropped"] == 2 for r in tuned), tuned


def refused(monkeypatch, *flags):
    """What main() raises before it starts a stage."""
    monkeypatch.setattr(sys, "argv", ["gpu_hour.py", *flags])
    for name in ("out", "stages", "seconds"):
        monkeypatch.setattr(gpu_hour, name, getattr(gpu_hour, name))  # put back afterwards
    with pytest.raises((SystemExit, NotOurs)) as e:
        gpu_hour.main()
    return e.value


def test_a_strangers_file_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "gpu.json").write_text('{"mine": 1}')
    assert "was not made by this program" in str(refused(monkeypatch, f"--out={tmp_path}/gpu.json"))
    assert (tmp_path / "gpu.json").read_text() == '{"mine": 1}'


def test_an_unknown_stage_is_refused(tmp_path, monkeypatch, capsys):
    assert refused(monkeypatch, f"--out={tmp_path}/gpu.json", "--stages=kernel").code == 2
    assert "wanted some of versions" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_without_a_gpu_nothing_starts_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_hour.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=7))
    assert refused(monkeypatch, f"--out={tmp_path}/gpu.json").code == 2
    assert "wanted a GPU: torch" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_tests_for_a_gpu_are_looked_for_in_no_other_files():
    """Others import transformers or tokenizers, without which pytest would run none."""
    names = [Path(path).name for path in gpu_hour.gpu_tests()]
    assert "test_sinkhorn_kernel.py" in names and "test_convert.py" not in names


def test_shares_of_the_tests_make_all_of_them(monkeypatch):
    config, shares = SimpleNamespace(getoption=lambda name: "gpu"), []
    for i in range(3):
        monkeypatch.setenv("SHARE_OF_TESTS", f"{i}/3")
        shares.append(items := list(range(10)))
        conftest.pytest_collection_modifyitems(config, items)
    assert shares == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


def test_a_boundary_that_gives_no_number_is_the_worst_of_all():
    twin = lambda x, y: (x + y, x * y)  # noqa: E731
    tensors = [torch.randn(5), torch.randn(5)]
    gpu_hour.check_form("sum", twin, twin, tensors)
    with pytest.raises(RuntimeError, match="error inf, the twin's .*, finite: False"):
        gpu_hour.check_form("sum", lambda x, y: (x + y, x * math.nan * y), twin, tensors)


def test_nothing_starts_when_the_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_hour, "need_gpu", lambda: None)
    monkeypatch.setattr(gpu_hour, "heard", {"made_by": "mhc", "what": "gpu", "stages": {}})
    assert refused(monkeypatch, f"--out={tmp_path}/gpu.json", "--seconds=0.5", "--stages=versions").code == 1
    (entry,) = json.loads((tmp_path / "gpu.json").read_text())["stages"].values()
    assert entry == {"status": "skipped", "seconds": 0.0, "error": "no time was left", "records": []}


TROUBLE = """
def broken():
    '''Fails after its first record.'''
    g.say(what="before")
    raise ValueError("something is wrong")
def slow():
    '''Starts others, and takes too long.'''
    g.say(what="before")
    g.subprocess.run(["sleep", "60"])
def crashes():
    '''Is killed.'''
    g.os.kill(g.os.getpid(), 9)
def good():
    '''Runs after them.'''
    g.say(what="after", seen=len(g.said("slow", what="before")), error=float("nan"))
g.STAGES = {broken: 20, slow: 1, crashes: 20, g.tests: 20, good: 20}
g.importlib.util.find_spec = lambda name: None
"""


def test_a_stage_that_fails_or_takes_too_long_costs_its_own_numbers_alone(tmp_path):
    done = run(TROUBLE, f"--out={tmp_path}/gpu.json")
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert done.returncode == 1 and "not done: broken, slow, crashes" in done.stderr
    assert {name: s["status"] == "done" for name, s in stages.items()} == {
        "broken": False, "slow": False, "crashes": False, "tests": True, "good": True
    }  # fmt: skip
    assert "something is wrong" in stages["broken"]["error"] and stages["slow"]["error"] == "its 1 seconds were over"
    assert stages["broken"]["records"] == stages["slow"]["records"] == [{"what": "before"}]
    assert stages["slow"]["seconds"] < 10 and "killed, or crashed" in stages["crashes"]["error"]
    assert "NOT RUN" in stages["tests"]["records"][0]["note"]
    assert stages["good"]["records"] == [{"what": "after", "seen": 1, "error": None}]
