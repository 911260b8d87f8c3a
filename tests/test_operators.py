"""The custom operators as PyTorch sees them: fakes, autograd, torch.compile, recomputation; and the dispatch."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mhc
import mhc_gpu
from manifolds import MANIFOLDS
from mhc_ref import map_dtype
from tests.kernel_cases import (
    assert_as_good_as_twin,
    call,
    interpreter,
    make_inputs,
    needs_triton,
    outputs_and_grads,
)

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def interpreted():
    with interpreter("cpu"):
        yield


def step(*tensors):
    return call(mhc.mhc_step, tensors, impl="triton")


@needs_triton
@pytest.mark.parametrize("form", ["first", "middle", "last", "single first", "single middle"])
def test_opcheck_step(form, interpreted):
    x, y, H_post, H_res, phi, alpha, b, *rest = make_inputs(3, 2, 20, FP32, form=form)
    single_pass = H_pre = rest[0] if rest else None
    x_next, x_in, sums = check(mhc_gpu.streams, x, y, H_post, H_res, phi, H_pre)
    x_next, d_sums = x if y is None else x_next, None
    if phi is not None:
        settings = (2, 40, 3, 1e-20)  # n, nC, iterations, eps
        H_pre, H_post_next, H_res_next = check(mhc_gpu.maps, sums, alpha, b, *settings)
        if single_pass is None:
            x_in = check(mhc_gpu.read, x_next, H_pre)
            check(mhc_gpu.read_backward, x_next, torch.randn_like(x_in))
        d_sums, *_ = check(mhc_gpu.maps_backward, H_pre, H_post_next, H_res_next, sums, alpha, b, *settings)
    d_x_in = None if phi is None else torch.randn_like(x_in)
    tensors = (x, y, H_post, H_res, x_next, phi, H_pre)
    check(mhc_gpu.streams_backward, torch.randn_like(x), d_x_in, d_sums, *tensors, single_pass is not None)


def check(function, *args):
    """The operator under a function of mhc_gpu.py: its schema and its fake version are true. -> its outputs"""
    torch.library.opcheck(function.op, args, test_utils=("test_schema", "test_faketensor"))
    return function(*args)


@needs_triton
def test_opcheck_sinkhorn(interpreted):
    logits = torch.randn(2, 3, 4, 4)
    check(mhc_gpu.sinkhorn_forward, logits, 3)
    check(mhc_gpu.sinkhorn_backward, logits, torch.randn(2, 3, 4, 4), 3)


@needs_triton
def test_double_use_and_a_second_backward(interpreted):
    """Outputs used twice, the same tensors in two calls, backward twice over one graph: sums of the single parts."""
    tensors = make_inputs(5, 2, 20, FP32)
    once = outputs_and_grads(step, tensors)[4:]
    doubled = outputs_and_grads(lambda *t: tuple(a + b for a, b in zip(step(*t), step(*t), strict=True)), tensors)[4:]
    for a, b in zip(once, doubled, strict=True):
        torch.testing.assert_close(2 * a, b)
    leaves = [t.requires_grad_() for t in tensors]
    loss = sum(o.square().sum() for o in step(*leaves))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))


@needs_triton
def test_any_leading_shape_and_strides(interpreted):
    flat = make_inputs(6, 2, 20, FP32)
    shaped = [t.unflatten(0, (2, 3)) for t in flat[:4]] + flat[4:]
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in shaped[:4]] + [flat[4].t().contiguous().t()]
    assert not strided[0].is_contiguous()
    want = outputs_and_grads(step, flat)
    for got in (outputs_and_grads(step, shaped), outputs_and_grads(step, strided + flat[5:])):
        assert all(torch.equal(g.reshape(w.shape), w) for g, w in zip(got, want, strict=True))
    assert outputs_and_grads(step, shaped)[0].shape == (2, 3, 2, 20)


@needs_triton
@pytest.mark.parametrize("form", ["middle", "single middle"])
@pytest.mark.parametrize("name", ["identity", "kronecker", "orthostochastic"])  # 0, 2 and 28 logits beside the gates
def test_other_manifolds_take_sinkhorns_place(name, form, interpreted):
    n, manifold = 4, MANIFOLDS[name]
    tensors, M = make_inputs(9, n, 20, FP32, form=form), 2 * n + manifold.n_logits(n)
    gen = torch.Generator().manual_seed(2)
    tensors[4], tensors[6] = torch.randn(n * 20, M, generator=gen) / 9, torch.randn(M, generator=gen)
    options = {"manifold": functools.partial(manifold.H_res, n=n)}
    used = set(range(len(tensors) - (4 if name == "identity" else 3)))  # the identity has no gradient
    got = outputs_and_grads(lambda *t: call(mhc.mhc_step, t, impl="triton", **options), tensors, use=used)
    twin = outputs_and_grads(lambda *t: call(mhc.mhc_step_ref, t, **options), tensors, use=used)
    want = outputs_and_grads(lambda *t: call(mhc.mhc_step_ref, t, **options), tensors, torch.float64, use=used)
    assert_as_good_as_twin(got, twin, want, range(len(got)))


@needs_triton
@pytest.mark.parametrize("form", ["first", "middle"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_hyper_step_reads_through_any_maps(dtype, form, interpreted):
    """Maps that are functions of the streams by PyTorch; their gradient and the read's meet in the streams' kernel."""

    def maps(x):
        dynamic = x.to(map_dtype(x)).mean(-1).tanh()  # (T, n)
        return dynamic + 1, 2 * dynamic - 1, dynamic.unsqueeze(-1) * dynamic.flip(-1).unsqueeze(-2)

    tensors = make_inputs(17, 4, 40, dtype, form=form)[:4]
    got = outputs_and_grads(lambda *t: mhc.hyper_step(*t, maps, impl="triton"), tensors)
    twin = outputs_and_grads(lambda *t: mhc.hyper_step(*t, maps, impl="ref"), tensors)
    want = outputs_and_grads(lambda *t: mhc.hyper_step(*t, maps, impl="ref"), tensors, torch.float64)
    assert_as_good_as_twin(got, twin, want, range(len(got)))


@needs_triton
def test_autocast_leaves_the_mappings_alone(interpreted):
    tensors = make_inputs(5, 2, 20, BF16)
    want = outputs_and_grads(step, tensors)
    with torch.autocast("cpu", BF16):
        got = outputs_and_grads(step, tensors)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def two_boundaries(x, y, H_post, H_res, phi, alpha, b, step=step):
    x, x_in, H_post, H_res = step(x, y, H_post, H_res, phi, alpha, b)
    x, x_in, H_post, H_res = step(x, x_in.tanh(), H_post, H_res, phi, alpha, b)
    return mhc.mhc_post_res(x, x_in.tanh(), H_post, H_res, impl="triton")


@needs_triton
def test_compile_traces_through_without_a_break(interpreted):
    tensors = make_inputs(5, 2, 20, FP32)
    compiled = torch.compile(two_boundaries, fullgraph=True, backend="aot_eager")
    for g, w in zip(*(outputs_and_grads(f, tensors) for f in (compiled, two_boundaries)), strict=True):
        torch.testing.assert_close(g, w)


@needs_triton
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_gives_the_same_bits(use_reentrant, interpreted):
    tensors = make_inputs(5, 2, 20, BF16)
    want = outputs_and_grads(two_boundaries, tensors)
    got = outputs_and_grads(lambda *t: checkpoint(two_boundaries, *t, use_reentrant=use_reentrant), tensors)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_resolve_impl(monkeypatch):
    assert [mhc.resolve_impl(impl, "cpu") for impl in ("auto", "ref", "eager")] == ["eager", "ref", "eager"]
    with pytest.raises(ValueError, match="impl='tritn': wanted 'auto' or one of 'ref', 'eager'"):
        mhc.resolve_impl("tritn", "cpu")
    monkeypatch.setattr(mhc, "INTERPRETED", False)
    with pytest.raises(ValueError, match="need a CUDA or ROCm GPU and these tensors are on 'cpu'"):
        mhc.resolve_impl("triton", "cpu")
    monkeypatch.setattr(mhc, "triton", None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        mhc.resolve_impl("triton", "cuda")
    assert mhc.resolve_impl("auto", "cuda") == "eager"


@pytest.mark.parametrize("impl", ["auto", "ref", "eager"])
def test_every_impl_is_dispatched(impl):
    tensors = make_inputs(5, 3, 20, FP32)
    want = mhc.mhc_step_ref(*tensors)
    for g, w in zip(mhc.mhc_step(*tensors, impl=impl), want, strict=True):
        torch.testing.assert_close(g, w)
    torch.testing.assert_close(mhc.mhc_post_res(*tensors[:4], impl=impl), want[0])
    hc = [*tensors[:4], tensors[4][:20, :5].contiguous(), *tensors[5:]]
    for g, w in zip(mhc.hc_step(*hc, impl=impl), mhc.hc_step_ref(*hc), strict=True):
        torch.testing.assert_close(g, w)
    assert torch.equal(mhc.sinkhorn(tensors[3]), mhc.sinkhorn_ref(tensors[3]))
    with pytest.raises(ValueError, match="sinkhorn has 'auto', 'ref' and 'triton'"):
        mhc.sinkhorn(tensors[3], impl="eager")


@needs_triton
def test_what_the_kernels_do_not_take():
    with pytest.raises(ValueError, match="1, 2, 4 or 8 streams, got torch.float32 with 3 streams"):
        step(*make_inputs(2, 3, 20, FP32))
    with pytest.raises(ValueError, match="got torch.float64 with 2 streams"):
        step(*make_inputs(2, 2, 20, torch.float64))
    tensors = make_inputs(2, 2, 20, BF16)
    with pytest.raises(ValueError, match="wants phi in fp32 .Eq 10-13., got torch.bfloat16"):
        step(*tensors[:4], tensors[4].to(BF16), *tensors[5:])


@needs_triton
def test_ieee_products_on_request(interpreted, monkeypatch):
    tensors = make_inputs(3, 2, 20, BF16)
    want = step(*tensors)
    monkeypatch.setattr(mhc_gpu.kernels, "DOTS", "ieee")
    for g, w in zip(step(*tensors), want, strict=True):
        torch.testing.assert_close(g, w)
    monkeypatch.setattr(mhc_gpu.kernels, "DOTS", "iee")
    with pytest.raises(ValueError, match="wanted 'auto' or 'ieee'"):
        step(*tensors)


def test_the_file_imports_without_triton():
    import subprocess
    import sys
    from pathlib import Path

    code = "import sys; sys.modules['triton'] = None\nimport mhc as k, torch\n"
    code += "assert k.triton is None and k.resolve_impl('auto', 'cpu') == 'eager'\nk.sinkhorn(torch.zeros(2, 4, 4))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
