"""tools/bench.py: timings in turn, the spread, and what the command line refuses. No timing is judged here."""

import os
import re
import subprocess
import sys

import pytest
import torch

from model import GPT
from tools import bench, rivals


def test_every_round_calls_every_function_in_turn():
    calls = []
    seconds = bench.time_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_spread_is_half_the_quartile_range():
    assert bench.spread([1, 2, 3, 4, 5]) == 1
    assert bench.spread([1, 2, 3, 4, 1e9]) == 1  # one bad round does not move it


@pytest.mark.parametrize(
    "args, message",
    [
        (["cqu"], "wanted one of cpu, generate"),
        (["cpu", "--widths=640"], "wanted some of 64, 512, 1280, got '640'"),
        (["cpu", "--tokens=100"], "wanted a multiple of seq_len"),
        (["cpu", "--widths=64", "--tokens=4096"], "tokens=4096, seq_len=2048: wanted none of them with widths=64"),
        (["cpu", "--round=3"], "did you mean rounds"),
        (["cpu", "--impls=ref,x"], "wanted some of ref, eager, got 'x'"),
        (["cpu", "--seq_len=0"], "seq_len=0: wanted a number of at least 1"),
        (["cpu", "--threads=100000"], "threads=100000: wanted a number of at least 0 and at most 1024"),
        (["step", "--blocks=3"], "does not use blocks; it reads rounds, threads, seed"),
        (["eval", "--shot_tokens=5000"], "= 5085: wanted at most 4096"),
        (["kernels", "--seed=3"], "does not use seed; it reads no settings"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tools/bench.py", *args])
    for name, value in vars(bench).copy().items():
        if type(value) in (bool, int, float, str):
            monkeypatch.setattr(bench, name, value)  # put back afterwards
    with pytest.raises(SystemExit) as e:
        bench.main()
    said = capsys.readouterr().err
    assert e.value.code == 2 and message in said and said.count("\n") == 1


def test_at_C_64_whole_steps_of_the_demo_are_timed_and_compared_with_the_baseline(monkeypatch, capsys):
    steps = []
    monkeypatch.setattr(bench, "demo_step", lambda **kind: steps.append(kind) or (lambda: None))
    timed = {"baseline": [1.0, 2.0], "HC": [1.2, 2.4], "mHC eager": [1.3, 2.6], "mHC single-pass": [1.25, 2.5]}
    monkeypatch.setattr(bench, "time_in_turn", lambda made, rounds: {name: timed[name] for name in made})
    for name, value in {"widths": "64", "impls": "eager", "threads": torch.get_num_threads()}.items():
        monkeypatch.setattr(bench, name, value)
    bench.cpu()
    assert steps[0] == {"residual": "baseline"} and {"residual": "mhc", "single_pass": True} in steps
    table = {line[:24].strip(): line.split() for line in capsys.readouterr().out.splitlines() if "%" in line}
    assert {name: float(row[row.index("%") - 1]) for name, row in table.items()} == {
        "HC": 20, "mHC eager": 30, "mHC single-pass": 25
    }  # fmt: skip


def test_a_step_of_the_demo_moves_its_weights(monkeypatch):
    made = []
    monkeypatch.setattr(bench, "GPT", lambda config: made.append(GPT(config)) or made[0])
    step = bench.demo_step(residual="mhc", n_streams=2)
    assert made[0].config.n_embd == bench.DEMO and made[0].config.residual == "mhc"
    before = made[0].layers[0].mlp_residual.phi.detach().clone()
    step()
    assert not torch.equal(before, made[0].layers[0].mlp_residual.phi)


def test_busy_neighbours_are_there_for_half_of_the_processes_and_then_gone(monkeypatch, capsys):
    started, beside = [], []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args: started.append(popen(*args)) or started[-1])
    alive = lambda: sum(p.poll() is None for p in started)  # noqa: E731

    def timed_step(wait):
        beside.append((alive(), wait))
        return float("inf") if beside[-1] == (n, "unset") else {"unset": 4.0, "ours": 5.0, "PASSIVE": 8.0}[wait]

    n = os.cpu_count()
    monkeypatch.setattr(bench, "timed_step", timed_step)
    bench.neighbour()
    quiet, busy = [(0, w) for w in bench.WAITS], [(n, w) for w in bench.WAITS]
    assert beside == quiet + busy + 4 * (quiet + busy[1:]) and alive() == 0  # what takes too long is tried once
    said = capsys.readouterr().out
    assert "0 busy neighbours, ours          5.0 ms, 1.250 ± 0.000 of unset" in said
    assert f"{n} busy neighbours, ours          5.0 ms, 0.625 ± 0.000 of PASSIVE" in said
    assert f"{n} busy neighbours, unset    not done in 120 s" in said


def test_the_rival_of_a_training_step_has_the_same_loss(monkeypatch, capsys):
    tiny = dict(seq_len=8, micro_batch_size=2, n_layer=2, n_embd=16, n_head=2, kv_lora_rank=8, qk_nope_head_dim=4,
                qk_rope_head_dim=2, v_head_dim=4, intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2,
                moe_intermediate_size=8, residual="mhc", lr=1.0)  # fmt: skip
    rivals.report("tiny", tiny, 31, 2, seed=0)
    assert re.search(r"CPU seconds +ours [0-9.]+, theirs [0-9.]+, theirs over ours", capsys.readouterr().out)
    both = rivals.both
    ours, theirs = both(tiny, 31, 0)
    torch.nn.init.normal_(theirs.lm_head.weight, std=1.0)
    monkeypatch.setattr(rivals, "both", lambda *args: (ours, theirs))
    with pytest.raises(RuntimeError, match="do not compute the same"):
        rivals.train_step(tiny, 31, 1, seed=0)


def test_blocks_in_a_row_have_maps_of_their_own_and_all_of_them_are_in_what_is_timed(monkeypatch):
    small = dict(n_head=1, n_routed_experts=6, moe_intermediate_size=8)
    for name, value in {"blocks": 3, "tokens": 8, "seq_len": 4, "SHAPES": {16: small}}.items():
        monkeypatch.setattr(bench, name, value)
    sublayers, shared = bench.block_sublayers(16)
    assert len(sublayers) == 6 and len(shared) == 4
    variant = bench.make_variant(16, sublayers, residual="mhc")
    bench.forward_backward(variant, shared)()
    phis = [residual.phi for residual in variant[2]]
    assert len({p.data_ptr() for p in phis}) == 6 and all(p.grad.abs().max() > 0 for p in phis)
    monkeypatch.setattr(bench, "blocks", 0)
    assert len(bench.block_sublayers(16)[0]) == 2
