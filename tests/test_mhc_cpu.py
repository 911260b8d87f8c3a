"""The CPU's boundary (mhc_cpu.py, impl='eager') against the twin in float64: values and all gradients."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mhc_cpu
from mhc_ref import mhc_post_res_ref, mhc_step_ref

NAMES = ("x", "y", "H_post", "H_res", "phi", "alpha", "b")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of a few tokens, so that small inputs also cross from one tile into the next."""
    monkeypatch.setattr(mhc_cpu, "TILE_BYTES", 4096)
    torch.manual_seed(0)


def inputs(T, n, C, dtype=torch.float32, std=1.0):
    """Leaves for mhc_step. Nothing is symmetric or equal across streams; std: of the logits of H_res."""
    K = n * n + 2 * n
    x, y = torch.randn(T, n, C).to(dtype), torch.randn(T, C).to(dtype)
    H_post, H_res = 2 * torch.rand(T, n), (2 * torch.randn(T, n, n)).softmax(-1)
    phi, alpha, b = torch.randn(n * C, K) / (n * C) ** 0.5, torch.tensor([1.0, 0.7, 0.8 * std]), torch.randn(K)
    b[2 * n :] *= 0.6 * std
    maps = torch.float64 if dtype == torch.float64 else torch.float32
    return [x, y] + [v.to(maps) for v in (H_post, H_res, phi, alpha, b)]


def evaluate(step, args, dtype=None, used=(1, 1, 1, 1), **kwargs):
    """Outputs and gradients of a fixed random functional of the outputs; dtype: of everything in it."""
    leaves = [v if v is None else v.detach().to(dtype or v.dtype).requires_grad_() for v in args]
    out = step(*leaves, **kwargs)
    out = out if isinstance(out, tuple) else (out,)
    gen = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=gen, dtype=torch.float64).to(o.dtype) for o in out]
    loss = sum((o * w).sum() for o, w, use in zip(out, weights, used, strict=False) if use)
    leaves = [v for v in leaves if v is not None]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in out] + list(grads)


def close(args, step=mhc_cpu.mhc_step, twin=mhc_step_ref, **kwargs):
    """Error against the twin in float64 at most twice that of the twin in the same precision, plus rounding."""
    truth, ref, ours = (
        evaluate(f, args, dtype, **kwargs) for f, dtype in ((twin, torch.float64), (twin, None), (step, None))
    )
    for k, (t, a, o) in enumerate(zip(truth, ref, ours, strict=True)):
        assert o.dtype == a.dtype and o.shape == a.shape and o.isfinite().all()
        size = t.abs().max().item() if t.numel() else 0
        error, allowed = ((v - t).abs().max().item() if t.numel() else 0 for v in (o, a))
        assert error <= 2 * allowed + 1e-6 * max(1, size), f"result {k}: {error} against {allowed}, size {size}"


@pytest.mark.parametrize("std", [1, 3, 6, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_step(n, dtype, std):
    close(inputs(63, n, 33, dtype, std))


@pytest.mark.parametrize("T", [0, 1, 63])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_counts_and_first_form(T, first, dtype):
    args = inputs(T, 4, 20, dtype)
    close([args[0], None, None, None, *args[4:]] if first else args)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [0, 1, 63])
def test_last_form(T, dtype, n):
    close(inputs(T, n, 33, dtype)[:4], mhc_cpu.mhc_post_res, mhc_post_res_ref)


@pytest.mark.parametrize("used", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 0, 0), (0, 0, 1, 1)])
@pytest.mark.parametrize("first", [False, True])
def test_unused_outputs(used, first):
    args = inputs(5, 4, 20)
    close([args[0], None, None, None, *args[4:]] if first else args, used=used)


def test_gradcheck():
    args = [v.requires_grad_() for v in inputs(3, 2, 5, torch.float64, 3)]
    assert torch.autograd.gradcheck(lambda *a: mhc_cpu.mhc_step(*a, sinkhorn_iters=7, eps=0.1), args)
    assert torch.autograd.gradcheck(lambda x, *p: mhc_cpu.mhc_step(x, None, None, None, *p), [args[0], *args[4:]])
    assert torch.autograd.gradcheck(mhc_cpu.mhc_post_res, args[:4])


@pytest.mark.parametrize("sinkhorn_iters, eps", [(0, 1e-20), (1, 0.5), (3, 1e-20)])
def test_settings_are_heeded(sinkhorn_iters, eps):
    close(inputs(9, 4, 20), sinkhorn_iters=sinkhorn_iters, eps=eps)


def test_leading_dimensions_and_strides():
    """(B, T, n, C) views with odd strides; a sublayer's output in another dtype than the streams (autocast)."""
    x, y, H_post, H_res, phi, alpha, b = inputs(24, 4, 20)
    lead = [v.unflatten(0, (4, 6)).transpose(0, 1) for v in (x, y, H_post, H_res)]
    close([*lead, phi, alpha, b])
    close([lead[0], lead[1].bfloat16(), *lead[2:], phi, alpha, b])


def test_autocast_rounds_nothing():
    args = inputs(24, 4, 20)
    plain = evaluate(mhc_cpu.mhc_step, args)
    with torch.autocast("cpu", torch.bfloat16):
        inside = evaluate(mhc_cpu.mhc_step, args)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_two_runs_are_equal_to_the_bit():
    args = inputs(63, 4, 33)
    a, b = evaluate(mhc_cpu.mhc_step, args), evaluate(mhc_cpu.mhc_step, args)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def chain(step, post_res, x, y, *params):
    """Two boundaries sharing parameters, and the end: the step used twice in one graph."""
    x, x_in, H_post, H_res = step(x, None, None, None, *params)
    x, x_in, H_post, H_res = step(x, (x_in * y).tanh(), H_post, H_res, *params)
    return post_res(x, (x_in + y).tanh(), H_post, H_res)


def test_chain_recomputation_and_hooks():
    x, y, _, _, phi, alpha, b = inputs(30, 4, 20)
    args = [x, y, phi, alpha, b]

    def ours(*a):
        return chain(mhc_cpu.mhc_step, mhc_cpu.mhc_post_res, *a)

    close(args, ours, lambda *a: chain(mhc_step_ref, mhc_post_res_ref, *a))
    plain = evaluate(ours, args)
    replayed = evaluate(lambda *a: checkpoint(ours, *a, use_reentrant=False), args)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: seen.append(v.shape) or v, lambda v: v.clone()):
        hooked = evaluate(ours, args)
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(plain, replayed, hooked, strict=True))
    history = [s for s in seen if s.numel() > 30 * 4 * 20]  # nothing larger than the streams is kept
    assert seen and not history
