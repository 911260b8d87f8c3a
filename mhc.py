"""mhc_step, the boundary between two sublayers of mHC, for any model: the door to its three implementations.

    from mhc import mhc_post_res, mhc_step

    x_next, x_in, H_post, H_res = mhc_step(x, y, H_post, H_res, phi, alpha, b)    # first sublayer: y = H_* = None
    x_next = mhc_post_res(x, y, H_post, H_res)                                    # after the last one

    impl       what runs                                            where
    'ref'      mhc_ref.py: the equations, with autograd             everywhere
    'eager'    mhc_cpu.py: tiles, and a backward written by hand    everywhere; for CPUs
    'triton'   sinkhorn_kernel.py, by the operators below           GPUs, and Triton's interpreter

The operators are PyTorch custom ops with fake versions, so that torch.compile and the meta device see shapes instead of
kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mhc_cpu
import sinkhorn_kernel as kernels
from mhc_ref import mhc_coeffs_ref, mhc_post_res_ref, mhc_pre_ref, mhc_step_ref, sinkhorn_ref
from sinkhorn_kernel import triton


def tokens_of(x):
    """T: all leading dimensions of x (..., n, C) as one."""
    return x.numel() // (x.shape[-2] * x.shape[-1])


@torch.library.custom_op("mhc::step", mutates_args=())
def step_op(
    x: Tensor, y: Tensor | None, H_post: Tensor | None, H_res: Tensor | None,
    phi: Tensor | None, alpha: Tensor | None, b: Tensor | None, sinkhorn_iters: int, eps: float,
) -> list[Tensor]:  # fmt: skip
    """mhc_step's kernel: x_next, x_in, H_post', H_res', proj, r; empty where the form has none."""
    outs = step_shapes(x, y, H_post, H_res, phi, alpha, b, sinkhorn_iters, eps)
    (n, C), T = x.shape[-2:], tokens_of(x)
    if T:
        BT, BC, options = kernels.blocks("step", n, C, x.dtype)
        ins = [None if t is None else t.contiguous() for t in (x, y, H_post, H_res, phi, alpha, b)]
        kernels.mhc_step_kernel[(triton.cdiv(T, BT),)](
            *ins, *outs, T, C, eps, n=n, ITERS=sinkhorn_iters, HAS_Y=y is not None, HAS_NEXT=phi is not None,
            PRECISION=kernels.precision(x), BT=BT, BC=BC, **options,
        )  # fmt: skip
    return outs


@step_op.register_fake
def step_shapes(x, y, H_post, H_res, phi, alpha, b, sinkhorn_iters, eps):
    lead, (n, C) = x.shape[:-2], x.shape[-2:]
    f32 = {"dtype": torch.float32}
    x_next = x.new_empty(x.shape if y is not None else (0,))
    if phi is None:
        return [x_next] + [x.new_empty(0) for _ in range(5)]
    return [
        x_next, x.new_empty(*lead, C), x.new_empty(*lead, n, **f32), x.new_empty(*lead, n, n, **f32),
        x.new_empty(*lead, n * n + 2 * n, **f32), x.new_empty(*lead, **f32),
    ]  # fmt: skip


@torch.library.custom_op("mhc::step_backward", mutates_args=())
def step_backward_op(
    d_x_next: Tensor, d_x_in: Tensor, d_H_post_next: Tensor, d_H_res_next: Tensor,
    x: Tensor, y: Tensor | None, H_post: Tensor | None, H_res: Tensor | None, x_next: Tensor,
    phi: Tensor | None, alpha: Tensor | None, b: Tensor | None, proj: Tensor, r: Tensor, sinkhorn_iters: int,
) -> list[Tensor]:  # fmt: skip
    """d_x, d_y, d_H_post, d_H_res, d_phi, d_alpha, d_b; empty where the form has none."""
    args = (d_x_next, d_x_in, d_H_post_next, d_H_res_next, x, y, H_post, H_res, x_next, phi, alpha, b, proj, r)
    d_x, d_y, d_H_post, d_H_res, d_phi, d_alpha, d_b = outs = step_backward_shapes(*args, sinkhorn_iters)
    (n, C), T = x.shape[-2:], tokens_of(x)
    if not T:
        return [t.zero_() for t in outs]
    d_x_next, d_x_in, d_H_post_next, d_H_res_next, x, y, H_post, H_res, x_next, phi, alpha, b, proj, r = [
        None if t is None else t.contiguous() for t in args
    ]
    H_pre = d_proj = d_square = None
    if phi is not None:
        maps = (d_H_post_next, d_H_res_next, proj, r, alpha, b)
        H_pre, d_proj, d_square, d_alpha, d_b = maps_backward(x_next, d_x_in, *maps, sinkhorn_iters)
        d_phi = phi_backward(x_next, d_proj)
    BT, BC, options = kernels.blocks("streams", n, C, x.dtype)
    shares = min(kernels.CHANNEL_SHARES, triton.cdiv(C, BC))
    d_H_post, d_H_res = (t.new_empty(shares, *t.shape) for t in (d_H_post, d_H_res))
    kernels.streams_backward_kernel[(triton.cdiv(T, BT), shares)](
        x, y, H_post, H_res, phi, d_x_next, d_x_in, H_pre, d_proj, d_square, d_x, d_y, d_H_post, d_H_res,
        T, C, triton.cdiv(triton.cdiv(C, BC), shares), n=n, MP=padded_columns(n), HAS_Y=y is not None,
        HAS_NEXT=phi is not None, PRECISION=kernels.precision(x, to_bf16=True), BT=BT, BC=BC, **options,
    )  # fmt: skip
    return [d_x, d_y, d_H_post.sum(0), d_H_res.sum(0), d_phi, d_alpha, d_b]


def maps_backward(x_next, d_x_in, d_H_post, d_H_res, proj, r, alpha, b, sinkhorn_iters):
    """-> H_pre again, the gradients of proj and (as a factor on x_next) of the norm; those of alpha and b."""
    (n, C), T, M = x_next.shape[-2:], tokens_of(x_next), proj.shape[-1]
    BT, BC, options = kernels.blocks("maps", n, C, x_next.dtype)
    programs = triton.cdiv(T, BT)
    H_pre, d_proj, d_square = r.new_empty(T, n), r.new_empty(T, M), r.new_empty(T)
    shares = r.new_empty(programs, 2, M)
    kernels.maps_backward_kernel[(programs,)](
        x_next, d_x_in, d_H_post, d_H_res, proj, r, alpha, b, H_pre, d_proj, d_square, shares, T, C,
        n=n, ITERS=sinkhorn_iters, HISTORY=triton.next_power_of_2(max(1, sinkhorn_iters)), BT=BT, BC=BC, **options,
    )  # fmt: skip
    d_b, d_scale = shares.sum(0)
    return H_pre, d_proj, d_square, torch.stack([part.sum() for part in d_scale.split([n, n, n * n])]), d_b.clone()


def phi_backward(x_next, d_proj):
    """d_phi (nC, n^2+2n) = vec(x_next)^T d_proj, as shares over tokens, summed in order."""
    (n, C), T, M = x_next.shape[-2:], tokens_of(x_next), d_proj.shape[-1]
    BT, BK, options = kernels.blocks("phi", n, n * C, x_next.dtype)
    shares = min(kernels.TOKEN_SHARES, triton.cdiv(T, 256))
    d_phi = d_proj.new_empty(shares, n * C, M)
    kernels.phi_backward_kernel[(triton.cdiv(n * C, BK), shares)](
        x_next, d_proj, d_phi, T, n * C, triton.cdiv(triton.cdiv(T, BT), shares), M=M, MP=padded_columns(n),
        PRECISION=kernels.precision(x_next), BT=BT, BK=BK, **options,
    )  # fmt: skip
    return d_phi.sum(0)


def padded_columns(n):
    return max(16, triton.next_power_of_2(n * n + 2 * n))


@step_backward_op.register_fake
def step_backward_shapes(
    d_x_next, d_x_in, d_H_post_next, d_H_res_next, x, y, H_post, H_res, x_next, phi, alpha, b, proj, r, sinkhorn_iters
):
    inputs = (x, y, H_post, H_res, phi, alpha, b)
    return [x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.sinkhorn_iters, _ = inputs
    x_next, _, _, _, proj, r = output
    x, y, *_ = tensors
    ctx.outs = [(t.shape, t.dtype) for t in output[:4]]
    ctx.save_for_backward(*tensors, x if y is None else x_next, proj, r)


def _step_backward(ctx, grads):
    x, y, H_post, H_res, phi, alpha, b, x_next, proj, r = ctx.saved_tensors
    outs = zip(grads[:4], ctx.outs, strict=True)
    grads = [torch.zeros(shape, dtype=dtype, device=x.device) if g is None else g for g, (shape, dtype) in outs]
    inputs = (x, y, H_post, H_res, phi, alpha, b)
    outs = step_backward_op(*grads, *inputs[:4], x_next, phi, alpha, b, proj, r, ctx.sinkhorn_iters)
    return *(None if t is None else g for t, g in zip(inputs, outs, strict=True)), None, None


step_op.register_autograd(_step_backward, setup_context=_save_for_backward)


@torch.library.custom_op("mhc::sinkhorn", mutates_args=())
def sinkhorn_op(logits: Tensor, sinkhorn_iters: int) -> Tensor:
    H_res = torch.empty_like(logits, dtype=torch.float32, memory_format=torch.contiguous_format)
    n, T = logits.shape[-1], logits.numel() // logits.shape[-1] ** 2
    if T:
        BT, _, options = kernels.blocks("sinkhorn", n, 1)
        kernels.sinkhorn_kernel[(triton.cdiv(T, BT),)](
            logits.contiguous(), H_res, T, n=n, ITERS=sinkhorn_iters, BT=BT, **options
        )
    return H_res


@sinkhorn_op.register_fake
def _sinkhorn_shape(logits, sinkhorn_iters):
    return torch.empty_like(logits, dtype=torch.float32, memory_format=torch.contiguous_format)


@torch.library.custom_op("mhc::sinkhorn_backward", mutates_args=())
def sinkhorn_backward_op(logits: Tensor, d_H_res: Tensor, sinkhorn_iters: int) -> Tensor:
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    n, T = logits.shape[-1], logits.numel() // logits.shape[-1] ** 2
    if T:
        BT, _, options = kernels.blocks("sinkhorn_backward", n, 1)
        kernels.sinkhorn_backward_kernel[(triton.cdiv(T, BT),)](
            logits.contiguous(), d_H_res.contiguous(), d_logits, T, n=n, ITERS=sinkhorn_iters,
            HISTORY=triton.next_power_of_2(max(1, sinkhorn_iters)), BT=BT, **options,
        )  # fmt: skip
    return d_logits


@sinkhorn_backward_op.register_fake
def _sinkhorn_backward_shape(logits, d_H_res, sinkhorn_iters):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_logits(ctx, inputs, output):
    logits, ctx.sinkhorn_iters = inputs
    ctx.save_for_backward(logits)


def _sinkhorn_backward(ctx, d_H_res):
    return sinkhorn_backward_op(*ctx.saved_tensors, d_H_res, ctx.sinkhorn_iters), None


sinkhorn_op.register_autograd(_sinkhorn_backward, setup_context=_save_logits)


# ----------------------------------------------------------------------------------------------------------------------
# The public functions. Signatures, shapes and mathematics are those of the twins in mhc_ref.py.

IMPLS = ("ref", "eager", "triton")
INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on a CPU
mhc_coeffs, mhc_pre = mhc_coeffs_ref, mhc_pre_ref  # for a look at the mappings; a model's forward needs neither


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


STREAMS = (1, 2, 4, 8)  # the numbers of streams the kernels take: sizes in Triton are powers of two


def check_for_triton(x, **fp32):
    """Raise ValueError for what the kernels do not take; the other implementations take everything."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or x.shape[-2] not in STREAMS:
        raise ValueError(
            f"impl='triton' takes x in bf16, fp16 or fp32 with 1, 2, 4 or 8 streams, got {x.dtype} with "
            f"{x.shape[-2]} streams: use impl='ref' or 'eager'"
        )
    for name, t in fp32.items():
        if t is not None and t.dtype != torch.float32:
            raise ValueError(f"impl='triton' wants {name} in fp32 (Eq 10-13), got {t.dtype}: leave it uncast")


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
    if H_pre is not None or manifold is not None:
        what = "H_pre (single-pass mHC)" if H_pre is not None else "a manifold"
        raise ValueError(f"impl={impl!r} does not take {what} yet: use impl='ref' or 'eager'")
    check_for_triton(x, H_post=H_post, H_res=H_res, phi=phi, alpha=alpha, b=b)
    x_next, x_in, H_post, H_res, _, _ = step_op(*args)
    return x if y is None else x_next, x_in, H_post, H_res


def mhc_post_res(x, y, H_post, H_res, impl="auto"):
    """The last boundary, with no sublayer after: x_next[i] = sum_j H_res[i, j] x[j] + H_post[i] y (Eq 3).

    Shapes as in mhc_step; the same kernels without the second half. impl: see resolve_impl.
    """
    impl = resolve_impl(impl, x.device, x.shape[-2])
    if impl == "ref":
        return mhc_post_res_ref(x, y, H_post, H_res)
    if impl == "eager":
        return mhc_cpu.mhc_post_res(x, y, H_post, H_res)
    check_for_triton(x, H_post=H_post, H_res=H_res)
    return step_op(x, y, H_post, H_res, None, None, None, 0, 0.0)[0]


def sinkhorn(logits, sinkhorn_iters=20, impl="auto"):
    """Eq 9: logits (..., n, n) -> H_res (..., n, n), fp32, rows exact. impl: 'auto', 'ref' or 'triton'."""
    if impl not in ("auto", "ref", "triton"):
        raise ValueError(f"impl={impl!r}: sinkhorn has 'auto', 'ref' and 'triton'")
    if resolve_impl(impl, logits.device, logits.shape[-1]) != "triton":
        return sinkhorn_ref(logits, sinkhorn_iters)
    check_for_triton(logits)
    return sinkhorn_op(logits, sinkhorn_iters)
