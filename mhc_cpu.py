"""mHC on a CPU: the boundary between two sublayers with a hand-written backward.

    x_next, x_in, H_post, H_res = mhc_step(x, y, H_post, H_res, phi, alpha, b)                 # impl='eager'
    x_next, x_in, H_pre, H_post, H_res = mhc_step(x, y, H_post, H_res, ..., H_pre=H_pre)       # single-pass mHC
    x_next, x_in, H_post, H_res = hc_step(x, y, H_post, H_res, theta, alpha, b)                # Hyper-Connections
    x_next = mhc_post_res(x, y, H_post, H_res)                                                 # after the last sublayer

The twins in mhc_ref.py are the mathematics and document arguments and results; this file is the same mathematics
arranged for a memory hierarchy. Nothing in it but two constants is special to a CPU: any device PyTorch knows runs it.
The arithmetic is cheap; the time goes into moving the nC numbers of every token. So:
- One autograd function a boundary. Autograd over the twin keeps and sums (T, n, n, C) products and adds three
  gradients of x_next, each in memory; here the backward is written out, and every sum is made where its terms are read.
- It works in tiles: all steps of a pass run over a block of tokens that stays in cache, and scratch memory is a
  tile, not a tensor (fresh pages of memory cost as much as the arithmetic). The maps are a few numbers a token and are
  made of all tokens at once, between two passes over the streams: H_pre is known only then. Single-pass mHC has it
  before, and needs one pass.
- Two halves that know nothing of each other. The streams: products of rows of x with phi and with n x n matrices. The
  maps: what makes H_pre, H_post, H_res of a token out of its projections, a few dozen numbers, tokens innermost. HC,
  and mHC on another manifold than Sinkhorn's, have another function for the maps, and leave its gradient to autograd.
- At a width like 64 the maps cost as much as the streams. Sinkhorn is then 40 operations on vectors of all tokens, on M
  itself where its entries stay within fp32 and on log M where they would not.

Saved for backward: x, y, H_post, H_res, x_next (the same tensor that is the next boundary's x, so it costs nothing),
the projections of Eq 14, and r. Not saved: any state of Sinkhorn. Its backward replays all iterations; from the final
matrix alone it would be wrong (a relative error above 1 at logits of std 6).

Letters: T tokens (all leading dimensions as one, or those of a tile), n streams, C width, K logits (n^2+2n with
Sinkhorn); g_* the gradient of *.
"""

from functools import partial

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mhc_ref import hc_maps_ref, map_dtype, mhc_maps_ref

TILE_BYTES = 2 << 20  # of x in a tile: smaller ones pay more for starting operations than the caches give back
# Tokens with a logit beyond +-LARGE go by logarithms. Up to there entries of M start within e^+-40; sums of up to
# n e^40 divide them, and the e^-80 / n that may be left is well inside fp32's smallest 1e-38.
LARGE = 40.0
log_softmax_backward = torch.ops.aten._log_softmax_backward_data.default


def column(v):
    """(T, n) -> (T, n, 1) or (T,) -> (T, 1), to multiply rows of width C."""
    return v.unsqueeze(-1)


# ----------------------------------------------------------------------------------------------------------------------
# Sinkhorn, on (n, n, T). An iteration makes the sums over dim 0 equal to 1 (T_c), then those over dim 1 (T_r).


def sinkhorn(logits, sinkhorn_iters):
    """Eq 9: logits (n, n, T) -> H_res (n, n, T)."""
    return by_size(lambda *args: direct(*args)[0], by_log, logits, sinkhorn_iters)


def sinkhorn_backward(g_H, logits, sinkhorn_iters):
    """g_H (n, n, T), the gradient of H_res -> the gradient of the logits, through a replay of all iterations.

    g is the gradient of log M throughout. A half step takes log(sum of M) from log M, so g loses M times the sum of g.
    """
    return by_size(direct_backward, by_log_backward, logits, sinkhorn_iters, g_H)


def direct(logits, sinkhorn_iters):
    """sinkhorn on M itself -> M (n, n, T), and all that it was divided by, (sinkhorn_iters, 2, n, T)."""
    M, sums = logits.exp(), logits.new_empty(sinkhorn_iters, 2, *logits.shape[1:])
    for columns, rows in half_steps(sums):
        M /= torch.sum(M, 0, keepdim=True, out=columns)
        M /= torch.sum(M, 1, keepdim=True, out=rows)
    return M, sums


def direct_backward(logits, sinkhorn_iters, g_H):
    M, sums = direct(logits, sinkhorn_iters)
    g = g_H * M
    for columns, rows in reversed(list(half_steps(sums))):
        g.addcmul_(M, g.sum(1, keepdim=True), value=-1)
        M *= rows  # as it was before the half step
        g.addcmul_(M, g.sum(0, keepdim=True), value=-1)
        M *= columns
    return g


def half_steps(sums):
    """For each iteration, the sums of columns (1, n, T) and those of rows (n, 1, T)."""
    return zip(sums[:, 0].unsqueeze(1), sums[:, 1].unsqueeze(2), strict=True)


def by_log(logits, sinkhorn_iters):
    """sinkhorn on log M: for logits of any size."""
    log_M = logits
    for k in range(2 * sinkhorn_iters):
        log_M = log_M.log_softmax(k % 2)
    return log_M.exp()


def by_log_backward(logits, sinkhorn_iters, g_H):
    """sinkhorn_backward on log M."""
    log_M = [logits]
    for k in range(2 * sinkhorn_iters):
        log_M.append(log_M[-1].log_softmax(k % 2))
    g = g_H * log_M[-1].exp()
    for k in reversed(range(2 * sinkhorn_iters)):
        g = log_softmax_backward(g, log_M[k + 1], k % 2, g.dtype)
    return g


def by_size(direct, by_log, logits, sinkhorn_iters, *others):
    """direct(logits, sinkhorn_iters, *others), and by_log for the tokens with large logits.

    No token's result depends on another's.
    """
    if logits.device.type != "cpu":
        return by_log(logits, sinkhorn_iters, *others)  # asking another device for a value would wait for it
    low, high = logits.aminmax() if logits.numel() else (0, 0)
    if -LARGE <= low and high <= LARGE:
        return direct(logits, sinkhorn_iters, *others)
    large = logits.abs().amax((0, 1)) > LARGE  # (T,)
    if large.all():
        return by_log(logits, sinkhorn_iters, *others)
    result = direct(logits, sinkhorn_iters, *others)
    result[..., large] = by_log(logits[..., large], sinkhorn_iters, *(v[..., large] for v in others))
    return result


# ----------------------------------------------------------------------------------------------------------------------
# mHC's maps: everything about the K logits of a token, nothing about C. Tokens innermost: (K, T).


def logits_of(proj, r, alpha, b, n):
    """Eq 16: proj (K, T), r (T,) -> logits (K, T), the factor alpha of each of them (K, 1), and proj / r."""
    factor = column(torch.cat([alpha[0].expand(n), alpha[1].expand(n), alpha[2].expand(n * n)]))
    unit = proj * r.reciprocal()  # T divisions, not K T of them
    return (unit * factor).add_(column(b)), factor, unit


def mhc_maps(proj, r, alpha, b, n, sinkhorn_iters):
    """Eq 16-19: proj (K, T), r (T,) -> H_pre (T, n), H_post (T, n), H_res (T, n, n)."""
    pre, post, res = logits_of(proj, r, alpha, b, n)[0].split([n, n, n * n])
    H_res = sinkhorn(res.unflatten(0, (n, n)), sinkhorn_iters)
    return pre.sigmoid().t(), post.sigmoid().mul_(2).t(), H_res.permute(2, 0, 1).contiguous()


def mhc_maps_backward(g_pre, g_post, g_res, proj, r, alpha, b, n, sinkhorn_iters):
    """From the gradients of H_pre (T, n), H_post (T, n) and H_res (T, n, n), each perhaps None:

    -> H_pre (T, n), made again; gradients of proj (K, T), of r^2 / 2 (T,), of alpha (3,), of b (K,).
    """
    logits, factor, unit = logits_of(proj, r, alpha, b, n)
    gates = logits[: 2 * n].sigmoid()  # H_pre and H_post / 2
    slope = gates * (-logits[: 2 * n]).sigmoid()  # not gates * (1 - gates): in fp32 that is 0 from logits of 17 on
    g = torch.zeros_like(logits)  # (K, T)
    if g_pre is not None:
        torch.mul(slope[:n], g_pre.t(), out=g[:n])
    if g_post is not None:
        torch.mul(slope[n:], 2 * g_post.t(), out=g[n : 2 * n])
    if g_res is not None:
        g_res, res = g_res.permute(1, 2, 0).contiguous(), logits[2 * n :].unflatten(0, (n, n))  # (n, n, T)
        g[2 * n :] = sinkhorn_backward(g_res, res, sinkhorn_iters).flatten(0, 1)
    g_alpha = torch.stack([part.sum() for part in (g * unit).sum(1).split([n, n, n * n])])
    g_unit, inverse = g * factor, r.reciprocal()
    g_half_square = -unit.mul_(g_unit).sum(0) * inverse.square()  # r divides every logit; d(r^2 / 2) = r dr
    return gates[:n].t(), g_unit * inverse, g_half_square, g_alpha, g.sum(1)


def by_autograd(maps):
    """What mhc_maps_backward is to mhc_maps, for any other maps in plain PyTorch."""

    def maps_backward(g_pre, g_post, g_res, proj, r, *params):
        with torch.enable_grad():
            leaves = [v.detach().requires_grad_() for v in (proj, r, *params)]
            made = maps(*leaves)
        outs = [(H, g) for H, g in zip(made, (g_pre, g_post, g_res), strict=True) if g is not None and H.requires_grad]
        grads = [torch.zeros_like(v) for v in leaves]
        if outs:
            H, g = zip(*outs, strict=True)
            grads = torch.autograd.grad(H, leaves, g, allow_unused=True, materialize_grads=True)
        return made[0].detach(), grads[0], grads[1] / r, *grads[2:]

    return maps_backward


# ----------------------------------------------------------------------------------------------------------------------
# The streams. A tile's tensors are cut to size and cast to the arithmetic's dtype before they come here.


def tiles(x, dtype):
    """Slices of the T tokens of x (T, n, C), each about TILE_BYTES of x in dtype, that of the arithmetic."""
    T, n, C = x.shape
    step = max(1, TILE_BYTES // (n * C * dtype.itemsize))
    return [slice(s, min(s + step, T)) for s in range(0, T, step)]


def cut(s, dtype, *tensors):
    """The tokens s of each tensor, in dtype; None stays None."""
    return [None if v is None else v[s].to(dtype) for v in tensors]


def bmm_into(out, a, b):
    """out = a @ b, batched; rounded on the way when out is narrower."""
    if out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))


def weighted_sum(x, H, out):
    """x (T, n, C), H (T, n) -> into out (T, C): sum_j H[j] x[j]. By streams: faster than a product of matrices."""
    total = out if out.dtype == x.dtype else torch.empty_like(out, dtype=x.dtype)  # round once, after the sum
    torch.mul(x[:, 0], H[:, :1], out=total)
    for j in range(1, x.shape[1]):
        total.addcmul_(x[:, j], H[:, j : j + 1])
    if total is not out:
        out.copy_(total)


def dot(x, y, scratch):
    """x (T, n, C), y (T, C) -> (T, n): the product of y with each stream. scratch: like x; of use in x's dtype."""
    return torch.mul(x, y.unsqueeze(1), out=scratch if scratch.dtype == x.dtype else None).sum(-1)


def post_res_tile(x, y, H_post, H_res, out):
    """Eq 3 on a tile, into out (T, n, C): sum_j H_res[i, j] x[j] + H_post[i] y."""
    if out.dtype == x.dtype:
        torch.bmm(H_res, x, out=out).addcmul_(column(H_post), y.unsqueeze(1))
    else:  # round once, after the sum
        out.copy_(torch.bmm(H_res, x).addcmul_(column(H_post), y.unsqueeze(1)))


def post_res_tile_backward(g, x, y, H_post, H_res, g_x, g_y, g_H_post, g_H_res):
    """Eq 3 backward on a tile: from g, the gradient of x_next, fill the last four."""
    g_H_post.copy_(dot(g, y, scratch=g_x))  # which is filled thereafter
    weighted_sum(g, H_post, g_y)
    bmm_into(g_H_res, g, x.mT)
    bmm_into(g_x, H_res.mT, g)


class PostRes(Function):
    """The last boundary, Eq 3 alone: x (T, n, C), y (T, C), H_post (T, n), H_res (T, n, n) -> x_next (T, n, C)."""

    @staticmethod
    def forward(ctx, x, y, H_post, H_res):
        dtype, x_next = map_dtype(x), torch.empty_like(x)
        with torch.autocast(x.device.type, enabled=False):  # nothing here is rounded behind our back (Eq 10-13)
            for s in tiles(x, dtype):
                post_res_tile(*cut(s, dtype, x, y, H_post, H_res), out=x_next[s])
        ctx.save_for_backward(x, y, H_post, H_res)
        return x_next

    @staticmethod
    @once_differentiable
    def backward(ctx, g_next):
        saved, dtype = ctx.saved_tensors, map_dtype(g_next)
        grads = [torch.empty_like(v) for v in saved]
        with torch.autocast(g_next.device.type, enabled=False):
            for s in tiles(g_next, dtype):
                g, *tile = cut(s, dtype, g_next, *saved)
                # contiguous: a sum over the streams sends back one gradient for all, and bmm takes it token by token
                post_res_tile_backward(g.contiguous(), *tile, *(g[s] for g in grads))
        return tuple(grads)


class Step(Function):
    """A whole boundary: Eq 3, the maps of x_next, and x_in, read through them or, in single-pass mHC, through H_pre.

    x (T, n, C), y (T, C), H_post (T, n), H_res (T, n, n), H_pre (T, n); the first form has y = H_post = H_res = None,
    all but single-pass mHC H_pre = None. phi (W, K): of all streams together, W = nC, or of each by itself, W = C (HC);
    then what stands for tokens in proj and r, (K, T) and (T,), are all streams of all tokens.
    maps and maps_backward: functions like mhc_maps and mhc_maps_backward, which get `params` behind proj and r.
    -> x_next (T, n, C), x_in (T, C), and the new H_pre, H_post, H_res.
    """

    @staticmethod
    def forward(ctx, x, y, H_post, H_res, H_pre, phi, eps, maps, maps_backward, *params):
        (T, n, C), (W, K) = x.shape, phi.shape
        dtype, R = map_dtype(x), n * C // W  # R rows of width W a token
        x_next = x if y is None else torch.empty_like(x)
        x_in, proj, r = x.new_empty(T, C), x.new_empty(K, T * R, dtype=dtype), x.new_empty(T * R, dtype=dtype)
        phi_t, *wide = phi.to(dtype).t().contiguous(), *(p.to(dtype) for p in params)
        with torch.autocast(x.device.type, enabled=False):
            for s in tiles(x, dtype):
                if y is not None:
                    post_res_tile(*cut(s, dtype, x, y, H_post, H_res), out=x_next[s])
                streams = x_next[s].to(dtype)  # as rounded: what a replay from the stored x_next sees
                v, rows = streams.view(-1, W), slice(R * s.start, R * s.stop)
                torch.mm(phi_t, v.t(), out=proj[:, rows])  # Eq 14
                torch.linalg.vector_norm(v, dim=1, out=r[rows])
                if H_pre is not None:  # while the tile is in cache
                    weighted_sum(streams, H_pre[s].to(dtype), x_in[s])
            r.square_().div_(W).add_(eps).sqrt_()  # Eq 15
            new = maps(proj, r, *wide)
            if H_pre is not None:
                new = new[0].contiguous(), *new[1:]  # a pipeline sends it, and its gradient, to another stage
            for s in tiles(x, dtype) if H_pre is None else ():
                weighted_sum(x_next[s].to(dtype), new[0][s], x_in[s])
        ctx.save_for_backward(x, y, H_post, H_res, H_pre, x_next, phi, proj, r, *params)
        ctx.maps_backward = maps_backward
        ctx.set_materialize_grads(False)  # outputs nobody used have no gradient, and cost nothing
        return x_next, x_in, *new

    @staticmethod
    @once_differentiable
    def backward(ctx, g_next, g_in, g_pre, g_post, g_res):
        x, y, H_post, H_res, H_pre, x_next, phi, proj, r, *params = ctx.saved_tensors
        (T, n, C), W = x.shape, len(phi)
        dtype, R = map_dtype(x), n * C // W
        grads = [torch.empty_like(v) for v in ((x,) if y is None else (x, y, H_post, H_res))]
        g_read = None if g_in is None else x.new_empty(n, T, dtype=dtype).t()  # of the H_pre that made x_in
        phi_t = phi.to(dtype).t().contiguous()
        g_phi = torch.zeros_like(phi_t)  # (K, W): faster this way round
        with torch.autocast(x.device.type, enabled=False):
            if H_pre is None and g_in is not None:
                for s in tiles(x, dtype):
                    g_read[s] = dot(*cut(s, dtype, x_next, g_in), scratch=grads[0][s])  # it is filled later
            g_maps = (g_read if H_pre is None else g_pre), g_post, g_res
            wide = [p.to(dtype) for p in params]
            made, g_proj, g_half_square, *g_params = ctx.maps_backward(*g_maps, proj, r, *wide)
            for s in tiles(x, dtype):
                streams, tile_in, g, H = cut(s, dtype, x_next, g_in, g_next, made if H_pre is None else H_pre)
                if H_pre is not None and g_in is not None:
                    g_read[s] = dot(streams, tile_in, scratch=grads[0][s])
                v, rows = streams.view(-1, W), slice(R * s.start, R * s.stop)
                g_phi.addmm_(g_proj[:, rows], v)  # tile after tile: a fixed order
                # the gradient of x_next: through Eq 15 and from the boundary after the next sublayer,
                norm = column(g_half_square[rows] / W)
                g = norm * v if g is None else torch.addcmul(g.reshape(-1, W), norm, v)
                g = g.addmm_(g_proj[:, rows].t(), phi_t).reshape(-1, n, C)  # through Eq 14,
                if g_in is not None:  # and through x_in
                    g.addcmul_(column(H), tile_in.unsqueeze(1))
                if y is None:
                    grads[0][s] = g
                else:
                    g = g.to(x.dtype).to(dtype)  # rounded as between two operations: see recompute.py
                    post_res_tile_backward(g, *cut(s, dtype, x, y, H_post, H_res), *(v[s] for v in grads))
        grads += [None] * (4 - len(grads)) + [None if H_pre is None or g_in is None else g_read.contiguous()]
        g_params = (g.to(p.dtype) for g, p in zip(g_params, params, strict=True))
        return *grads, g_phi.t().to(phi.dtype), None, None, None, *g_params


# ----------------------------------------------------------------------------------------------------------------------


def flat(x, y, H_post, H_res, H_pre=None):
    """Leading dimensions as one: x (T, n, C), y (T, C), H_post (T, n), H_res (T, n, n), H_pre (T, n), contiguous.

    None stays None.
    """
    n, C = x.shape[-2:]
    pairs = (x, (-1, n, C)), (y, (-1, C)), (H_post, (-1, n)), (H_res, (-1, n, n)), (H_pre, (-1, n))
    return [v if v is None else v.reshape(s).contiguous() for v, s in pairs]


def step(x, y, H_post, H_res, H_pre, *args):
    """Step, with any leading dimensions; the new H_pre only where one was given."""
    outs = Step.apply(*flat(x, y, H_post, H_res, H_pre), *args)
    x_next, x_in, *maps = (v.view(*x.shape[:-2], *v.shape[1:]) for v in outs)
    return x_next, x_in, *maps[H_pre is None :]


def mhc_step(x, y, H_post, H_res, phi, alpha, b, sinkhorn_iters=20, eps=1e-20, H_pre=None, manifold=None):
    """impl='eager' of the boundary between two sublayers: arguments and results as mhc_ref.mhc_step_ref."""
    n = x.shape[-2]
    if manifold is None:
        maps, maps_backward = (partial(f, n=n, sinkhorn_iters=sinkhorn_iters) for f in (mhc_maps, mhc_maps_backward))
    else:

        def maps(proj, r, alpha, b):
            return mhc_maps_ref(proj.t(), column(r), alpha, b, n, manifold=manifold)

        maps_backward = by_autograd(maps)
    return step(x, y, H_post, H_res, H_pre, phi, eps, maps, maps_backward, alpha, b)


def hc_step(x, y, H_post, H_res, theta, alpha, b, eps=1e-20):
    """impl='eager' of HC's boundary: arguments and results as mhc_ref.hc_step_ref."""
    n = x.shape[-2]

    def maps(proj, r, alpha, b):
        return hc_maps_ref(proj.t().unflatten(0, (-1, n)), column(r).unflatten(0, (-1, n)), alpha, b)

    return step(x, y, H_post, H_res, None, theta, eps, maps, by_autograd(maps), alpha, b)


def mhc_post_res(x, y, H_post, H_res):
    """impl='eager' of Eq 3 alone, after the last sublayer: arguments and results as mhc_ref.mhc_post_res_ref."""
    return PostRes.apply(*flat(x, y, H_post, H_res)[:4]).view(x.shape)
