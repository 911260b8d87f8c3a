"""mHC on a GPU: launches sinkhorn_kernel.py's kernels and gives them gradients. impl='triton' of mhc.py.

Each `operator` launches one kernel (with what it needs to add up shares) and stands for itself under torch.compile.
Streams, Maps and Read give them gradients; mhc_step, hyper_step and mhc_post_res put these together. The twins in
mhc_ref.py document arguments and results.
"""

from __future__ import annotations

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import sinkhorn_kernel as kernels
from mhc_ref import mhc_maps_ref
from sinkhorn_kernel import cdiv, power_of_2

# ----------------------------------------------------------------------------------------------------------------------
# The operators: what launches the kernels. M is the number of logits, n^2+2n with Sinkhorn.


def operator(schema, shapes):
    """For a function that launches kernels: make it a PyTorch custom op too, of which `shapes` is the fake version.

    torch.compile, and fake tensors, see the op. Everyone else calls the function itself, which spares the host the op's
    dispatch.
    """

    def make(launch):
        op = torch.library.custom_op(f"mhc::{launch.__name__}", launch, mutates_args=(), schema=schema)
        op.register_fake(shapes)

        def call(*args):
            return op(*args) if torch.compiler.is_compiling() else launch(*args)

        call.op = op
        return call

    return make


def tokens_of(x):
    """T: all leading dimensions of x (..., n, C) as one."""
    return x.numel() // (x.shape[-2] * x.shape[-1])


def contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def fp32(like, *shape):
    return like.new_empty(shape, dtype=torch.float32)


def padded(M):
    """Columns of a product with phi: a power of two, and 16 at least, for the tensor cores."""
    return max(16, power_of_2(M))


def streams_shapes(x, y, H_post, H_res, phi, H_pre):
    lead, (n, C) = x.shape[:-2], x.shape[-2:]
    BT, BC, _ = kernels.blocks("streams", n, C, x.dtype)
    _, shares = kernels.channel_tiles(tokens_of(x), BT, C, BC)
    return [
        x.new_empty(x.shape if y is not None else (0,)),
        x.new_empty(*lead, C) if H_pre is not None else x.new_empty(0),
        fp32(x, shares, *lead, phi.shape[1] + 1) if phi is not None else fp32(x, 0),
    ]


@operator(
    "(Tensor x, Tensor? y, Tensor? H_post, Tensor? H_res, Tensor? phi, Tensor? H_pre) -> Tensor[]",
    streams_shapes,
)
def streams(x, y, H_post, H_res, phi, H_pre):
    """-> x_next if there is a y, x_in if there is an H_pre, and sums (shares, ..., M+1) if there is a phi: shares of
    vec(x_next) phi and, last, of |x_next|^2. Empty where not."""
    outs = streams_shapes(x, y, H_post, H_res, phi, H_pre)
    (n, C), T = x.shape[-2:], tokens_of(x)
    if T and any(t is not None for t in (y, phi, H_pre)):
        BT, BC, options = kernels.blocks("streams", n, C, x.dtype)
        tiles, shares = kernels.channel_tiles(T, BT, C, BC)
        M = 1 if phi is None else phi.shape[1]
        kernels.streams_kernel[(cdiv(T, BT), shares)](
            *contiguous(x, y, H_post, H_res, phi, H_pre), *outs, T, C, tiles, n=n, M=M, MP=padded(M),
            PRECISION=kernels.precision(x), BT=BT, BC=BC, **options,
        )  # fmt: skip
    return outs


def streams_backward_shapes(d_x_next, d_x_in, d_sums, x, y, H_post, H_res, x_next, phi, H_pre, single_pass):
    n, T = x.shape[-2], tokens_of(x)
    maps = (n * n + n if y is not None else 0) + (n if single_pass else 0)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(0) if y is None else torch.empty_like(y, memory_format=torch.contiguous_format),
        fp32(x, maps, T),
        fp32(x, 0) if d_sums is None or phi is None else fp32(x, *phi.shape),
    ]


@operator(
    "(Tensor? d_x_next, Tensor? d_x_in, Tensor? d_sums, Tensor x, Tensor? y, Tensor? H_post, Tensor? H_res, "
    "Tensor x_next, Tensor? phi, Tensor? H_pre, bool single_pass) -> Tensor[]",
    streams_backward_shapes,
)
def streams_backward(d_x_next, d_x_in, d_sums, x, y, H_post, H_res, x_next, phi, H_pre, single_pass):
    """Back through `streams`, and through x_in = sum_i H_pre[i] x_next[i] whether it was made there or in `read`.

    -> d_x, d_y, d_maps, d_phi. d_maps: d_H_post (T, n), d_H_res (T, n, n) and, if single_pass, d_H_pre (T, n), one
    after the other. d_sums (..., M+1). Empty where there is none; a gradient that is None is zero.
    """
    d_x, d_y, d_maps, d_phi = streams_backward_shapes(
        d_x_next, d_x_in, d_sums, x, y, H_post, H_res, x_next, phi, H_pre, single_pass
    )
    (n, C), T = x.shape[-2:], tokens_of(x)
    if not T:
        return [d_x, d_y, d_maps, d_phi.zero_()]
    d_x_next, d_x_in, d_sums, x, y, H_post, H_res, x_next, phi, H_pre = contiguous(
        d_x_next, d_x_in, d_sums, x, y, H_post, H_res, x_next, phi, H_pre
    )
    if d_sums is not None:
        phi_backward(x_next, d_sums, d_phi)
    BT, BC, options = kernels.blocks("streams_backward", n, C, x.dtype)
    tiles, shares = kernels.channel_tiles(T, BT, C, BC)
    parts = d_maps if shares == 1 else d_maps.new_empty(shares, *d_maps.shape)
    M = 1 if d_sums is None else d_sums.shape[-1] - 1
    kernels.streams_backward_kernel[(cdiv(T, BT), shares)](
        d_x_next, d_x_in, d_sums, x, y, H_post, H_res, phi, H_pre, d_x, d_y, parts, T, C, tiles,
        n=n, M=M, MP=padded(M), SINGLE_PASS=single_pass, PRECISION=kernels.precision(x, to_bf16=True),
        BT=BT, BC=BC, STAGES=options["num_stages"], **options,
    )  # fmt: skip
    return [d_x, d_y, d_maps if shares == 1 else parts.sum(0), d_phi]


def phi_backward(x_next, d_sums, d_phi):
    """d_phi (nC, M) = vec(x_next)^T d_proj, as shares over tokens, summed in order."""
    (n, C), T, M = x_next.shape[-2:], tokens_of(x_next), d_phi.shape[1]
    BT, BK, options = kernels.blocks("phi_backward", n, n * C, x_next.dtype)
    shares = min(kernels.TOKEN_SHARES, cdiv(T, 256))
    parts = d_phi if shares == 1 else d_phi.new_empty(shares, n * C, M)
    kernels.phi_backward_kernel[(cdiv(n * C, BK), shares)](
        x_next, d_sums, parts, T, n * C, cdiv(cdiv(T, BT), shares), M=M, MP=padded(M),
        PRECISION=kernels.precision(x_next), BT=BT, BK=BK, **options,
    )  # fmt: skip
    if shares > 1:
        torch.sum(parts, 0, out=d_phi)


def maps_shapes(sums, alpha, b, n, size, sinkhorn_iters, eps):
    lead = sums.shape[1:-1]
    return [sums.new_empty(*lead, n), sums.new_empty(*lead, n), sums.new_empty(*lead, n, n)]


@operator(
    "(Tensor sums, Tensor alpha, Tensor b, int n, int size, int sinkhorn_iters, float eps) -> Tensor[]", maps_shapes
)
def maps(sums, alpha, b, n, size, sinkhorn_iters, eps):
    """sums (shares, ..., n^2+2n+1) -> H_pre (..., n), H_post (..., n), H_res (..., n, n). size: nC."""
    outs = maps_shapes(sums, alpha, b, n, size, sinkhorn_iters, eps)
    if T := outs[0].numel() // n:
        BT, _, options = kernels.blocks("maps", n, 1)
        kernels.maps_kernel[(cdiv(T, BT),)](
            *contiguous(sums, alpha, b), *outs, T, sums.shape[0], size, eps, n=n, ITERS=sinkhorn_iters, BT=BT, **options
        )
    return outs


def maps_backward_shapes(d_H_pre, d_H_post, d_H_res, sums, alpha, b, n, size, sinkhorn_iters, eps):
    return [sums.new_empty(sums.shape[1:]), sums.new_empty(len(b) + 3)]


@operator(
    "(Tensor d_H_pre, Tensor d_H_post, Tensor d_H_res, Tensor sums, Tensor alpha, Tensor b, int n, int size, "
    "int sinkhorn_iters, float eps) -> Tensor[]",
    maps_backward_shapes,
)
def maps_backward(d_H_pre, d_H_post, d_H_res, sums, alpha, b, n, size, sinkhorn_iters, eps):
    """-> d_sums (..., n^2+2n+1), the gradient of each share; d_params (n^2+2n+3,), d_b and then d_alpha."""
    outs = maps_backward_shapes(d_H_pre, d_H_post, d_H_res, sums, alpha, b, n, size, sinkhorn_iters, eps)
    T, M = d_H_pre.numel() // n, b.numel()
    if not T:
        return [t.zero_() for t in outs]
    BT, _, options = kernels.blocks("maps_backward", n, 1)
    parts = sums.new_empty(cdiv(T, BT), M + 3)
    kernels.maps_backward_kernel[(len(parts),)](
        *contiguous(d_H_pre, d_H_post, d_H_res, sums, alpha, b), outs[0], parts, T, sums.shape[0], size, eps,
        n=n, ITERS=sinkhorn_iters, HISTORY=power_of_2(max(1, sinkhorn_iters)), BT=BT, **options,
    )  # fmt: skip
    return [outs[0], parts.sum(0)]


def read_shapes(x, H_pre):
    return x.new_empty(*x.shape[:-2], x.shape[-1])


@operator("(Tensor x, Tensor H_pre) -> Tensor", read_shapes)
def read(x, H_pre):
    """x_in (..., C) = sum_i H_pre[i] x[i]."""
    x_in, (n, C), T = read_shapes(x, H_pre), x.shape[-2:], tokens_of(x)
    if T:
        BT, BC, options = kernels.blocks("read", n, C, x.dtype)
        kernels.read_kernel[(cdiv(T, BT), cdiv(C, BC))](*contiguous(x, H_pre), x_in, T, C, n=n, BT=BT, BC=BC, **options)
    return x_in


def read_backward_shapes(x, d_x_in):
    return fp32(x, *x.shape[:-1])


@operator("(Tensor x, Tensor d_x_in) -> Tensor", read_backward_shapes)
def read_backward(x, d_x_in):
    """d_H_pre (..., n). The gradient of x is left to streams_backward."""
    d_H_pre, (n, C), T = read_backward_shapes(x, d_x_in), x.shape[-2:], tokens_of(x)
    if not T:
        return d_H_pre
    BT, BC, options = kernels.blocks("read_backward", n, C, x.dtype)
    tiles, shares = kernels.channel_tiles(T, BT, C, BC)
    parts = d_H_pre if shares == 1 else d_H_pre.new_empty(shares, *d_H_pre.shape)
    kernels.read_backward_kernel[(cdiv(T, BT), shares)](
        *contiguous(x, d_x_in), parts, T, C, tiles, n=n, BT=BT, BC=BC, **options
    )
    return d_H_pre if shares == 1 else parts.sum(0)


def sinkhorn_shapes(logits, *_):
    return torch.empty_like(logits, dtype=torch.float32, memory_format=torch.contiguous_format)


@operator("(Tensor logits, int sinkhorn_iters) -> Tensor", sinkhorn_shapes)
def sinkhorn_forward(logits, sinkhorn_iters):
    H_res, n = sinkhorn_shapes(logits), logits.shape[-1]
    if T := logits.numel() // n**2:
        BT, _, options = kernels.blocks("maps", n, 1)
        kernels.sinkhorn_kernel[(cdiv(T, BT),)](
            logits.contiguous(), H_res, T, n=n, ITERS=sinkhorn_iters, BT=BT, **options
        )
    return H_res


def sinkhorn_backward_shapes(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@operator("(Tensor logits, Tensor d_H_res, int sinkhorn_iters) -> Tensor", sinkhorn_backward_shapes)
def sinkhorn_backward(logits, d_H_res, sinkhorn_iters):
    d_logits, n = sinkhorn_backward_shapes(logits), logits.shape[-1]
    if T := logits.numel() // n**2:
        BT, _, options = kernels.blocks("maps_backward", n, 1)
        kernels.sinkhorn_backward_kernel[(cdiv(T, BT),)](
            *contiguous(logits, d_H_res), d_logits, T, n=n, ITERS=sinkhorn_iters,
            HISTORY=power_of_2(max(1, sinkhorn_iters)), BT=BT, **options,
        )  # fmt: skip
    return d_logits


# ----------------------------------------------------------------------------------------------------------------------
# The same with gradients. Three functions, so that any mappings can stand between Streams and Read.


class Streams(Function):
    """x, y, H_post, H_res, phi, H_pre, read_later -> x_next (..., n, C), x_in (..., C), gate, sums (shares, ..., M+1).

    With H_pre (single-pass mHC) x_in is what reads x_next. With read_later, x_in (..., C) and gate (..., n) are
    placeholders with nothing in them, for Read: its gradient of x_next is an outer product, H_pre times d_x_in, and it
    hands back the two factors as gradients of the placeholders. Multiplied out it would be a tensor of streams,
    written, read and added. sums if there is a phi; None what there is not.
    """

    @staticmethod
    def forward(ctx, x, y, H_post, H_res, phi, H_pre, read_later):
        x_next, x_in, sums = streams(x, y, H_post, H_res, phi, H_pre)
        x_next = x if y is None else x_next
        ctx.save_for_backward(x, y, H_post, H_res, x_next, phi, H_pre)
        ctx.set_materialize_grads(False)  # outputs nobody used have no gradient, and cost nothing
        gate = fp32(x).expand(x.shape[:-1]) if read_later else None
        if H_pre is None:
            x_in = x.new_empty(()).expand(*x.shape[:-2], x.shape[-1]) if read_later else None
        return x_next, x_in, gate, None if phi is None else sums

    @staticmethod
    @once_differentiable
    def backward(ctx, d_x_next, d_x_in, gate, d_sums):
        x, y, H_post, H_res, x_next, phi, H_pre = ctx.saved_tensors
        single_pass = H_pre is not None and d_x_in is not None
        d_sums = None if d_sums is None else d_sums[0]  # of every share the same
        d_x, d_y, d_maps, d_phi = streams_backward(
            d_x_next, d_x_in, d_sums, x, y, H_post, H_res, x_next, phi, gate if H_pre is None else H_pre, single_pass
        )
        n, T = x.shape[-2], tokens_of(x)
        d_H_post, d_H_res, d_H_pre = d_maps.flatten().split(
            [0 if y is None else T * n, 0 if y is None else T * n * n, T * n if single_pass else 0]
        )
        return (
            d_x,
            *((d_y, d_H_post.view(H_post.shape), d_H_res.view(H_res.shape)) if y is not None else (None,) * 3),
            None if phi is None or d_sums is None else d_phi,
            d_H_pre.view(H_pre.shape) if single_pass else None,
            None,
        )


class Maps(Function):
    """sums (shares, ..., n^2+2n+1), alpha, b -> H_pre (..., n), H_post (..., n), H_res (..., n, n), by Sinkhorn."""

    @staticmethod
    def forward(ctx, sums, alpha, b, *settings):
        ctx.save_for_backward(sums, alpha, b)
        ctx.settings = settings
        return tuple(maps(sums, alpha, b, *settings))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        sums, alpha, b = ctx.saved_tensors
        d_sums, d_params = maps_backward(*grads, sums, alpha, b, *ctx.settings)
        d_b, d_alpha = d_params.split([len(b), 3])
        return d_sums.expand(sums.shape), d_alpha, d_b, *(None for _ in ctx.settings)


class Read(Function):
    """x_in = sum_i H_pre[i] x[i], of x from Streams and with its placeholders: see there."""

    @staticmethod
    def forward(ctx, x, H_pre, x_in, gate):
        ctx.save_for_backward(x, H_pre)
        return read(x, H_pre)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_x_in):
        x, H_pre = ctx.saved_tensors
        return None, read_backward(x, d_x_in), d_x_in, H_pre


class Sinkhorn(Function):
    @staticmethod
    def forward(ctx, logits, sinkhorn_iters):
        ctx.save_for_backward(logits)
        ctx.sinkhorn_iters = sinkhorn_iters
        return sinkhorn_forward(logits, sinkhorn_iters)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_H_res):
        return sinkhorn_backward(*ctx.saved_tensors, d_H_res, ctx.sinkhorn_iters), None


def plain_maps(sums, alpha, b, n, size, eps, manifold):
    """As Maps, by PyTorch and autograd, for any manifold."""
    proj, square = sums.sum(0).tensor_split([-1], -1)
    return mhc_maps_ref(proj, (square / size + eps).sqrt(), alpha, b, n, manifold=manifold)


# ----------------------------------------------------------------------------------------------------------------------

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


def mhc_post_res(x, y, H_post, H_res):
    """Arguments and results as mhc_ref.mhc_post_res_ref."""
    check_for_triton(x, H_post=H_post, H_res=H_res)
    return Streams.apply(x, y, H_post, H_res, None, None, False)[0]


def mhc_step(x, y, H_post, H_res, phi, alpha, b, sinkhorn_iters=20, eps=1e-20, H_pre=None, manifold=None):
    """Arguments and results as mhc_ref.mhc_step_ref."""
    check_for_triton(x, H_post=H_post, H_res=H_res, phi=phi, alpha=alpha, b=b, H_pre=H_pre)
    n, C = x.shape[-2:]
    x_next, x_in, gate, sums = Streams.apply(x, y, H_post, H_res, phi, H_pre, H_pre is None)
    if manifold is None:
        H_pre_next, H_post, H_res = Maps.apply(sums, alpha, b, n, n * C, sinkhorn_iters, eps)
    else:
        H_pre_next, H_post, H_res = plain_maps(sums, alpha, b, n, n * C, eps, manifold)
    if H_pre is None:
        return x_next, Read.apply(x_next, H_pre_next, x_in, gate), H_post, H_res
    return x_next, x_in, H_pre_next, H_post, H_res


def hyper_step(x, y, H_post, H_res, maps):
    """Arguments and results as mhc.hyper_step."""
    check_for_triton(x, H_post=H_post, H_res=H_res)
    x_next, x_in, gate, _ = Streams.apply(x, y, H_post, H_res, None, None, True)
    H_pre, H_post, H_res = maps(x_next)
    return x_next, Read.apply(x_next, H_pre, x_in, gate), H_post, H_res


def sinkhorn(logits, sinkhorn_iters=20):
    """Arguments and results as mhc_ref.sinkhorn_ref."""
    check_for_triton(logits)
    return Sinkhorn.apply(logits, sinkhorn_iters)
