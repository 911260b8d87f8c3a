"""mHC on a CPU: the boundary between two sublayers with a hand-written backward.

    x_next, x_in, H_post, H_res = mhc_step(x, y, H_post, H_res, phi, alpha, b)    # impl='eager'
    x_next = mhc_post_res(x, y, H_post, H_res)                                    # after the last sublayer

The twins in mhc_ref.py are the mathematics and document arguments and results; this file is the same mathematics
arranged for a memory hierarchy. Nothing in it but the size of a tile is special to a CPU: any device PyTorch knows runs
it. Arithmetic is cheap; the time goes into moving the nC numbers of every token. So:
- One autograd function a boundary. Autograd over the twin keeps and sums (T, n, n, C) products and adds three
  gradients of x_next, each in memory; here the backward is written out, and every sum is made where its terms are read.
- Sinkhorn lies as (n, n, T), tokens innermost: each half step is one vector operation over tokens. T_c and T_r on log M
  are log_softmax over an outer dimension, and so is their backward an operation that PyTorch has.
- It works in tiles: all steps of a pass run over a block of tokens that stays in cache, and scratch memory is a
  tile, not a tensor (fresh pages of memory cost as much as the arithmetic). H_res x is a batched product of n x n by
  n x C: with C inside, the library's kernel runs at the speed of memory.

Saved for backward: x, y, H_post, H_res, x_next (the same tensor that is the next boundary's x, so it costs nothing),
the projections of Eq 14, and r. Not saved: any state of Sinkhorn. Its backward replays all iterations; from the final
matrix alone it would be wrong (a relative error above 1 at logits of std 6).

Letters: T tokens (all leading dimensions as one), n streams, C width, K = n^2+2n logits; g_* the gradient of *.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mhc_ref import map_dtype

TILE_BYTES = 8 << 20  # of x in a tile: smaller ones pay more for starting operations than the L2 cache gives back
log_softmax_backward = torch.ops.aten._log_softmax_backward_data.default


def column(v):
    """(T, n) -> (T, n, 1) or (T,) -> (T, 1), to multiply rows of width C."""
    return v.unsqueeze(-1)


# ----------------------------------------------------------------------------------------------------------------------
# The mappings: everything about n^2+2n numbers a token, nothing about C. Tokens innermost: (K, T).


def sinkhorn_log(logits, sinkhorn_iters):
    """Eq 9 in the log domain: logits (n, n, T) -> all 2 sinkhorn_iters + 1 states of log M."""
    history = [logits]
    for _ in range(sinkhorn_iters):
        history.append(history[-1].log_softmax(0))  # T_c: log M - logsumexp over rows: columns sum to 1
        history.append(history[-1].log_softmax(1))  # T_r: rows sum to 1
    return history


def sinkhorn_log_backward(g_H, logits, sinkhorn_iters):
    """g_H (n, n, T), the gradient of exp(log M) -> the gradient of the logits, through a replay of all iterations."""
    history = sinkhorn_log(logits, sinkhorn_iters)
    g = g_H * history[-1].exp()
    for k in range(len(history) - 1, 0, -1):  # odd entries came from columns (dim 0), even ones from rows (dim 1)
        g = log_softmax_backward(g, history[k], (k + 1) % 2, g.dtype)
    return g


def logits_of(proj, r, alpha, b, n):
    """Eq 16: proj (K, T), r (T,) -> logits (K, T); with the factor alpha of each logit (K, 1), and proj / r."""
    scale = column(torch.cat([alpha[0].expand(n), alpha[1].expand(n), alpha[2].expand(n * n)]))
    unit = proj / r
    return scale * unit + column(b), scale, unit


def mappings(logits, n, sinkhorn_iters):
    """Eq 18, 19: logits (K, T) -> H_post (T, n), H_res (T, n, n). H_pre is made where it is used."""
    log_M = logits[2 * n :].unflatten(0, (n, n))  # (n, n, T)
    for _ in range(sinkhorn_iters):  # as in sinkhorn_log, without a history
        log_M = log_M.log_softmax(0).log_softmax(1)
    return (2 * logits[n : 2 * n].sigmoid()).t().contiguous(), log_M.exp().permute(2, 0, 1).contiguous()


def mappings_backward(g_pre, g_post, g_res, proj, r, alpha, b, n, sinkhorn_iters):
    """From the gradients of H_pre (n, T), H_post (T, n) and H_res (T, n, n), the last two perhaps None:

    -> gradients of proj (K, T), of r^2 / 2 (T,), of alpha (3,), of b (K,); and H_pre (n, T), made again.
    """
    logits, scale, unit = logits_of(proj, r, alpha, b, n)
    pre, half_post = logits[:n].sigmoid(), logits[n : 2 * n].sigmoid()
    g_pre = g_pre * pre * (1 - pre)
    g_post = torch.zeros_like(pre) if g_post is None else g_post.t() * 2 * half_post * (1 - half_post)
    if g_res is None:
        g_res = torch.zeros_like(logits[2 * n :])
    else:
        res, g_res = logits[2 * n :].unflatten(0, (n, n)), g_res.permute(1, 2, 0).contiguous()  # (n, n, T)
        g_res = sinkhorn_log_backward(g_res, res, sinkhorn_iters).flatten(0, 1)
    g = torch.cat([g_pre, g_post, g_res])  # of the logits (K, T)
    g_unit = g * unit
    g_alpha = torch.stack([part.sum() for part in g_unit.split([n, n, n * n])])
    g_half_square = -(g_unit * scale).sum(0) / r.square()  # r divides every logit; d(r^2 / 2) = r dr
    return g * (scale / r), g_half_square, g_alpha, g.sum(1), pre


# ----------------------------------------------------------------------------------------------------------------------
# impl='eager'. A tile's tensors are cut to size and cast to the arithmetic's dtype before they come here.


def tiles(x, dtype):
    """Slices of the T tokens of x (T, n, C), each about TILE_BYTES of x in dtype, that of the arithmetic."""
    T, n, C = x.shape
    step = max(1, TILE_BYTES // (n * C * dtype.itemsize))
    return [slice(s, min(s + step, T)) for s in range(0, T, step)]


def cut(s, dtype, *tensors):
    """The tokens s of each tensor, in dtype."""
    return [v[s].to(dtype) for v in tensors]


def bmm_into(out, a, b):
    """out = a @ b, batched; rounded on the way when out is narrower."""
    if out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))


def post_res_tile(x, y, H_post, H_res, out):
    """Eq 3 on a tile, into out (T, n, C): sum_j H_res[i, j] x[j] + H_post[i] y."""
    if out.dtype == x.dtype:
        torch.bmm(H_res, x, out=out).addcmul_(column(H_post), y.unsqueeze(1))
    else:  # round once, after the sum
        out.copy_(torch.bmm(H_res, x).addcmul_(column(H_post), y.unsqueeze(1)))


def post_res_tile_backward(g, x, y, H_post, H_res, g_x, g_y, g_H_post, g_H_res):
    """Eq 3 backward on a tile: from g, the gradient of x_next, fill the last four."""
    bmm_into(g_x, H_res.mT, g)
    bmm_into(g_y.unsqueeze(1), H_post.unsqueeze(1), g)
    bmm_into(column(g_H_post), g, column(y))
    bmm_into(g_H_res, g, x.mT)


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
                post_res_tile_backward(*cut(s, dtype, g_next, *saved), *(g[s] for g in grads))
        return tuple(grads)


class Step(Function):
    """A whole boundary: Eq 3, then Eq 14-19 and H_pre x_next. The first form has y = H_post = H_res = None."""

    @staticmethod
    def forward(ctx, x, y, H_post, H_res, phi, alpha, b, sinkhorn_iters, eps):
        with torch.autocast(x.device.type, enabled=False):
            x_next, x_in, *maps, proj, r = Step.pass_over(x, y, H_post, H_res, phi, alpha, b, sinkhorn_iters, eps)
        ctx.save_for_backward(x, y, H_post, H_res, phi, alpha, b, x_next, proj, r)
        ctx.sinkhorn_iters = sinkhorn_iters
        ctx.set_materialize_grads(False)  # outputs nobody used have no gradient, and cost nothing
        return x_next, x_in, *maps

    @staticmethod
    def pass_over(x, y, H_post, H_res, phi, alpha, b, sinkhorn_iters, eps):
        """The forward: -> x_next (T, n, C), x_in (T, C), H_post (T, n), H_res (T, n, n), proj (K, T), r (T,)."""
        T, n, C = x.shape
        dtype = map_dtype(x)
        phi, alpha, b = phi.to(dtype), alpha.to(dtype), b.to(dtype)
        x_next = x if y is None else torch.empty_like(x)
        x_in, proj, r = x.new_empty(T, C), x.new_empty(T, len(b), dtype=dtype), x.new_empty(T, dtype=dtype)
        for s in tiles(x, dtype):
            if y is not None:
                post_res_tile(*cut(s, dtype, x, y, H_post, H_res), out=x_next[s])
            streams = x_next[s].to(dtype)  # as rounded: what a replay from the stored x_next sees
            v = streams.flatten(1)  # (T, nC)
            torch.mm(v, phi, out=proj[s])  # Eq 14
            r[s] = (torch.linalg.vector_norm(v, dim=1).square() / (n * C) + eps).sqrt()  # Eq 15
            H_pre = (alpha[0] * (proj[s, :n] / column(r[s])) + b[:n]).sigmoid()  # Eq 16, 17
            bmm_into(x_in[s].unsqueeze(1), H_pre.unsqueeze(1), streams)
        proj = proj.t().contiguous()  # (K, T)
        return x_next, x_in, *mappings(logits_of(proj, r, alpha, b, n)[0], n, sinkhorn_iters), proj, r

    @staticmethod
    @once_differentiable
    def backward(ctx, g_next, g_in, g_post, g_res):
        x, y, H_post, H_res, phi, alpha, b, x_next, proj, r = ctx.saved_tensors
        T, n, C = x.shape
        dtype = map_dtype(x)
        grads = [torch.empty_like(v) for v in ((x,) if y is None else (x, y, H_post, H_res))]
        with torch.autocast(x.device.type, enabled=False):
            g_pre = x.new_zeros(T, n, 1, dtype=dtype)
            for s in tiles(x, dtype) if g_in is not None else ():
                torch.bmm(*cut(s, dtype, x_next), column(g_in[s].to(dtype)), out=g_pre[s])
            g_proj, g_half_square, g_alpha, g_b, H_pre = mappings_backward(
                g_pre.squeeze(-1).t(), g_post, g_res, proj, r, alpha.to(dtype), b.to(dtype), n, ctx.sinkhorn_iters
            )
            g_norm, phi_t = g_half_square / (n * C), phi.to(dtype).t()
            g_phi = torch.zeros_like(phi_t, memory_format=torch.contiguous_format)  # (K, nC): faster this way round
            for s in tiles(x, dtype):
                v = x_next[s].to(dtype).flatten(1)  # (T, nC)
                g_phi.addmm_(g_proj[:, s], v)  # tile after tile: a fixed order
                g = column(g_norm[s]) * v  # the gradient of x_next: through Eq 15,
                if g_next is not None:
                    g += g_next[s].flatten(1)  # from the boundary after the next sublayer,
                g = g.addmm_(g_proj[:, s].t(), phi_t).unflatten(1, (n, C))  # through Eq 14,
                if g_in is not None:
                    g.addcmul_(column(H_pre[:, s].t()), g_in[s].to(dtype).unsqueeze(1))  # and through x_in
                if y is None:
                    grads[0][s] = g
                else:
                    g = g.to(x.dtype).to(dtype)  # rounded as between two operations: see recompute.py
                    post_res_tile_backward(g, *cut(s, dtype, x, y, H_post, H_res), *(v[s] for v in grads))
        grads += [None] * (4 - len(grads))
        return *grads, g_phi.t().to(phi.dtype), g_alpha.to(alpha.dtype), g_b.to(b.dtype), None, None


# ----------------------------------------------------------------------------------------------------------------------


def flat(x, y, H_post, H_res):
    """Leading dimensions as one: x (T, n, C), y (T, C), H_post (T, n), H_res (T, n, n), contiguous; None stays None."""
    n, C = x.shape[-2:]
    shapes = (-1, n, C), (-1, C), (-1, n), (-1, n, n)
    return [v if v is None else v.reshape(s).contiguous() for v, s in zip((x, y, H_post, H_res), shapes, strict=True)]


def mhc_step(x, y, H_post, H_res, phi, alpha, b, sinkhorn_iters=20, eps=1e-20):
    """impl='eager' of the boundary between two sublayers: arguments and results as mhc_ref.mhc_step_ref."""
    lead, (n, C) = x.shape[:-2], x.shape[-2:]
    x_next, x_in, H_post, H_res = Step.apply(*flat(x, y, H_post, H_res), phi, alpha, b, sinkhorn_iters, eps)
    return x_next.view(*lead, n, C), x_in.view(*lead, C), H_post.view(*lead, n), H_res.view(*lead, n, n)


def mhc_post_res(x, y, H_post, H_res):
    """impl='eager' of Eq 3 alone, after the last sublayer: arguments and results as mhc_ref.mhc_post_res_ref."""
    return PostRes.apply(*flat(x, y, H_post, H_res)).view(x.shape)
