"""The Triton kernels against float64: values and every gradient (interpreter; `pytest -m gpu` runs them compiled)."""

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mhc_ref
import sinkhorn_kernel
from mhc import mhc_post_res, mhc_step, sinkhorn
from tests.kernel_cases import (
    DEVICES,
    NAMES,
    assert_as_good_as_twin,
    call,
    interpreter,
    make_inputs,
    needs_triton,
    outputs_and_grads,
)

pytestmark = needs_triton
OUTS = ("x_next", "x_in", "H_post'", "H_res'")
SINGLE_OUTS = ("x_next", "x_in", "H_pre'", "H_post'", "H_res'")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory holds NaN: what a kernel forgets to write shows."""

    def poison(fresh):
        def make(*args, **kwargs):
            t = fresh(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return make

    for where, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(where, name, poison(getattr(where, name)))


def triton_step(*tensors):
    if tensors[4] is None:
        return mhc_post_res(*tensors[:4], impl="triton")
    return call(mhc_step, tensors, impl="triton")


def twin_step(*tensors):
    if tensors[4] is None:
        return mhc_ref.mhc_post_res_ref(*tensors[:4])
    return call(mhc_ref.mhc_step_ref, tensors)


CASES = [  # form, tokens, n, C, dtype, std of the logits
    *[("middle", 63, 4, 80, dtype, std) for dtype in (FP32, BF16) for std in (1, 3, 6, 80)],
    *[("middle", 17, n, 40, dtype, 1) for n in (1, 2, 8) for dtype in (FP32, BF16)],
    *[(form, 17, 4, 80, dtype, 3) for form in ("first", "last") for dtype in (FP32, FP16, BF16)],
    *[("single middle", 63, 4, 80, dtype, std) for dtype, std in ((FP32, 3), (BF16, 3), (FP32, 80), (BF16, 80))],
    *[("single middle", 17, n, 40, dtype, 3) for n, dtype in ((1, FP32), (2, FP16), (8, FP32), (8, BF16))],
    *[("single first", 17, 4, 80, dtype, 3) for dtype in (FP32, BF16)],
    *[("middle", T, 4, 33, FP32, 3) for T in (0, 1, 257)],
    ("middle", 63, 4, 80, FP16, 3),
    ("middle", 17, 4, 301, BF16, 3),  # five channel tiles, the last of 45, so two shares of the sums over channels
    ("first", 17, 2, 77, FP32, 6),
    ("last", 17, 8, 77, FP32, 1),
    *[("middle", 17, n, 77, dtype, 80) for n, dtype in ((1, FP32), (2, FP16), (8, BF16), (8, FP32))],
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form, T, n, C, dtype, std", CASES)
def test_values_and_gradients(form, T, n, C, dtype, std, device):
    tensors = make_inputs(T, n, C, dtype, std, device, form)
    with interpreter(device):
        got = outputs_and_grads(triton_step, tensors)
    twin = outputs_and_grads(twin_step, tensors)
    want = outputs_and_grads(twin_step, tensors, torch.float64)
    outs = SINGLE_OUTS if form.startswith("single") else OUTS if form != "last" else OUTS[:1]
    names = [*outs, *(f"d_{k}" for k, t in zip(NAMES, tensors, strict=False) if t is not None)]
    assert_as_good_as_twin(got, twin, want, names, logits=0 if dtype == BF16 or form == "last" else std)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "n, std, sinkhorn_iters",
    [(1, 1, 20), (2, 3, 20), (4, 6, 20), (4, 80, 20), (8, 3, 20), (4, 1, 0), (4, 3, 1), (4, 3, 7)],
)
def test_sinkhorn(n, std, sinkhorn_iters, device):
    logits = [std * torch.randn(3, 7, n, n, generator=torch.Generator().manual_seed(n)).to(device)]
    with interpreter(device):
        got = outputs_and_grads(lambda a: sinkhorn(a, sinkhorn_iters, impl="triton"), logits)
    twin = outputs_and_grads(lambda a: mhc_ref.sinkhorn_ref(a, sinkhorn_iters), logits)
    want = outputs_and_grads(lambda a: mhc_ref.sinkhorn_ref(a, sinkhorn_iters), logits, torch.float64)
    assert_as_good_as_twin(got, twin, want, ["H_res", "d_logits"])


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_give_the_same_bits(device):
    tensors = make_inputs(40, 4, 150, BF16, 3, device)
    with interpreter(device):
        first, second = (outputs_and_grads(triton_step, tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", [{0}, {1}, {2}, {3}, {1, 3}])
def test_unused_outputs(used, device):
    tensors = make_inputs(17, 4, 40, FP32, 3, device)
    with interpreter(device):
        got = outputs_and_grads(triton_step, tensors, use=used)
    twin = outputs_and_grads(twin_step, tensors, use=used)
    want = outputs_and_grads(twin_step, tensors, torch.float64, use=used)
    got, twin, want = ([torch.zeros(()) if t is None else t for t in ts] for ts in (got, twin, want))
    for g, t, w, name in zip(got, twin, want, [*OUTS, *NAMES[:7]], strict=True):  # the twin leaves some gradients None
        assert_as_good_as_twin([g.expand_as(w) if w.ndim else g.sum()], [t], [w], [name])


@pytest.mark.parametrize("device", DEVICES)
def test_y_in_another_dtype(device):
    """Under autocast the sublayer answers in bf16 while the streams are fp32."""
    tensors = make_inputs(17, 4, 40, FP32, 3, device)
    tensors[1] = tensors[1].to(BF16)
    with interpreter(device):
        got = outputs_and_grads(triton_step, tensors)
    twin, want = outputs_and_grads(twin_step, tensors), outputs_and_grads(twin_step, tensors, torch.float64)
    assert_as_good_as_twin(got, twin, want, [*OUTS, *NAMES[:7]])


def test_another_number_of_tokens_compiles_nothing_anew(monkeypatch):
    """Of a kernel's numbers those may be specialised on that one model has once; the others are counts of tokens."""
    monkeypatch.setattr(sinkhorn_kernel.triton, "jit", lambda kernel, do_not_specialize: do_not_specialize)
    exempt = {*sinkhorn_kernel.jit(None), "C", "K", "size", "eps"}
    kernels = [v.fn for name, v in vars(sinkhorn_kernel).items() if name.endswith("_kernel")]
    assert len(kernels) > 5
    for kernel in kernels:
        numbers = {name for name, p in inspect.signature(kernel).parameters.items() if "constexpr" not in str(p)}
        assert {name for name in numbers if not name.endswith("_ptr")} <= exempt, kernel


class Zeros(TorchDispatchMode):
    """Counts the elements of tensors made of zeros."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += out.numel() if "zero" in str(func) else 0
        return out


@pytest.mark.parametrize("impl, T", [("eager", 300), ("triton", 150)])
def test_outputs_that_nobody_uses_get_no_gradient_made_of_zeros(impl, T):
    tensors = [t.requires_grad_() for t in make_inputs(T, 4, 40, FP32)]
    with interpreter("cpu"):
        x_next = mhc_step(*tensors, impl=impl)[0]
        with Zeros() as zeros:
            x_next.sum().backward()
    assert zeros.made < T * 40  # which x_in's alone would have; sums begin with some
