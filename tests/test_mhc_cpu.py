"""The CPU's boundary (mhc_cpu.py, impl='eager') against the twin in float64: values and all gradients."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mhc_cpu
from manifolds import MANIFOLDS
from mhc_ref import hc_step_ref, mhc_post_res_ref, mhc_step_ref, sinkhorn_ref


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of a few tokens, so that small inputs also cross from one tile into the next."""
    monkeypatch.setattr(mhc_cpu, "TILE_BYTES", 16384)
    torch.manual_seed(0)


def inputs(T, n, C, dtype=torch.float32, std=1.0, n_logits=None):
    """Leaves for mhc_step. Nothing is symmetric or equal across streams; std: of the logits of H_res."""
    K = 2 * n + (n * n if n_logits is None else n_logits)
    x, y = torch.randn(T, n, C).to(dtype), torch.randn(T, C).to(dtype)
    H_post, H_res = 2 * torch.rand(T, n), (2 * torch.randn(T, n, n)).softmax(-1)
    phi, alpha, b = torch.randn(n * C, K) / (n * C) ** 0.5, torch.tensor([1.0, 0.7, 0.8 * std]), torch.randn(K)
    b[2 * n :] *= 0.6 * std
    maps = torch.float64 if dtype == torch.float64 else torch.float32
    return [x, y] + [v.to(maps) for v in (H_post, H_res, phi, alpha, b)]


def single_pass(step):
    """The step as a function that takes H_pre last."""
    return lambda *args, **kwargs: step(*args[:-1], H_pre=args[-1], **kwargs)


SINGLE_PASS = dict(step=single_pass(mhc_cpu.mhc_step), twin=single_pass(mhc_step_ref))


def without_y(args):
    """The arguments of the first form."""
    return [args[0], None, None, None, *args[4:]]


def evaluate(step, args, dtype=None, used=(1, 1, 1, 1, 1), **kwargs):
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
    args = inputs(63, n, 33, dtype, std)
    close(args)
    close([*args, torch.rand(63, n)], **SINGLE_PASS)


@pytest.mark.parametrize("T", [0, 1, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_counts_and_first_form(T, dtype):
    args = inputs(T, 4, 20, dtype)
    close(args)
    close(without_y(args))
    close([*without_y(args), torch.rand(T, 4)], **SINGLE_PASS)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [0, 1, 63])
def test_last_form(T, dtype, n):
    close(inputs(T, n, 33, dtype)[:4], mhc_cpu.mhc_post_res, mhc_post_res_ref)


@pytest.mark.parametrize("used", [*torch.eye(4).tolist(), (1, 1, 0, 0), (0, 0, 1, 1)])
def test_unused_outputs(used):
    args = inputs(5, 4, 20)
    close(args, used=used)
    close(without_y(args), used=used)


@pytest.mark.parametrize("used", [*torch.eye(5).tolist(), (1, 1, 0, 0, 0), (0, 0, 1, 1, 1)])
def test_unused_outputs_of_single_pass(used):
    args = [*inputs(5, 4, 20), torch.rand(5, 4)]
    close(args, **SINGLE_PASS, used=used)
    close(without_y(args), **SINGLE_PASS, used=used)


@pytest.mark.parametrize("name", MANIFOLDS)
def test_any_manifold_between_the_streams(name):
    n, manifold = 4, MANIFOLDS[name]
    args = inputs(63, n, 20, n_logits=manifold.n_logits(n))
    close(args, manifold=lambda logits: manifold.H_res(logits, n))
    close([*args, torch.rand(63, n)], **SINGLE_PASS, manifold=lambda logits: manifold.H_res(logits, n))


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("case", ["+-39.9", "up to 39.9", "every second token at std 80", "no token", "no iteration"])
def test_sinkhorn_on_M_and_on_log_M(case, n):
    """Right at the size where it changes from one to the other, and with both kinds of token side by side."""
    T, iters = 0 if case == "no token" else 400, 0 if case == "no iteration" else 20
    logits, w = torch.randn(n, n, T), torch.randn(n, n, T)
    if case == "+-39.9":
        logits = 39.9 * logits.sign()
    elif case == "up to 39.9":
        logits = 39.9 * (2 * torch.rand(n, n, T) - 1)
    elif case == "every second token at std 80":
        logits[..., ::2] *= 80

    def ours(z):
        return mhc_cpu.sinkhorn(z, iters).detach(), mhc_cpu.sinkhorn_backward(w.to(z.dtype), z, iters)

    def twin(z):
        z = z.permute(2, 0, 1).requires_grad_()
        H = sinkhorn_ref(z, iters)
        (g,) = torch.autograd.grad((H * w.to(z.dtype).permute(2, 0, 1)).sum(), z)
        return H.detach().permute(1, 2, 0), g.permute(1, 2, 0)

    for truth, ref, got in zip(twin(logits.double()), twin(logits), ours(logits), strict=True):
        size, error, allowed = ((v.abs().max().item() if T else 0) for v in (truth, got - truth, ref - truth))
        assert got.isfinite().all() and error <= 2 * allowed + 1e-6 * max(1, size)


def test_no_tokens_sinkhorn_depends_on_another_token():
    few, many = torch.randn(4, 4, 40), torch.randn(4, 4, 40)
    many[..., 1::2] *= 80
    many[..., ::2] = few[..., ::2]
    assert torch.equal(mhc_cpu.sinkhorn(few, 20)[..., ::2], mhc_cpu.sinkhorn(many, 20)[..., ::2])
    few, many = (mhc_cpu.sinkhorn_backward(torch.ones(4, 4, 40), z, 20) for z in (few, many))
    assert torch.equal(few[..., ::2], many[..., ::2])


def test_saturated_gates_keep_their_gradient():
    """H_pre and H_post whose logits are 20 and more: in fp32 1 - H is 0 there, its gradient is not."""
    args = inputs(9, 4, 20)
    args[6][:8] = torch.tensor([20.0, -20, 25, -25, 30, 20, -30, 22])
    truth, ours = (evaluate(f, args, d)[-1] for f, d in ((mhc_step_ref, torch.float64), (mhc_cpu.mhc_step, None)))
    assert (truth[:8] != 0).all()
    torch.testing.assert_close(ours[:8].double(), truth[:8], rtol=1e-4, atol=0)


HC = dict(step=mhc_cpu.hc_step, twin=hc_step_ref)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_hyper_connections_have_the_same_streams_and_their_own_maps(n, dtype):
    args = inputs(63, n, 33, dtype)
    args[4] = torch.randn(33, n + 2) / 33**0.5
    close(args, **HC)
    close(without_y(args), **HC)
    for used in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 1)):
        close(args, **HC, used=used)


def test_gradcheck():
    args = [v.requires_grad_() for v in inputs(3, 2, 5, torch.float64, 3)]
    assert torch.autograd.gradcheck(lambda *a: mhc_cpu.mhc_step(*a, sinkhorn_iters=7, eps=0.1), args)
    assert torch.autograd.gradcheck(lambda x, *p: mhc_cpu.mhc_step(x, None, None, None, *p), [args[0], *args[4:]])
    assert torch.autograd.gradcheck(mhc_cpu.mhc_post_res, args[:4])
    args.append(torch.rand(3, 2, dtype=torch.float64).requires_grad_())
    assert torch.autograd.gradcheck(single_pass(mhc_cpu.mhc_step), args)
    theta = torch.randn(5, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: mhc_cpu.hc_step(*a, eps=0.1), [*args[:4], theta, *args[5:7]])
    assert torch.autograd.gradcheck(lambda *a: single_pass(mhc_cpu.mhc_step)(*without_y(a)), args)


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


@pytest.mark.parametrize("form", [slice(4), slice(None)], ids=["post_res", "step"])
def test_the_number_of_operators_does_not_grow_with_the_tokens(form):
    """Nor when one gradient, without memory of its own, comes back for all streams: bmm takes it token by token."""

    def operators(T):
        args = [v.requires_grad_() for v in inputs(T, 4, 64)[form]]
        f = mhc_cpu.mhc_post_res if len(args) == 4 else mhc_cpu.mhc_step
        x = f(*args) if len(args) == 4 else f(*args)[0]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            x.sum(-2).sum().backward()
        return sum(event.count for event in seen.key_averages())

    assert operators(16) == operators(3)  # both within one tile


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
