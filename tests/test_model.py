"""The transformer itself: attention, experts, loss, initialisation, counts."""

import runpy
import sys
from dataclasses import fields
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import layers as module
import mhc_cpu
from layers import (
    HEAD_LOSSES,
    MLA,
    Combine,
    Dispatch,
    Experts,
    HeadLoss,
    LatentCache,
    MoE,
    apply_rope,
    check_head_loss,
    rope_angles,
    softmax_loss,
)  # fmt: skip
from model import GPT, GPTConfig
from plan import LiveBytes
from tests.test_residual import TINY, make, tokens


def plain_attention(mla, x):
    """Attention head by head with the decompressed keys and values, RoPE as multiplication of complex numbers."""
    T = x.shape[1]
    angles = torch.arange(T)[:, None] * 10000.0 ** -(torch.arange(0, mla.R, 2) / mla.R)
    turn = torch.polar(torch.ones_like(angles), angles)  # (T, R/2)

    def rope(v):  # (T, R)
        return torch.view_as_real(torch.view_as_complex(v.reshape(T, -1, 2)) * turn).flatten(1)

    def norm(v, weight):
        return v / v.square().mean(-1, keepdim=True).sqrt() * weight

    out = []
    for row in x:  # (T, C)
        if mla.q_lora_rank:
            q = mla.q_b_proj(norm(mla.q_a_proj(row), mla.q_a_layernorm.weight))
        else:
            q = mla.q_proj(row)
        compressed = mla.kv_a_proj_with_mqa(row)
        latent, k_rope = norm(compressed[:, : mla.Z], mla.kv_a_layernorm.weight), rope(compressed[:, mla.Z :])
        kv, heads = mla.kv_b_proj(latent), []
        for h in range(mla.H):
            q_h = q[:, h * (mla.D + mla.R) : (h + 1) * (mla.D + mla.R)]
            kv_h = kv[:, h * (mla.D + mla.V) : (h + 1) * (mla.D + mla.V)]
            q_h = torch.cat((q_h[:, : mla.D], rope(q_h[:, mla.D :])), 1)
            k_h = torch.cat((kv_h[:, : mla.D], k_rope), 1)
            scores = q_h @ k_h.T / (mla.D + mla.R) ** 0.5
            scores = scores.masked_fill(torch.ones(T, T).tril() == 0, -torch.inf)
            heads.append(scores.softmax(-1) @ kv_h[:, mla.D :])
        out.append(mla.o_proj(torch.cat(heads, 1)))
    return torch.stack(out)


@pytest.mark.parametrize("q_lora_rank", [0, 12])
def test_mla_equals_plain_attention(q_lora_rank):
    config = GPTConfig(**TINY | dict(q_lora_rank=q_lora_rank, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10))
    torch.manual_seed(0)
    mla = MLA(config)
    for p in mla.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 9, TINY["n_embd"])
    rope = rope_angles(torch.arange(9).unsqueeze(0), 4, 10000.0)
    torch.testing.assert_close(mla(x, rope), plain_attention(mla, x), atol=1e-5, rtol=1e-4)


def test_rope_depends_on_distance_alone():
    q, k = torch.randn(1, 1, 8).double(), torch.randn(1, 1, 8).double()

    def score(i, j):
        rope_i, rope_j = (rope_angles(torch.tensor([[float(p)]]).double(), 8, 10000.0) for p in (i, j))
        return (apply_rope(q, rope_i) * apply_rope(k, rope_j)).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101))
    assert (score(3, 1) - score(1, 3)).abs() > 1e-3


def make_moe(**changes):
    config = GPTConfig(**TINY | changes)
    moe = MoE(config)
    torch.manual_seed(0)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return moe


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moe_equals_a_loop_over_experts_and_drops_nothing(dtype):
    moe = make_moe(route_scale=1.7).to(dtype)
    moe.gate.e_score_correction_bias.copy_(torch.tensor([0.5, -0.5, 0.2, 0.0]))
    x = torch.randn(3, 7, TINY["n_embd"], dtype=dtype)
    want = torch.zeros_like(x)
    for t in [(b, s) for b in range(3) for s in range(7)]:
        scores = (moe.gate.weight @ x[t]).sigmoid()
        picked = (scores + moe.gate.e_score_correction_bias).topk(2).indices  # the bias selects ...
        weights = scores[picked] / scores[picked].sum() * 1.7  # ... and has no part in the weights
        for e, w in zip(picked, weights, strict=True):
            up = F.silu(moe.experts.gate_proj[e] @ x[t]) * (moe.experts.up_proj[e] @ x[t])
            want[t] += w * (moe.experts.down_proj[e] @ up)
        want[t] += moe.shared_experts(x[t])
    torch.testing.assert_close(moe(x), want)
    assert moe.gate.load.sum() == 3 * 7 * 2
    weight = torch.randn_like(x)
    params = [p for _, p in sorted(moe.named_parameters())]
    got, expected = (torch.autograd.grad((out * weight).sum(), params) for out in (moe(x), want))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_moe_with_experts_that_get_no_token():
    moe = make_moe()
    moe.gate.e_score_correction_bias.copy_(torch.tensor([10.0, 10.0, 0.0, 0.0]))
    moe(torch.randn(2, 5, TINY["n_embd"])).sum().backward()
    assert moe.gate.load.tolist() == [10, 10, 0, 0]
    assert moe.experts.up_proj.grad[2:].abs().max() == 0 < moe.experts.up_proj.grad[:2].abs().min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [16, 10])
def test_experts_without_tokens_in_every_dtype(dtype, width):
    experts = Experts(GPTConfig(n_embd=width, n_routed_experts=4, moe_intermediate_size=8))
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.3)
    experts, x = experts.to(dtype), torch.randn(9, width, dtype=dtype)
    gate, up, down = experts.gate_proj, experts.up_proj, experts.down_proj
    rows = [(x[:5], 1), (x[5:], 3)]
    want = torch.cat([(F.silu(r @ gate[e].T) * (r @ up[e].T)) @ down[e].T for r, e in rows])
    torch.testing.assert_close(experts(x, torch.tensor([0, 5, 5, 9], dtype=torch.int32)), want)


@pytest.mark.parametrize("sizes", [[5, 0, 64, 3], [0, 0, 0, 130], [1, 65, 0, 0]])
def test_products_in_blocks_are_those_one_by_one(sizes):
    """Values and gradients, with experts that have no row, a whole block, one row more than that."""
    experts = Experts(GPTConfig(n_embd=10, n_routed_experts=4, moe_intermediate_size=6)).double()
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, g = torch.randn(2, sum(sizes), 10, dtype=torch.float64)
    leaves = [x.requires_grad_(), *experts.parameters()]
    rows = zip(x.split(sizes), experts.gate_proj, experts.up_proj, experts.down_proj, strict=True)
    want = torch.cat([(F.silu(r @ gate.T) * (r @ up.T)) @ down.T for r, gate, up, down in rows])
    got = experts(x, torch.tensor(sizes).cumsum(0).to(torch.int32))
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, g) for y in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dispatch_and_combine_have_the_gradients_of_index_select():
    """In bf16 the k = 5 copies of a token are summed in fp32: right to one rounding."""
    order = torch.randperm(30)
    slots = order.argsort()
    for dtype, tolerance in ((torch.float64, 0), (torch.bfloat16, 2**-8)):
        x, y, g = torch.randn(6, 3), torch.randn(30, 3), torch.randn(30, 3)
        x, y, g = (v.to(dtype).requires_grad_() for v in (x, y, g))
        ours = [Dispatch.apply(x, order, slots, 5), Combine.apply(y, order, slots, 5).flatten(0, 1)]
        want = [x.double().index_select(0, order // 5), y.double().index_select(0, slots)]
        for o, w, leaf in zip(ours, want, (x, y), strict=True):
            assert torch.equal(o.double(), w)
            (got,), (exact,) = (torch.autograd.grad((v * g.to(v.dtype)).sum(), leaf) for v in (o, w))
            exact_sum = g.double()[slots].view(6, 5, 3).sum(1) if leaf is x else exact
            torch.testing.assert_close(got.double(), exact_sum.double(), rtol=tolerance, atol=0)


def test_the_bias_evens_out_a_skewed_router():
    moe = make_moe()
    x = torch.randn(64, TINY["n_embd"])
    with torch.no_grad():
        moe.gate.weight.normal_(0, 0.02)
        moe.gate.weight[0] += 0.3 * x.mean(0) + 0.1
    gpt = make()
    gpt.layers[1].mlp = moe
    shares = []
    for _ in range(400):
        moe(x)
        load = gpt.expert_load()
        shares.append((load.max() / load.float().mean()).item())
        gpt.update_expert_bias(0.01, load)
    assert shares[0] > 1.25 and shares[-1] < 1.15
    assert moe.gate.load.sum() == 0


def test_load_is_counted_in_training_only():
    gpt = make()
    gpt.eval()
    gpt(tokens())
    gpt.train()
    gpt.layers[0].eval()  # frozen, say
    gpt.residual_maps(tokens())
    assert gpt.training and gpt.expert_load().sum() == 0
    assert not any(m.training for m in gpt.layers[0].modules()) and all(m.training for m in gpt.layers[1].modules())
    gpt(tokens())
    assert gpt.expert_load().sum() == 2 * TINY["seq_len"] * TINY["num_experts_per_tok"]


def test_loss_in_chunks_equals_the_loss_of_all_logits(monkeypatch):
    gpt, idx, targets = make(), tokens(), tokens(1)
    targets[0, :5] = -1  # ignored
    logits, none = gpt(idx)
    assert none is None and logits.shape == (2, TINY["seq_len"], TINY["vocab_size"])
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    want_grad = torch.autograd.grad(want, gpt.lm_head.weight)[0]
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 5 * TINY["vocab_size"])  # chunks of 5 tokens, the last one of 2
    none, loss = gpt(idx, targets)
    assert none is None
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, gpt.lm_head.weight)[0], want_grad)


def test_full_logits_never_exist_at_once(monkeypatch):
    """Nothing of N x vocabulary is made, forward or backward, and each product of the head is made once."""
    N, C, V = 100, 4, 50
    h, w = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 25 * V)
    with LiveBytes([h, w]) as live:
        HeadLoss.apply(h, w, torch.randint(V, (N,)), True).backward()
    assert live.peak < 4 * N * V
    products = []
    monkeypatch.setattr(module, "wide_mm", lambda a, b: products.append(len(a) * b.shape[1]) or a @ b)
    HeadLoss.apply(h, w, torch.randint(V, (N,)), False)
    assert products == [25 * V] * 4  # without gradients the logits alone
    HeadLoss.apply(h, w, torch.randint(V, (N,)), True).backward()
    assert len(products) == 4 + 3 * 4
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 519 * V)
    products.clear()
    HeadLoss.apply(torch.randn(600, C), w, torch.randint(V, (600,)), False)
    assert products == [512 * V, 88 * V]  # whole tiles of 256 rows


@pytest.mark.parametrize(
    "dtype, d_h, d_w", [(torch.float64, 1e-14, 1e-14), (torch.float32, 1e-6, 1e-6), (torch.bfloat16, 2.5e-3, 1e-3)]
)
@pytest.mark.parametrize("chunks", [1, 32])
@pytest.mark.parametrize("fused", [None, softmax_loss])
def test_head_gradients_do_not_lose_with_the_number_of_chunks(monkeypatch, dtype, d_h, d_w, chunks, fused):
    """Against fp64 on the same rounded h and W. h's gradient is rounded to h's dtype, W's is fp32."""
    N, C, V = 512, 32, 700
    h, w, targets = torch.randn(N, C).to(dtype), 0.3 * torch.randn(V, C), torch.randint(V, (N,))
    w, targets[::7] = w.to(dtype).to(torch.float64 if dtype == torch.float64 else torch.float32), -1
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", N // chunks * V)
    wide = [v.double().requires_grad_() for v in (h, w)]
    want = F.cross_entropy(wide[0] @ wide[1].T, targets, ignore_index=-1, reduction="sum")
    leaves = [v.detach().requires_grad_() for v in (h, w)]
    got = HeadLoss.apply(*leaves, targets, True, fused)
    assert abs(got.item() / want.item() - 1) < min(d_w, 1e-6)
    grads = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, wide), leaves, (d_h, d_w), strict=True)
    for g, e, leaf, allowed in grads:
        assert g.dtype == leaf.dtype and ((g - e).norm() / e.norm()).item() < allowed


def pretend_liger(seen):
    """Liger's function by plain PyTorch; seen: a list that receives what it is given."""

    def apply(h, w, targets, bias, of_classes, ignored, z, smoothing, reduction, softcap, return_z, sums_in):
        seen.append((h.dtype, w.dtype, sums_in, torch.backends.cuda.matmul.allow_tf32))
        assert bias is of_classes is softcap is None and z == smoothing == return_z == 0
        return F.cross_entropy(h @ w.T, targets, ignore_index=ignored, reduction=reduction), None, None, None

    ops = ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
    ops.LigerFusedLinearCrossEntropyFunction = SimpleNamespace(apply=apply)
    names = ("liger_kernel", "liger_kernel.ops", ops.__name__)
    return dict(zip(names, (ModuleType(names[0]), ModuleType(names[1]), ops), strict=True))


new_torch = pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="older than torch 2.13")
LIBRARIES = [
    pytest.param("torch", marks=new_torch), "liger, pretended",
    pytest.param("liger", marks=pytest.mark.skipif(not find_spec("liger_kernel"), reason="Liger is not installed")),
]  # fmt: skip


@pytest.mark.parametrize("bf16, d_h, d_w", [(False, 1e-5, 1e-5), (True, 3e-3, 1e-3)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["chunked", *LIBRARIES])
def test_every_head_has_the_loss_and_gradients_of_fp64(name, bf16, d_h, d_w, monkeypatch):
    """At 32 chunks, odd sizes, some targets ignored. In bf16 the gradients of logits and h are bf16, all else fp32."""
    N, C, V, seen = 511, 17, 701, []
    torch.manual_seed(0)
    gpt, h, targets = make(n_embd=C, vocab_size=V), torch.randn(N, C).to(torch.bfloat16), torch.randint(V, (N,))
    w, targets[::7] = (0.5 * torch.randn(V, C)).to(torch.bfloat16), -1
    gpt.lm_head.weight.data = w.float()
    gpt.head_loss = name.split(",")[0]
    if name == "liger, pretended":
        for path, stand_in in pretend_liger(seen).items():
            monkeypatch.setitem(sys.modules, path, stand_in)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 16 * V)
    wide = [v.double().requires_grad_() for v in (h, w)]
    want = F.cross_entropy(wide[0] @ wide[1].T, targets, ignore_index=-1)
    leaves = [h.to(torch.bfloat16 if bf16 else torch.float32).requires_grad_(), gpt.lm_head.weight]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        got = gpt.loss(leaves[0], targets)
    assert got.dtype == torch.float32 and abs(got.item() / want.item() - 1) < 1e-6
    grads = zip(torch.autograd.grad(3 * got, leaves), torch.autograd.grad(3 * want, wide), (d_h, d_w), strict=True)
    for g, e, allowed in grads:
        assert ((g - e).norm() / e.norm()).item() < allowed
        assert (g[::7] == 0).all() if len(g) == N else g.dtype == torch.float32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert set(seen) <= {(*[torch.float32] * 3, bf16)}  # TF32 on a GPU, but for fp32 runs
    with torch.no_grad():  # an evaluation
        assert abs(gpt.loss(leaves[0].float(), targets).item() / want.item() - 1) < 1e-6


@new_torch
def test_heads_that_run_everywhere():
    for name in HEAD_LOSSES[:2]:
        check_head_loss(name, "cpu")


def test_a_head_that_cannot_run_here_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="head_loss='liger': .*not installed: pip install .*head_loss='chunked'"):
        check_head_loss("liger", "cuda")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    check_head_loss("liger", "cuda")
    with pytest.raises(ValueError, match="head_loss='liger': .*for GPUs and this is 'cpu'; head_loss='chunked'"):
        check_head_loss("liger", "cpu")
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    with pytest.raises(ValueError, match="head_loss='torch': wanted torch 2.13, .*'chunked'"):
        check_head_loss("torch", "cuda")


def test_autocast_does_not_round_logits_or_loss():
    gpt, targets = make(), tokens(1).flatten()
    h = torch.randn(len(targets), TINY["n_embd"]).to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = gpt.loss(h, targets)
    logits = h.detach().double() @ gpt.lm_head.weight.detach().to(torch.bfloat16).double().T
    assert abs(loss.item() / F.cross_entropy(logits, targets).item() - 1) < 1e-6


def without_values(residual, dtype=torch.bfloat16, device="cpu"):
    """A model's tensors as fakes: they have shapes and no values. Called under FakeTensorMode. -> model, tokens"""
    with torch.device("meta"):
        gpt = GPT(GPTConfig(**TINY | {"residual": residual, "impl": "eager"}))
    for m in gpt.modules():
        for name, p in m.named_parameters(recurse=False):
            setattr(m, name, torch.nn.Parameter(torch.empty(p.shape, dtype=dtype, device=device)))
        for name, t in m.named_buffers(recurse=False):
            setattr(m, name, torch.empty(t.shape, dtype=t.dtype, device=device))
    return gpt, torch.empty(2, TINY["seq_len"], dtype=torch.long, device=device)


@pytest.fixture(params=["cpu", "cuda"])
def fake_device(request, monkeypatch):
    """Of tensors that fail whatever asks for a value: item, tolist, bincount, nonzero. Fakes of CUDA want a CUDA build
    and no GPU; those of a CPU stand in for them, as they would run on a GPU."""
    if request.param == "cuda" and not torch.backends.cuda.is_built():
        pytest.skip("torch is not built for CUDA")
    if request.param == "cpu":
        monkeypatch.setattr(module, "grouped_mm_takes", lambda x, *weights: x.dtype == torch.bfloat16)
        monkeypatch.setattr(mhc_cpu, "by_size", lambda direct, by_log, *args: by_log(*args))  # a CPU alone is asked
    with FakeTensorMode():
        yield request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("residual", ["baseline", "hc", "mhc"])
def test_a_step_never_waits_for_the_device(residual, dtype, fake_device):
    gpt, idx = without_values(residual, dtype, fake_device)
    loss = gpt(idx, idx)[1]
    if fake_device == "cpu":  # autograd's engine looks for a GPU itself
        loss.backward()
    gpt.update_expert_bias(0.001, gpt.expert_load())


@pytest.mark.parametrize("residual", ["baseline", "hc", "mhc"])
@torch.no_grad()
def test_decoding_never_waits_for_the_device(residual, fake_device):
    """Prompt, two tokens behind it, the rows that go on: on fakes. What waits is left to whoever picks the tokens."""
    gpt, idx = without_values(residual, device=fake_device)
    cache = LatentCache(gpt.eval().config, 2, TINY["seq_len"] + 2, fake_device, torch.bfloat16)
    gpt(idx, cache=cache)
    cache.length = cache.length - 3  # of the padding
    first = torch.zeros(1, dtype=torch.long, device=fake_device)
    for rows in (cache, cache.rows(first, TINY["seq_len"] + 4)):
        assert gpt(idx[: len(rows.length), :1], cache=rows)[0].shape == (len(rows.length), 1, TINY["vocab_size"])
        gpt(idx[: len(rows.length), :1], cache=rows)
    with pytest.raises(ValueError, match=f"the cache has room for {TINY['seq_len'] + 2} positions, wanted"):
        gpt(idx[:, :1], cache=cache)


@pytest.mark.parametrize("residual", ["baseline", "hc", "mhc"])
def test_a_tiny_model_overfits_one_batch(residual):
    gpt = make(residual=residual, n_layer=2)
    idx = tokens(batch=1)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(60):
        optimizer.zero_grad()
        _, loss = gpt(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_the_backbone_starts_alike_in_all_variants():
    models = [make(residual=r, n_streams=n) for r, n in (("baseline", 1), ("hc", 4), ("mhc", 4), ("mhc", 2))]
    for name, p in models[0].named_parameters():
        assert all(torch.equal(p, dict(m.named_parameters())[name]) for m in models[1:]), name
    other = GPT(GPTConfig(**TINY))
    other.init_weights(seed=2)
    assert not torch.equal(other.lm_head.weight, models[2].lm_head.weight)
    assert not torch.equal(models[0].lm_head.weight, models[0].embed_tokens.weight)  # untied, and not drawn alike


def test_every_parameter_is_initialised():
    for residual in ("hc", "mhc"):
        gpt = GPT(GPTConfig(**TINY | dict(residual=residual, collapse="head", q_lora_rank=8)))
        for p in gpt.parameters():
            torch.nn.init.constant_(p, torch.nan)
        gpt.init_weights(seed=3)
        assert all(p.isfinite().all() for p in gpt.parameters())


@pytest.mark.parametrize(
    "name,total,active,vocab",  # the paper's Table 5 to all the digits it gives
    [
        ("mhc_27b", "27.0B", "4.14B", "662M"),
        ("mhc_9b", "9.18B", "1.66B", "496M"),
        ("mhc_3b", "2.97B", "612M", "331M"),
        ("mhc_3b_1t", "2.97B", "612M", "331M"),
    ],
)
def test_parameter_counts_of_the_paper(name, total, active, vocab):
    settings = runpy.run_path(f"config/{name}.py")
    config = GPTConfig(**{f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings})
    with torch.device("meta"):
        counts = GPT(config).num_params()
    for kind, want in (("total", total), ("active", active), ("vocab", vocab)):
        unit = {"B": 1e9, "M": 1e6}[want[-1]]
        decimals = len(want[:-1].partition(".")[2])
        assert f"{counts[kind] / unit:.{decimals}f}" == want[:-1], (kind, counts[kind])


def test_counting_active_parameters_by_hand():
    gpt = make(residual="baseline")
    C, E, k, hidden = (TINY[x] for x in ("n_embd", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"))
    idle = (E - k) * 3 * C * hidden  # of the one MoE block
    counts = gpt.num_params()
    assert counts["total"] == sum(p.numel() for p in gpt.parameters())
    assert counts["total"] - counts["active"] == idle + TINY["vocab_size"] * C
    assert counts["vocab"] == 2 * TINY["vocab_size"] * C
    attention = 6 * 2 * TINY["seq_len"] * TINY["n_head"] * (8 + 4 + 8)
    assert gpt.flops_per_token() == 6 * counts["active"] + attention


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(n_layer=-3), "n_layer=-3"), (dict(n_streams=0), "n_streams=0"), (dict(residual="mch"), "residual='mch'"),
        (dict(collapse="mean"), "collapse='mean'"), (dict(qk_rope_head_dim=5), "qk_rope_head_dim=5"),
        (dict(num_experts_per_tok=5), "num_experts_per_tok=5"), (dict(num_experts_per_tok=1), "at least 2"),
        (dict(init_std=float("nan")), "init_std=nan"),
    ],
)  # fmt: skip
def test_impossible_models_are_refused(change, words):
    with pytest.raises(ValueError, match="wanted|pick") as e:
        GPTConfig(**TINY | change)
    assert words in str(e.value)
    GPTConfig(**TINY)


def test_a_model_without_experts():
    gpt = make(n_routed_experts=0, first_k_dense_replace=2)
    gpt(tokens(), tokens(1))[1].backward()
    assert gpt.expert_load().shape == (0, 0)
    gpt.update_expert_bias(0.1, gpt.expert_load())
