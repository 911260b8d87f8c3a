"""Recomputation (Table 3, Eq 20): nothing changes but the memory."""

import gc

import pytest
import torch

import recompute
from model import GPT, GPTConfig, run_sublayers
from plan import LiveBytes, measured_bytes

SMALL = dict(
    vocab_size=61, seq_len=16, n_layer=3, n_embd=32, n_head=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
    v_head_dim=12, intermediate_size=48, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
)  # fmt: skip
# mostly streams: F is as thin as it can be
DEEP = dict(
    vocab_size=32, seq_len=64, n_embd=128, n_head=1, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, intermediate_size=8, n_streams=4, impl="eager",
)  # fmt: skip


def make(**changes):
    model = GPT(GPTConfig(**{**SMALL, **changes}))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # away from the symmetries of the first values
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def tokens(model, batch=2):
    c = model.config
    idx = torch.randint(c.vocab_size, (batch, c.seq_len + 1), generator=torch.Generator().manual_seed(2))
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def step(model, autocast=False):
    """Loss, all gradients, and the experts' load of one forward and backward."""
    model.zero_grad()
    for gate in model.gates():
        gate.load.zero_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(*tokens(model))[1]
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters()), model.expert_load().clone()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "kind",
    [
        dict(residual="mhc", impl="ref"),
        dict(residual="mhc", impl="eager"),
        dict(residual="mhc", impl="ref", single_pass=True),
        dict(residual="mhc", impl="eager", single_pass=True),
        dict(residual="hc"),
        dict(residual="baseline"),
    ],
    ids=lambda kind: "-".join(map(str, kind.values())),
)
def test_losses_gradients_and_counts_are_bit_equal(kind, autocast):
    model = make(**kind)
    wanted = step(model, autocast)
    assert wanted[-1].sum() == 2 * 2 * 16 * 2  # two MoE blocks, two experts a token
    for mode, block in (("mhc", -1), ("mhc", 1), ("mhc", 4), ("mhc", 6), ("full", -1), ("full", 4)):
        recompute.apply(model, mode, block)
        assert same(step(model, autocast), wanted), (mode, block)
    recompute.apply(model, "none")
    assert same(step(model, autocast), wanted)


def test_no_sublayers_change_nothing():
    x, carry = torch.randn(2, 3, 4, 5), (torch.randn(2, 3, 4),)
    assert run_sublayers(x, [], carry=carry) == (x, carry)


@pytest.mark.parametrize("residual, autocast", [("mhc", False), ("mhc", True), ("hc", True)])
def test_the_fused_operator_is_replayed(residual, autocast):
    """Triton's kernels, interpreted: a boundary in one operation and in two halves have the same bits."""
    pytest.importorskip("triton")
    from tools.kernel_report import hardware_arithmetic

    model = make(n_layer=2, impl="triton", seq_len=4, n_embd=16, sinkhorn_iters=2, residual=residual)
    with hardware_arithmetic():
        wanted = step(model, autocast)
        for mode, block in (("mhc", 3), ("mhc", 1), ("full", 3)):
            recompute.apply(model, mode, block)
            assert same(step(model, autocast), wanted), (mode, block)


def test_compiled_sublayers_are_replayed():
    """With aot_eager, which compiles the graph and its backward as torch.compile does, but without a C++ compiler."""
    model = make(first_k_dense_replace=3)
    model.compile_sublayers(backend="aot_eager")
    wanted = step(model)
    for mode in ("mhc", "full"):
        recompute.apply(model, mode)
        assert same(step(model), wanted), mode


@pytest.mark.parametrize("mode,runs_of_F", [("none", 1), ("mhc", 1), ("full", 2)])
def test_what_runs_twice(mode, runs_of_F):
    model, ran = make(), {"F": 0, "norm": 0, "map": 0}
    for block in model.layers:
        for name, modules in (
            ("F", (block.self_attn, block.mlp)),
            ("norm", (block.input_layernorm, block.post_attention_layernorm)),
            ("map", (block.attn_residual, block.mlp_residual)),
        ):
            for module in modules:
                module.register_forward_pre_hook(lambda *_, name=name: ran.update({name: ran[name] + 1}))
    recompute.apply(model, mode)
    step(model)
    twice = 6 if mode == "none" else 12
    assert ran == {"F": 6 * runs_of_F, "norm": twice, "map": twice}


@pytest.mark.parametrize("mode", ["mhc", "full"])
def test_the_graph_is_freed_with_the_loss(mode):
    """Neither a backward nor its absence leaves anything behind: no cycle through the replay's closure."""
    model = make()
    recompute.apply(model, mode)
    step(model)
    gc.disable()
    try:
        with LiveBytes([*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]) as live:
            for backward in (False, True):
                loss = model(*tokens(model))[1]
                assert live.now > 10_000
                if backward:
                    loss.backward()
                del loss
                assert live.now == 0, backward
    finally:
        gc.enable()


def test_saved_bytes_are_table_3_and_the_best_block_is_L_r():
    """x at each segment's start and F's output at each sublayer, to the byte; and Eq 20's L_r* is the measured minimum
    of the peak or next to it."""
    L = 24
    model = GPT(GPTConfig(**DEEP, n_layer=L // 2, first_k_dense_replace=L // 2))
    model.init_weights(0)
    n, C, N = 4, 128, 64
    best, saved, peak = recompute.best_block(L, n), {}, {}
    for block in range(1, best + 4):
        recompute.apply(model, "mhc", block)
        saved[block], peak[block] = measured_bytes(model, *tokens(model, 1))
    for block in saved:
        starts = -(-L // block)
        assert saved[1] - saved[block] == 4 * N * n * C * (L - starts)
    assert abs(min(peak, key=peak.get) - best) <= 1, peak
    recompute.apply(model, "none")
    none, _ = measured_bytes(model, *tokens(model, 1))
    # none keeps x, RMSNorm's input and product, and F's input at every sublayer; L_r = 1 only the x for each of them
    assert none - saved[1] >= 4 * N * 3 * C * L


def test_eq_20():
    assert recompute.best_block(60, 4) == 6  # the paper's 27B model: sqrt(4 * 60 / 6) is 6.3
    assert recompute.block_cost(60, 6, 4) == 4 * 10 + 6 * 6
    for L in range(2, 130):
        for n in (1, 2, 4, 8):
            costs = [recompute.block_cost(L, r, n) for r in range(1, L + 1)]
            assert costs[recompute.best_block(L, n) - 1] == min(costs)


@pytest.mark.parametrize("mode,block,words", [("half", -1, "recompute='half'"), ("mhc", 0, "recompute_block=0"),
                                              ("mhc", 7, "1 to 6")])  # fmt: skip
def test_impossible_settings_are_named(mode, block, words):
    with pytest.raises(ValueError, match=words):
        recompute.apply(make(), mode, block)
