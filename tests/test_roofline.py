"""tools/roofline.py: what it counts is what a hand counts, and what runs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import layers
from model import GPT, GPTConfig
from tools import bench
from tools import roofline as r

B, T = 2, 64
WIDTHS = dict(
    vocab_size=96, seq_len=T, n_layer=3, n_embd=80, n_head=2, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8,
    v_head_dim=32, intermediate_size=112, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=2,
    moe_intermediate_size=40,
)  # fmt: skip
CONFIG = GPTConfig(**WIDTHS, residual="baseline")
RUN = dict(
    micro_batch_size=B, seq_len=T, batch_size=8, dtype="bfloat16", parallel="none", shard_size=0, recompute="none",
    recompute_block=-1, plan_devices=0, n_streams=4,
)  # fmt: skip
CARDS = r.Card(1e12, 1e11, 1e9), r.Card(5e11, 5e10, 8e8)


def reckon(config=CONFIG, **changes):
    s = RUN | changes
    return r.reckon(config, s | {"batch_size": 4 * s["micro_batch_size"]}, CARDS, s["plan_devices"] or 1)


@pytest.fixture(scope="module")
def baseline():
    return reckon()


def test_products_are_six_flops_a_weight_and_token(baseline):
    attention = 80 * 2 * (16 + 8) + 80 * (24 + 8) + 24 * 2 * (16 + 32) + 2 * 32 * 80
    dense, moe = 3 * 80 * 112, 3 * 80 * 40 * (2 + 2)  # two experts a token, and two shared
    assert baseline[r.GEMM].flops == 6 * B * T * (3 * attention + dense + 2 * moe)
    assert baseline[r.HEAD].flops == 6 * B * T * 80 * 96
    assert baseline[r.MOE].flops == 2 * 6 * B * T * 80 * 4  # the gates


def test_attention_is_half_of_seven_products(baseline):
    """Scores and values forward; scores again, dq, dk (of 24) and dv, dp (of 32) backward."""
    assert baseline[r.ATTENTION].flops == 3 * B * 2 * T * T * (24 + 32 + 3 * 24 + 2 * 32)
    assert baseline[r.ATTENTION].launches == 3 * 3


@pytest.mark.parametrize("single_pass, forward, backward", [
    (False, (9, 14, 9), (22, 24, 14)),  # the first boundary, one between, the last
    (True, (5, 10, 9), (13, 19, 14)),
])  # fmt: skip
def test_a_boundary_moves_what_the_kernels_essay_says(single_pass, forward, backward):
    """So wide and so long that mappings and phi are nothing beside streams. 5: the sum at the end hands back one
    gradient for all streams, which is multiplied out."""
    wide = replace(CONFIG, n_embd=4096, residual="mhc", n_streams=4, single_pass=single_pass)
    part = reckon(wide, micro_batch_size=2**14)[r.BOUNDARY]
    units = 5 + sum(forward[i] + backward[i] for i in (0, 2)) + 5 * (forward[1] + backward[1])
    assert part.bytes / (2 * 4096 * 2**14 * T) == pytest.approx(units, rel=0.03)


def test_the_baseline_adds_and_no_more(baseline):
    assert baseline[r.BOUNDARY].bytes >= 6 * 3 * 2 * 80 * B * T  # reads two, writes one, for each of six sublayers
    assert baseline[r.BOUNDARY].launches >= 6


class Launches(TorchDispatchMode):
    """An own count of what runs: every operation with memory of its own in its result."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        nothing = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::detach", "aten::lift_fresh")
        self.n += isinstance(out, (tuple, torch.Tensor)) and not func.is_view and not func.name().startswith(nothing)
        return out


class Nothing(torch.autograd.Function):
    """A function that computes nothing: memory alone, also for the gradients."""

    @staticmethod
    def forward(ctx, shape, *tensors):
        ctx.save_for_backward(*tensors)
        return tensors[0].new_empty(shape)

    @staticmethod
    def backward(ctx, g):
        return None, *map(torch.empty_like, ctx.saved_tensors)


def test_it_launches_what_a_real_step_launches(monkeypatch, baseline):
    """But for what stands for itself in the reckoning: attention, the head, and ten norms of three launches."""
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: Nothing.apply(x.shape, x, weight))
    attention = lambda q, k, v, scale: Nothing.apply((*q.shape[:3], v.shape[3]), q, k, v)  # noqa: E731
    monkeypatch.setattr(layers, "causal_attention", attention)
    gpt = GPT(CONFIG)
    gpt.init_weights(0)
    gpt.loss = lambda h, targets: Nothing.apply((), h)
    for p in gpt.parameters():
        p.grad = torch.zeros_like(p)
    idx = torch.zeros(B, T, dtype=torch.long)
    with Launches() as seen:
        with torch.autocast("cpu", torch.bfloat16):
            loss = gpt(idx, idx)[1]
        loss.backward()
    counted = {name: part.launches for name, part in baseline.items()}
    rest = sum(n for name, n in counted.items() if name not in (r.ATTENTION, r.HEAD, r.OPTIMIZER))
    assert seen.n == rest - 10 * 3 - 1, counted  # and the head's gradient, which nobody makes here


def test_an_operation_takes_the_longer_of_moving_and_computing():
    card = r.Card(flops=100.0, wide_flops=10.0, bandwidth=10.0)
    assert card.seconds(r.Work(bytes=30, flops=200)) == 3 and card.seconds(r.Work(bytes=10, flops=200)) == 2
    assert card.seconds(r.Work(bytes=10, flops=200, wide_flops=10)) == 3  # products of two kinds after each other


def test_a_replay_moves_the_boundaries_forward_again():
    """recompute='mhc' runs the boundaries twice, and F once."""
    config = replace(CONFIG, n_embd=4096, residual="mhc", n_streams=4)
    once = reckon(config, micro_batch_size=2**10)
    again = reckon(config, micro_batch_size=2**10, recompute="mhc", recompute_block=6)
    unit = 2 * 4096 * 2**10 * T
    more = (again[r.BOUNDARY].bytes - once[r.BOUNDARY].bytes) / unit
    assert 9 + 5 * 14 <= more * 1.03 and more <= 1.1 * (9 + 5 * 14 + 9)
    assert again[r.GEMM].flops == once[r.GEMM].flops


def test_fsdp_hands_over_weights_in_bf16():
    alone, shards = reckon(), reckon(parallel="fsdp", plan_devices=4)
    assert shards.get(r.CASTS, r.Part()).bytes < 0.2 * alone[r.CASTS].bytes
    assert shards[r.GEMM].flops == alone[r.GEMM].flops


def run_bench(args, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tools/bench.py", "roofline", *args])
    for name, value in vars(bench).copy().items():
        if type(value) in (bool, int, float, str):
            monkeypatch.setattr(bench, name, value)  # put back afterwards
    bench.main()


def test_the_report_says_that_it_is_a_reckoning_and_compares_the_residual_connections(tmp_path, monkeypatch, capsys):
    settings = WIDTHS | {k: RUN[k] for k in ("micro_batch_size", "batch_size", "dtype")}
    (tmp_path / "tiny.py").write_text("\n".join(f"{k} = {v!r}" for k, v in settings.items()))
    run_bench([f"--config={tmp_path}/tiny.py", "--card=A100"], monkeypatch)
    said = capsys.readouterr().out
    assert "a reckoning, nothing was run" in said and "312 TFLOP/s, 2.04 TB/s" in said
    for name in (*r.PARTS, *r.FORMS, "MFU that follows: at most", "6.7 %"):
        assert name in said, name


def test_a_config_without_a_vocabulary_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        run_bench(["--config=config/demo.py"], monkeypatch)
    assert e.value.code == 2 and "vocab_size" in capsys.readouterr().err
