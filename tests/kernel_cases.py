"""Inputs and yardsticks that the tests of the kernels share."""

import contextlib

import pytest
import torch

import sinkhorn_kernel
from tools.kernel_report import hardware_arithmetic

NAMES = ("x", "y", "H_post", "H_res", "phi", "alpha", "b", "H_pre")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
needs_triton = pytest.mark.skipif(sinkhorn_kernel.triton is None, reason="Triton is not installed")


def interpreter(device):
    return hardware_arithmetic() if device == "cpu" else contextlib.nullcontext()


def make_inputs(T, n, C, dtype, std=1.0, device="cpu", form="middle", seed=0):
    """mhc_step's tensors, as fp32 values exact in `dtype`; logits of standard deviation std; None where absent.

    form: 'first', 'middle' or 'last'; 'single first' and 'single middle' have H_pre as an eighth tensor.
    """
    gen = torch.Generator().manual_seed(seed)
    M = n * n + 2 * n
    randn = lambda *shape: torch.randn(*shape, generator=gen)  # noqa: E731
    x, y = randn(T, n, C).to(dtype), randn(T, C).to(dtype)
    H_post, H_res = 2 * randn(T, n).sigmoid(), (2 * randn(T, n, n)).softmax(-1)
    phi = randn(n * C, M) / (n * C) ** 0.5
    alpha, b = std * torch.tensor([0.7, -0.8, 0.9]), std * 0.5 * randn(M)
    tensors = [x, y, H_post, H_res, phi, alpha, b]
    if form.endswith("first"):
        tensors[1:4] = [None] * 3
    if form.startswith("single"):
        tensors.append(randn(T, n))
    if form == "last":
        tensors[4:] = [None] * 3
    return [None if t is None else t.to(device) for t in tensors]


def call(step, tensors, **kwargs):
    """mhc_step or its twin, of the tensors of any form but 'last'."""
    return step(*tensors[:7], H_pre=tensors[7] if len(tensors) > 7 else None, **kwargs)


def outputs_and_grads(f, tensors, dtype=None, use=None, seed=1):
    """f's outputs, then the gradients of its inputs, for a random linear loss over the outputs (those in `use`)."""
    tensors = [None if t is None else t.to(dtype or t.dtype).detach().clone().requires_grad_() for t in tensors]
    outs = f(*tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    gen = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=gen).to(torch.bfloat16).to(o) for o in outs]  # exact in every dtype
    used = [(o, w) for i, (o, w) in enumerate(zip(outs, weights, strict=True)) if use is None or i in use]
    torch.autograd.backward([o for o, _ in used], [w for _, w in used])
    return [o.detach() for o in outs] + [t.grad for t in tensors if t is not None]


def worst(got, want):
    """Largest error, in units of the largest value wanted."""
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def assert_as_good_as_twin(got, twin, want, names, logits=0.0):
    """Every error at most twice the error that the same-precision twin makes, + 1e-6: no tolerance to tune.

    logits: their size, where products in tf32x3 make them. It keeps 22 bits of a product, the twin 24, and a logit that
    is off by logits * 2**-22 moves what comes after it by as much: allowed on top.
    """
    assert len(got) == len(want)
    for name, g, t, w in zip(names, got, twin, want, strict=True):
        assert g.isfinite().all(), f"{name} is not finite"
        assert g.shape == w.shape and g.dtype == t.dtype, f"{name}: {g.shape} {g.dtype}"
        allowed = 2 * worst(t, w) + 1e-6 + logits * 2**-22
        assert worst(g, w) <= allowed, f"{name}: error {worst(g, w):.2e}, the twin's {worst(t, w):.2e}"
