"""mhc_step, the boundary between two sublayers of mHC, for any model: the door to its three implementations.

from mhc import mhc_post_res, mhc_step

x_next, x_in, H_post, H_res = mhc_step(x, y, H_post, H_res, phi, alpha, b)    # first sublayer: y = H_* = None
x_next = mhc_post_res(x, y, H_post, H_res)                                    # after the last one

impl       what runs                                            where
'ref'      mhc_ref.py: the equations, with autograd             everywhere
'eager'    mhc_cpu.py: tiles, and a backward written by hand    everywhere; for CPUs
'triton'   mhc_gpu.py: the kernels of sinkhorn_kernel.py        GPUs, and Triton's interpreter
"""

import torch

import mhc_cpu
import mhc_gpu
from mhc_gpu import STREAMS
from mhc_ref import (
    hc_coeffs_ref,
    hc_step_ref,
    mhc_coeffs_ref,
    mhc_post_res_ref,
    mhc_pre_ref,
    mhc_step_ref,
    sinkhorn_ref,
)
from sinkhorn_kernel import triton

# ----------------------------------------------------------------------------------------------------------------------
# The public functions. Signatures, shapes and mathematics are those of the twins in mhc_ref.py.

IMPLS = ("ref", "eager", "triton")
INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on a CPU
# for a look at the mappings, and the end of a model; between sublayers nothing needs them
mhc_coeffs, hc_coeffs, mhc_pre = mhc_coeffs_ref, hc_coeffs_ref, mhc_pre_ref


@torch.compiler.assume_constant_result
def why_no_triton(device):
    """What keeps the kernels from running on this device, as the end of a sentence; None if nothing does."""
    if triton is None:
        return "Triton is not installed (there is no wheel for this platform, or: pip install triton)"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the kernels need a CUDA or ROCm GPU and these tensors are on '{device}' (or set TRITON_INTERPRET=1)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"they need compute capability 8.0 and {torch.cuda.get_device_name(device)} is older"
    return None


def resolve_impl(impl="auto", device="cpu", n=4):
    """The implementation that `impl` stands for on this device with n streams: 'ref', 'eager' or 'triton'.

    'auto' is 'triton' where the kernels run, for a number of streams they take, and 'eager' elsewhere (under Triton's
    interpreter too: it is for tests); train.py prints which it is. Raises ValueError, with the reason, for one that
    cannot run here.
    """
    if impl == "auto":
        return "eager" if INTERPRETED or n not in STREAMS or why_no_triton(torch.device(device)) else "triton"
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: wanted 'auto' or one of {', '.join(map(repr, IMPLS))}")
    if impl == "triton" and (why_not := why_no_triton(torch.device(device))):
        raise ValueError(f"impl='triton' cannot run: {why_not}. impl='auto' picks one that can")
    return impl


def mhc_step(
    x, y, H_post, H_res, phi, alpha, b, sinkhorn_iters=20, eps=1e-20, impl="auto", H_pre=None, manifold=None
):  # fmt: skip
    """The boundary between two sublayers: close the one before (Eq 3), map and read for the one after (Eq 7-9).

    x (..., n, C); y (..., C), H_post (..., n), H_res (..., n, n) of the sublayer before, all three None at the first;
    phi (nC, n^2+2n), alpha (3,), b (n^2+2n,) of the sublayer after. -> x_next (..., n, C), x_in (..., C), and H_post
    and H_res of the sublayer after. x_next is x itself in the first form. impl: see resolve_impl.

    H_pre (..., n), if given, makes it single-pass mHC: x_next is read through it, the H_pre of the boundary before (at
    the first: one-hot, stream 0), and the one made here is returned for the boundary after:
    -> x_next, x_in, H_pre, H_post, H_res.

    manifold, if given, takes Sinkhorn's place: a differentiable function of the K logits of H_res, (..., K) in fp32 ->
    H_res (..., n, n); phi and b then have 2n + K columns.
    """
    impl = resolve_impl(impl, x.device, x.shape[-2])
    args = (x, y, H_post, H_res, phi, alpha, b, sinkhorn_iters, eps)
    if impl == "ref":
        return mhc_step_ref(*args, H_pre, manifold)
    if impl == "eager":
        return mhc_cpu.mhc_step(*args, H_pre, manifold)
    return mhc_gpu.mhc_step(*args, H_pre, manifold)


def mhc_post_res(x, y, H_post, H_res, impl="auto"):
    """The last boundary, with no sublayer after: x_next[i] = sum_j H_res[i, j] x[j] + H_post[i] y (Eq 3).

    Shapes as in mhc_step; the same kernels without the second half. impl: see resolve_impl.
    """
    impl = resolve_impl(impl, x.device, x.shape[-2])
    if impl == "ref":
        return mhc_post_res_ref(x, y, H_post, H_res)
    if impl == "eager":
        return mhc_cpu.mhc_post_res(x, y, H_post, H_res)
    return mhc_gpu.mhc_post_res(x, y, H_post, H_res)


def hc_step(x, y, H_post, H_res, theta, alpha, b, eps=1e-20, impl="auto"):
    """mhc_step for Hyper-Connections: theta (C, n+2), alpha (3,), b (n^2+2n,) make unconstrained mappings (Eq 5)."""
    impl = resolve_impl(impl, x.device, x.shape[-2])
    if impl == "ref":
        return hc_step_ref(x, y, H_post, H_res, theta, alpha, b, eps)
    if impl == "eager":
        return mhc_cpu.hc_step(x, y, H_post, H_res, theta, alpha, b, eps)
    return hyper_step(x, y, H_post, H_res, lambda x: hc_coeffs(x, theta, alpha, b, eps), impl)


def hyper_step(x, y, H_post, H_res, maps, impl="auto"):
    """mhc_step for any other mappings of the streams.

    maps: a differentiable function, x_next (..., n, C) -> H_pre (..., n), H_post (..., n), H_res (..., n, n). The rest
    as in mhc_step. impl: see resolve_impl.
    """
    impl = resolve_impl(impl, x.device, x.shape[-2])
    if impl == "triton":
        return mhc_gpu.hyper_step(x, y, H_post, H_res, maps)
    x_next = x if y is None else mhc_post_res(x, y, H_post, H_res, impl)
    H_pre, H_post, H_res = maps(x_next)
    return x_next, mhc_pre(x_next, H_pre), H_post, H_res


def sinkhorn(logits, sinkhorn_iters=20, impl="auto"):
    """Eq 9: logits (..., n, n) -> H_res (..., n, n), fp32, rows exact. impl: 'auto', 'ref' or 'triton'."""
    if impl not in ("auto", "ref", "triton"):
        raise ValueError(f"impl={impl!r}: sinkhorn has 'auto', 'ref' and 'triton'")
    if resolve_impl(impl, logits.device, logits.shape[-1]) != "triton":
        return sinkhorn_ref(logits, sinkhorn_iters)
    return mhc_gpu.sinkhorn(logits, sinkhorn_iters)
