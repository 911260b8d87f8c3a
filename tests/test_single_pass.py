"""Single-pass mHC, three sites deep, against a float64 reference written from the equations: values and gradients.

A site maps the streams that it makes, and reads them through the H_pre of the site before. So every H_pre gets its
gradient from the next site, and the last one's from what reads the streams at the end.
"""

import statistics

import pytest
import torch

import mhc

SITES, T, N, C = 3, 5, 4, 12
FP32, FP64 = torch.float32, torch.float64
IMPLS = ["ref", "eager"]


def make(std, n=N, seed=0):
    """x, then phi, alpha, b and the sublayer's weight of each site, in float64. Nothing is symmetric."""
    gen = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=gen, dtype=FP64)  # noqa: E731
    tensors = [randn(T, n, C)]
    for _ in range(SITES):
        phi, alpha = randn(n * C, n * n + 2 * n) / (n * C) ** 0.5, std * torch.tensor([0.7, -0.8, 0.9], dtype=FP64)
        tensors += [phi, alpha, 0.5 * std * randn(n * n + 2 * n), randn(C, C) / C**0.5]
    return [t.float().double() for t in tensors]  # exact in both dtypes


def by_the_equations(x, *weights):
    """One token after the other, one stream after the other; exp and divisions as they stand."""
    n = x.shape[1]
    outs = []
    for token in x:
        streams, H_pre = list(token), [1.0] + [0.0] * (n - 1)  # the first site reads stream 0
        y = H_post = H_res = None
        for site in range(SITES):
            phi, alpha, b, W = weights[4 * site : 4 * site + 4]
            if y is not None:  # Eq 3
                streams = [sum(H_res[i, j] * streams[j] for j in range(n)) + H_post[i] * y for i in range(n)]
            x_in = sum(H_pre[i] * streams[i] for i in range(n))
            v = torch.cat(streams)
            v = v / ((v * v).sum() / len(v)).sqrt()
            H_pre = 1 / (1 + torch.exp(-(alpha[0] * (v @ phi[:, :n]) + b[:n])))
            H_post = 2 / (1 + torch.exp(-(alpha[1] * (v @ phi[:, n : 2 * n]) + b[n : 2 * n])))
            res = (alpha[2] * (v @ phi[:, 2 * n :]) + b[2 * n :]).reshape(n, n)
            H_res = torch.exp(res - res.max())
            for _ in range(20):
                H_res = H_res / H_res.sum(0)
                H_res = H_res / H_res.sum(1, keepdim=True)
            y = torch.tanh(x_in @ W)
        streams = [sum(H_res[i, j] * streams[j] for j in range(n)) + H_post[i] * y for i in range(n)]
        outs.append(sum(H_pre[i] * streams[i] for i in range(n)))  # what the final norm reads
    return torch.stack(outs)


def chain(x, *weights, impl="ref"):
    """The same by mhc_step; the end by mhc_post_res and mhc_pre."""
    y = H_post = H_res = None
    H_pre = torch.zeros(x.shape[:-1], dtype=x.dtype)
    H_pre[:, 0] = 1
    for site in range(SITES):
        *params, W = weights[4 * site : 4 * site + 4]
        x, x_in, H_pre, H_post, H_res = mhc.mhc_step(x, y, H_post, H_res, *params, impl=impl, H_pre=H_pre)
        y = torch.tanh(x_in @ W)
    return mhc.mhc_pre(mhc.mhc_post_res(x, y, H_post, H_res, impl=impl), H_pre)


def evaluate(f, tensors, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    out = f(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=FP64).float()
    return [out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)]


def worst(got, want):
    return ((got.double() - want).abs().max() / want.abs().max()).item()


NAMES = ["out", "d_x", *(f"d_{name} of site {s}" for s in range(SITES) for name in ("phi", "alpha", "b", "W"))]


@pytest.mark.parametrize("std, n", [(1, 4), (3, 4), (6, 2), (1, 1)])
def test_the_twin_is_the_equations(std, n):
    tensors = make(std, n)
    want = evaluate(by_the_equations, tensors, FP64)
    for name, g, w in zip(NAMES, evaluate(chain, tensors, FP64), want, strict=True):
        assert worst(g, w) < 1e-9, name
    for site in range(SITES):
        d_phi_pre = want[2 + 4 * site][:, :n]
        assert d_phi_pre.abs().max() > 1e-3, "H_pre has a gradient at every site, through what the next one reads"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("std, seeds", [(1, 1), (80, 7)])
def test_every_impl_in_fp32_is_as_good_as_the_twin(impl, std, seeds):
    """The median over seeds: at std 80 each site multiplies what rounding the one before has left, and one seed is a
    throw of dice."""
    errors = []  # of every seed: pairs (this one's, the twin's)
    for seed in range(seeds):
        tensors = make(std, seed=seed)
        want = evaluate(by_the_equations if std == 1 else chain, tensors, FP64)
        got, twin = (evaluate(lambda *t, i=i: chain(*t, impl=i), tensors, FP32) for i in (impl, "ref"))
        assert all(g.isfinite().all() for g in got)
        errors.append([(worst(g, w), worst(t, w)) for g, t, w in zip(got, twin, want, strict=True)])
    for name, pairs in zip(NAMES, zip(*errors, strict=True), strict=True):
        ours, twins = map(statistics.median, zip(*pairs, strict=True))
        assert twins < (1e-5 if std == 1 else 1e-3), name
        assert ours <= 2 * twins + 1e-6, f"{name}: {ours:.2e}, the twin {twins:.2e}"


@pytest.mark.parametrize("z", [-80.0, -20.0, -1.0, 0.0, 5.0, 20.0, 80.0])
def test_a_saturated_gate_keeps_its_gradient(z):
    """In fp32 1 - sigmoid(20) is 0; sigmoid(-20), 2e-9, is not."""
    from mhc_ref import sigmoid_ref

    small = torch.tensor(z, requires_grad=True)
    sigmoid_ref(small).backward()
    exact = torch.tensor(z, dtype=FP64)
    assert small.grad.item() == pytest.approx((exact.sigmoid() * (-exact).sigmoid()).item(), rel=1e-5)
    assert sigmoid_ref(small).item() == pytest.approx(exact.sigmoid().item(), rel=1e-5)
