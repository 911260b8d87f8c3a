"""train.py from the command line: a whole run in little, its records, its figures, and what it refuses."""

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mhc
import program
import run_folder
import train
from data import Corpus, DataError
from model import GPT
from names import ELSEWHERE
from parallel import start
from tests.ranks import train_in_fork
from tokenizer import load_tokenizer

TINY = (
    "--seq_len=32 --n_layer=2 --n_embd=32 --n_head=2 --kv_lora_rank=16 --qk_nope_head_dim=8 --qk_rope_head_dim=8 "
    "--v_head_dim=8 --intermediate_size=64 --n_routed_experts=4 --num_experts_per_tok=2 --moe_intermediate_size=16 "
    "--batch_size=4 --micro_batch_size=2 --lr=3e-3 --warmup_steps=2 --eval_sequences=4 --device=cpu --n_streams=4"
).split()


def call(*command, ok=True):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # as a user would call it
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300, env=env)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A corpus and three runs of six steps."""
    root = tmp_path_factory.mktemp("train")
    (root / "text.txt").write_text("\n".join(f"{i} times {j} is {i * j}." for i in range(60) for j in range(40)))
    (root / "more.txt").write_text("\n".join(f"{i} plus {j} is {i + j}." for i in range(60) for j in range(40)))
    call("prepare_data.py", f"--dataset={root}", "--tokenizer=bytes", f"--data_dir={root}/data", "--val_fraction=0.5")
    for residual in ("baseline", "hc", "mhc"):
        flags = [*TINY, f"--data_dir={root}/data", f"--out_dir={root}/{residual}", f"--residual={residual}"]
        flags += ["--max_steps=6", "--eval_interval=3"] + ["--micro_batch_size=0"] * (residual == "baseline")
        if residual == "hc":
            call("train.py", *flags)  # as a user would
            continue
        codes, output = train_in_fork(flags, str(root / f"{residual}.log"))
        assert codes == [0], output
    return root


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_records_every_step_and_every_evaluation(runs):
    for residual in ("baseline", "hc", "mhc"):
        steps = [r for r in records(runs / residual) if "loss" in r]
        evals = [r for r in records(runs / residual) if "val_loss" in r]
        assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6] and [r["step"] for r in evals] == [0, 3, 6]
        assert all(r["grad_norm"] > 0 and r["expert_load"] >= 1 and r["lr"] > 0 for r in steps)
        assert evals[-1]["val_loss"] < evals[0]["val_loss"] and abs(evals[0]["val_loss"] - math.log(257)) < 0.1
        assert evals[0]["bits_per_byte"] == pytest.approx(evals[0]["val_loss"] / math.log(2), rel=0.01)  # of bytes
        assert ("composite_bwd_min" in evals[-1]) == (residual != "baseline")
    assert len(load_tokenizer(str(runs / "data")).encode("abc")) == 3


def test_mhc_gains_are_one_and_maps_are_kept(runs):
    last = records(runs / "mhc")[-1]
    np.testing.assert_allclose(last["composite_fwd_max"] + last["single_fwd_min"], 1, atol=1e-5)
    maps = np.load(runs / "mhc" / "maps.npz")
    assert "sublayers 1-4" in maps and maps["sublayer 1"].shape == (4, 4)


def test_a_run_says_what_made_it(runs):
    record = json.loads((runs / "hc" / "config.json").read_text())
    assert record["settings"]["residual"] == "hc" and record["settings"]["vocab_size"] == 257
    assert any("train.py" in word for word in record["command"]) and "commit" in record


def test_figures_draw_and_print_one_row_a_run(runs):
    folders = [runs / r for r in ("baseline", "hc", "mhc")]
    done = call("figures.py", *folders, f"--out={runs}/report.png")
    rows = [line.split() for line in done.stdout.splitlines()]
    header = "variant params val_loss bits_per_byte step_ms peak_MB gain_fwd gain_bwd".split()
    table = rows[rows.index(header) + 1 :][:3]
    assert [row[0] for row in table] == ["baseline", "hc", "mhc"] and all(len(row) == 8 for row in table)
    assert float(table[2][2]) == pytest.approx(records(runs / "mhc")[-1]["val_loss"], abs=1e-4)
    for figure in ("loss", "gains", "maps"):
        call("figures.py", *folders, f"--figure={figure}", f"--out={runs}/{figure}.png")
        assert (runs / f"{figure}.png").stat().st_size > 10_000


def test_figures_of_a_run_in_progress(runs, tmp_path):
    run = tmp_path / "going"
    run.mkdir()
    (run / "config.json").write_text((runs / "mhc" / "config.json").read_text())
    lines = (runs / "mhc" / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])  # its last line half written
    call("figures.py", run, f"--out={tmp_path}/report.png")
    assert "not a run folder" in call("figures.py", tmp_path, ok=False).stderr


MISTAKES = [  # flags; exit code; words
    (["--micro_batch_size=3"], 2, "batch_size=4 is not a multiple of micro_batch_size=3 x 1 process"),
    (["--batch_size=1000000000001"], 2, "batch_size=1000000000001: wanted a number of at least 1 and at most 1e+06"),
    (["--batch_size=999983"], 2, "the nearest that fit: batch_size=999982 or 999984, or micro_batch_size=1"),
    (["--data_dir=nowhere"], 2, "nowhere"), (["--vocab_size=100"], 2, "vocab_size=100"),
    (["--data_dir="], 2, "data_dir='': wanted a folder, got nothing"), (["--out_dir= "], 2, "out_dir=' ': wanted a f"),
    (["--collapse=head", "--n_streams=1"], 2, "collapse='head'"),
    (["--recompute_block=99"], 2, "command line: recompute_block=99: wanted -1 for the best, or 1 to 4"),
    (["--qk_rope_head_dim=7"], 2, "command line: qk_rope_head_dim=7"), (["--decay_at=0.5"], 2, "line: decay_at"),
    (["--decay_rates=a,b"], 2, "decay_rates='a,b'"), (["--decay_at=0.8,nan"], 2, "decay_at='0.8,nan'"),
    (["--residual=resnet"], 2, "command line: residual='resnet': wanted one of 'baseline', 'hc', 'mhc'"),
    (["--num_experts_per_tok=9"], 2, "num_experts_per_tok=9"), (["--impl=triton"], 2, "impl='triton' cannot run"),
    (["--n_layer=1e5"], 2, "n_layer=100000: wanted at least 1 and at most 1000"), (["--n_layer=0"], 2, "n_layer=0"),
    (["--n_streams=65"], 2, "n_streams=65"), (["--lr=1e38"], 2, "lr=1e+38: wanted a number above 0 and at most 10"),
    (["--alpha_init=1e300"], 2, "alpha_init=1e+300: wanted at least 0 and at most 100"),
    (["--rope_theta=0"], 2, "rope_theta=0.0"), (["--rank_timeout=1e30"], 2, "rank_timeout"),
    (["--seed=-1"], 2, "seed=-1"), (["--seed=99999999999999999999"], 2, "seed"), (["--init_std=-1"], 2, "init_std=-1"),
    (["--n_embd=1e5", "--moe_intermediate_size=1e6"], 2, "the run needs about"),
    (["--parallel=ddp"], 2, "parallel='ddp': wanted several processes"), (["--log=wandb"], 2, "pip install wandb"),
    (["--reduce_dtype=bfloat16"], 2, "command line: reduce_dtype='bfloat16': only parallel='fsdp'"),
    (["--shard_size=2"], 2, "command line: shard_size=2 with parallel='none'"),
    (["--learning_rate=1"], 2, "unknown setting 'learning_rate'; here it is lr"),
    (["--gradient_accumulation_steps=4"], 2, "there is none: batch_size counts all sequences of an optimizer step"),
    (["--compile=maybe"], 2, "command line: compile='maybe': wanted 'auto', True or False"),
    (["--compile=True"], 2, "torch needs a C++ compiler here and 'no-such-compiler' is not found"),
]  # fmt: skip


def start_here(monkeypatch, *flags):
    """train.main() with these flags, in this process."""
    for name, value in vars(train).copy().items():
        if type(value) in (bool, int, float, str):
            monkeypatch.setattr(train, name, value)  # put back afterwards
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *flags])
    train.main()


@pytest.mark.parametrize("flags,code,words", MISTAKES)
def test_impossible_runs_end_in_one_line(runs, flags, code, words, monkeypatch, capsys):
    """In this process, where nothing has to be imported again."""
    monkeypatch.setattr(mhc, "INTERPRETED", False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(SystemExit) as e:
        start_here(monkeypatch, f"--data_dir={runs}/data", f"--out_dir={runs}/never", *flags)
    said = capsys.readouterr().err
    assert e.value.code == code and words in said and said.count("\n") == 1 and said.startswith("error: ")
    assert not (runs / "never").exists()


def test_a_compiler_that_fails_is_one_line(runs, monkeypatch, capsys):
    from torch._inductor.exc import CppCompileError

    def fails(*args):
        raise CppCompileError(["g++", "-O3"], "a thousand lines\nof warnings\n" * 500)

    monkeypatch.setattr(train, "train", fails)
    with pytest.raises(SystemExit, match="^error: compile=auto: torch could not compile the sublayers: .*") as e:
        start_here(monkeypatch, f"--data_dir={runs}/data")
    assert "\n" not in str(e.value) and "CppCompileError" in repr(e.value.__context__)
    monkeypatch.setattr(run_folder.Stop, "heard", signal.SIGINT)  # which has stopped the compiler
    with pytest.raises(program.Stopped, match="stopped by Ctrl-C"):
        start_here(monkeypatch, f"--data_dir={runs}/data")


@pytest.mark.parametrize("value, on", [("auto", ["cuda"]), ("true", ["cuda", "cpu"]), ("False", [])])
def test_sublayers_are_compiled_on_cuda_or_as_the_user_says(value, on, monkeypatch):
    monkeypatch.setattr(train, "compile", value)
    assert [device for device in ("cuda", "cpu") if train.compiles(device)] == on


def test_a_run_says_whether_it_is_compiled(runs):
    assert "cpu, float32, sublayers not compiled, residual mhc (impl eager)" in (runs / "mhc.log").read_text()


def test_a_micro_batch_of_0_is_the_largest_that_fits(runs):
    assert "micro_batch_size = 4, the largest that plan.py finds to fit in" in (runs / "baseline.log").read_text()
    assert json.loads((runs / "baseline" / "config.json").read_text())["settings"]["micro_batch_size"] == 4


def test_every_other_name_stands_for_a_setting_or_says_why_not():
    settings = {k for k, v in vars(train).items() if type(v) in (bool, int, float, str)}
    assert not settings & ELSEWHERE.keys()
    for ours in ELSEWHERE.values():
        assert ours.split(",")[0] in settings or ours.startswith("there is none")


def test_a_slow_step_gets_a_line(capsys):
    state, step = {"skipped": 0, "skipped_in_a_row": 0}, dict(loss=1.0, norm=1.0, load={}, peak_rate=None)
    for times, slow in (([1.0, 1.0, 11.0], True), ([1.0, 1.0, 9.0], False), ([11.0], False)):
        train.report_step(3, step_times=times, records=SimpleNamespace(write=dict), state=state, **step)
        assert ("slow: step 3 took 11.0 s, 11 times the median" in capsys.readouterr().out) == slow


def test_mfu_is_the_share_of_the_rate_at_the_peak(capsys, monkeypatch):
    monkeypatch.setattr(train, "batch_size", 10)
    monkeypatch.setattr(train, "seq_len", 100)
    state = {"skipped": 0, "skipped_in_a_row": 0}
    train.report_step(1, 1.0, 1.0, {}, [0.5], 8000.0, SimpleNamespace(write=dict), state)
    assert "2,000 tokens/s  mfu 25.0%" in capsys.readouterr().out


def test_batches_are_read_ahead_and_are_those_of_their_step(runs, monkeypatch):
    for name, value in dict(batch_size=6, micro_batch_size=2, max_steps=5, seed=3).items():
        monkeypatch.setattr(train, name, value)
    corpus, ranks, read = Corpus(str(runs / "data"), "train", 32), start(), []
    batches = train.Batches(corpus, ranks)
    inner = batches.read
    monkeypatch.setattr(batches, "read", lambda step: read.append(step) or inner(step))
    for step in (2, 3, 4):  # as a resumed run would
        wanted = train.order(3, step * 6, 6, corpus.n_sequences)
        assert all(map(torch.equal, batches.of(step), corpus.sequences(wanted)))
    batches.pool.shutdown()
    assert read == [2, 3, 4]  # each once, and nothing behind the last

    monkeypatch.setattr(batches, "ranks", SimpleNamespace(device=torch.device("cuda:1"), share=ranks.share))
    pinned, thread = [], []
    monkeypatch.setattr(torch.cuda, "set_device", thread.append)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t)
    both = inner(2)
    assert pinned[0] is both and both.shape == (2, 6, 32) and thread == [torch.device("cuda:1")]


def test_a_shard_that_is_altered_ends_the_step_that_wants_it(runs, monkeypatch):
    corpus = Corpus(str(runs / "data"), "train", 32)
    batches = train.Batches(corpus, start())
    batches.of(0)
    batches.ahead[1].result()
    corpus.vocab_size = 3  # less than what the shards hold
    batches.of(1)
    with pytest.raises(DataError, match="a shard was altered"):
        batches.of(2)


def schedule(monkeypatch, **settings):
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)
    return [train.learning_rate(s) for s in range(settings["max_steps"])]


def test_the_papers_step_schedule(monkeypatch):
    lrs = schedule(monkeypatch, lr=1.0, warmup_steps=20, max_steps=100, lr_schedule="step")
    assert lrs[0] == 0.05 and lrs[19] == lrs[20] == lrs[79] == 1.0
    assert lrs[80] == lrs[89] == 0.316 and lrs[90] == lrs[99] == 0.1


def test_cosine_and_constant_schedules(monkeypatch):
    lrs = schedule(monkeypatch, lr=2.0, warmup_steps=10, max_steps=110, lr_schedule="cosine", min_lr_ratio=0.1)
    assert lrs[9] == lrs[10] == 2.0 and lrs[60] == pytest.approx(1.1) and 0.2 < lrs[-1] < 0.21
    assert all(a >= b for a, b in zip(lrs[10:], lrs[11:], strict=False))
    assert schedule(monkeypatch, lr=2.0, warmup_steps=0, max_steps=5, lr_schedule="constant") == [2.0] * 5


def test_static_terms_and_norms_take_no_weight_decay():
    from tests.test_residual import make

    for residual in ("hc", "mhc"):
        model = make(residual=residual)
        names = {p: name for name, p in model.named_parameters()}
        groups = train.make_optimizer(model).param_groups
        decayed, not_decayed = (
            {names[p] for g in groups if (g["weight_decay"] > 0) == takes for p in g["params"]}
            for takes in (True, False)
        )
        ends = {name.rsplit(".", 1)[-1] for name in not_decayed}
        assert ends == {"alpha", "b", "weight"} and all("norm" in n for n in not_decayed if n.endswith("weight"))
        assert any(n.endswith((".phi", ".theta")) for n in decayed) and len(decayed) + len(not_decayed) == len(names)


@pytest.mark.parametrize("residual,collapse", [("hc", "sum"), ("mhc", "head"), ("baseline", "sum")])
def test_alpha_and_b_of_the_maps_move_by_maps_lr_scale_times_and_nothing_else_does(monkeypatch, residual, collapse):
    from tests.test_residual import make, tokens

    moved = {}
    for scale in (1.0, 30.0):
        monkeypatch.setattr(train, "maps_lr_scale", scale)
        model = make(residual=residual, collapse=collapse)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = train.make_optimizer(model)
        model(tokens(), tokens(1))[1].backward()
        train.optimizer_step(model, optimizer, 50, 1.0, start())
        moved[scale] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    for name, step in moved[1.0].items():
        scaled = name.endswith(("residual.alpha", "residual.b"))  # not collapse_head.alpha, not phi and theta
        torch.testing.assert_close(moved[30.0][name], step * (30 if scaled else 1), rtol=1e-3, atol=1e-5)
        assert step.abs().max() > 0 or residual == "hc" and name.endswith("alpha"), name  # theta is 0 at the start


class Casts(TorchDispatchMode):
    """Counts how often each of the tensors `of` is cast to bf16."""

    def __init__(self, of):
        super().__init__()
        self.times = {p.data_ptr(): 0 for p in of}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs["dtype"] == torch.bfloat16:
            if args[0].untyped_storage().data_ptr() in self.times:
                self.times[args[0].untyped_storage().data_ptr()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["none", "full"])
def test_every_matrix_is_cast_once_a_step_and_micro_batches_add_up_in_fp32(mode, monkeypatch):
    """And the gradients are to the bit what they are when autocast casts them in every micro-batch."""
    from recompute import apply
    from tests.test_residual import make, tokens

    monkeypatch.setattr(train, "dtype", "bfloat16")
    monkeypatch.setattr(train, "micro_batch_size", 2)
    model, batch = make(q_lora_rank=8), SimpleNamespace(of=lambda step: (tokens(0, 6), tokens(1, 6)))
    apply(model, mode)
    matrices, found = [module._parameters[name] for module, name in model.matrices()], []
    assert len(matrices) == 2 * 5 + 3 + 3 + 3  # MLAs, the dense FFN, the experts, those that are shared
    anew = lambda model: nullcontext()  # noqa: E731
    for narrow, one_head in ((train.narrow_weights, GPT.one_head), (anew, anew)):
        monkeypatch.setattr(train, "narrow_weights", narrow)
        monkeypatch.setattr(GPT, "one_head", one_head)
        with Casts([*matrices, model.lm_head.weight]) as casts:
            loss = train.forward_backward(model, batch, 0, start())
        found.append((loss, [p.grad for p in model.parameters()], casts.times.values()))
    (loss, grads, once), (wanted, wanted_grads, often) = found
    assert set(once) == {1} and min(often) >= 3
    assert loss == wanted and all(map(torch.equal, grads, wanted_grads)) and grads[0].dtype == torch.float32
    assert all(p is q for p, q in zip(matrices, [m._parameters[name] for m, name in model.matrices()], strict=True))


def test_a_step_that_is_not_finite_is_skipped(monkeypatch):
    from tests.test_residual import make, tokens

    model = make()
    optimizer = train.make_optimizer(model)
    model(tokens(), tokens(1))[1].backward()
    model.norm.weight.grad[0] = math.nan
    before = [p.detach().clone() for p in model.parameters()]
    norm, _ = train.optimizer_step(model, optimizer, 0, 1.0, start())
    assert math.isnan(norm) and all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert model.expert_load().sum() == 0 and all((g.e_score_correction_bias == 0).all() for g in model.gates())


def test_a_changed_program_makes_a_commit_dirty_and_a_row_of_results_does_not(tmp_path, monkeypatch):
    git = lambda *a: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a", *a], cwd=tmp_path, check=True)  # noqa: E731
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    git("init", "-q")
    for name in ("train.py", "rates.csv"):
        (tmp_path / name).write_text("1\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean = train.commit()
    (tmp_path / "rates.csv").write_text("2\n")
    assert train.commit() == clean and len(clean) >= 7
    (tmp_path / "train.py").write_text("2\n")
    assert train.commit() == f"{clean}-dirty"
