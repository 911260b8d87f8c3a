"""mHC on a CPU: the boundary between two sublayers with a hand-written backward ('eager') and compiled ('compiled').

    x_next, x_in, H_post, H_res = mhc_step(x, y, H_post, H_res, phi, alpha, b)    # signatures as in mhc_ref.py
    x_next = mhc_post_res(x, y, H_post, H_res)                                    # after the last sublayer

The twins in mhc_ref.py are the mathematics; this file is the same mathematics arranged for a memory hierarchy. Nothing
here is specific to a CPU but the size of a tile: any device that PyTorch knows runs it.

What makes it fast (the arithmetic is nothing, moving the nC numbers of every token is everything):
- One autograd function a boundary. Autograd over the twin keeps and sums (T, n, n, C) products and adds three
  gradients of x_next, each in memory; here the backward is written out, and each of its sums is made where it is read.
- Tiles. All steps of a pass run over a block of tokens that stays in cache before the next block is loaded, and scratch
  memory is a tile, not a tensor (fresh pages of memory cost as much as the arithmetic).
- H_res x is a batched product of n x n by n x C: with C inside, the library's kernel runs at the speed of memory.
- Sinkhorn lies as (n, n, T): tokens innermost, so that every step is a vector operation over tokens. T_c and T_r on
  log M are log_softmax over one of the outer dimensions: one operation each, and its backward another.

Saved for backward: x, y, H_post, H_res, x_next (the same tensor that is the next boundary's x, so it costs nothing), the
projections of Eq 14 and r. Not saved: any state of Sinkhorn. Its backward replays all iterations; from the final matrix
alone it would be wrong (a relative error above 1 at logits of std 6).

Letters: T tokens (all leading dimensions as one), n streams, C width, K = n^2+2n logits; g_* the gradient of *.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mhc_ref import map_dtype

TILE_BYTES = 8 << 20  # of x in a tile: smaller ones pay more for starting operations than the L2 cache gives back
log_softmax_backward = torch.ops.aten._log_softmax_backward_data.default


def tiles(x, dtype):
    """Slices of the T tokens of x (T, n, C), each about TILE_BYTES of x in `dtype`, the dtype of the arithmetic."""
    T, n, C = x.shape
    step = max(1, TILE_BYTES // (n * C * dtype.itemsize))
    return [slice(s, min(s + step, T)) for s in range(0, T, step)]


def column(v):
    """(T, n) -> (T, n, 1), to multiply streams of width C."""
    return v.unsqueeze(-1)


# ----------------------------------------------------------------------------------------------------------------------
# the mappings: everything about n^2+2n numbers a token, nothing about C


def sinkhorn_log(logits, sinkhorn_iters):
    """Eq 9 in the log domain, tokens innermost: logits (n, n, T) -> log M after each half step, 2 sinkhorn_iters + 1."""
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


def scales(alpha, n):
    """alpha (3,) -> one factor a logit, (K,): pre | post | res."""
    return torch.cat([alpha[0].expand(n), alpha[1].expand(n), alpha[2].expand(n * n)])


def mappings(logits, n, sinkhorn_iters):
    """Eq 17-19: logits (T, K) -> H_post (T, n), H_res (T, n, n). H_pre is made in the tiles that use it."""
    log_M = logits[:, 2 * n :].t().contiguous().unflatten(0, (n, n))  # (n, n, T)
    for _ in range(sinkhorn_iters):  # as in sinkhorn_log, without the history
        log_M = log_M.log_softmax(0).log_softmax(1)
    return 2 * logits[:, n : 2 * n].sigmoid(), log_M.exp_().permute(2, 0, 1).contiguous()


def mappings_backward(g_pre, g_post, g_res, logits, n, sinkhorn_iters):
    """Gradients of H_pre (T, n), H_post (T, n) or None, H_res (T, n, n) or None -> gradient of the logits (T, K)."""
    g = torch.zeros_like(logits)
    H_pre, half_post = logits[:, :n].sigmoid(), logits[:, n : 2 * n].sigmoid()
    g[:, :n] = g_pre * H_pre * (1 - H_pre)
    if g_post is not None:
        g[:, n : 2 * n] = g_post * 2 * half_post * (1 - half_post)
    if g_res is not None:
        res, g_res = (v.movedim(0, -1).contiguous() for v in (logits[:, 2 * n :].unflatten(1, (n, n)), g_res))
        g[:, 2 * n :] = sinkhorn_log_backward(g_res, res, sinkhorn_iters).flatten(0, 1).t()
    return g


# ----------------------------------------------------------------------------------------------------------------------
# the streams: one tile of tokens at a time, everything already in the arithmetic's dtype


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
    bmm_into(g_H_post.unsqueeze(-1), g, column(y))
    bmm_into(g_H_res, g, x.mT)


def cut(s, dtype, *tensors):
    """The tokens s of each tensor, in dtype."""
    return [v[s].to(dtype) for v in tensors]


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
        T, n, C = x.shape
        dtype, K = map_dtype(x), n * n + 2 * n
        x_next = x if y is None else torch.empty_like(x)
        x_in, phi_ = x.new_empty(T, C), phi.to(dtype)
        proj, r = x.new_empty(T, K, dtype=dtype), x.new_empty(T, 1, dtype=dtype)
        scale, b_ = scales(alpha.to(dtype), n), b.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            for s in tiles(x, dtype):
                if y is not None:
                    post_res_tile(*cut(s, dtype, x, y, H_post, H_res), out=x_next[s])
                xs = x_next[s].to(dtype)  # as rounded: what any replay from the stored x_next sees
                v = xs.flatten(1)  # (T, nC)
                torch.mm(v, phi_, out=proj[s])  # Eq 14
                r[s] = (torch.linalg.vector_norm(v, dim=1, keepdim=True).square() / (n * C) + eps).sqrt()  # Eq 15
                H_pre = (scale[:n] / r[s] * proj[s, :n] + b_[:n]).sigmoid()  # Eq 16, 17
                bmm_into(x_in[s].unsqueeze(1), H_pre.unsqueeze(1), xs)
            H_post_next, H_res_next = mappings(scale / r * proj + b_, n, sinkhorn_iters)
        ctx.save_for_backward(x, y, H_post, H_res, phi, alpha, b, x_next, proj, r)
        ctx.sinkhorn_iters = sinkhorn_iters
        ctx.set_materialize_grads(False)  # outputs nobody used have no gradient, and cost nothing
        return x_next, x_in, H_post_next, H_res_next

    @staticmethod
    @once_differentiable
    def backward(ctx, g_next, g_in, g_post, g_res):
        x, y, H_post, H_res, phi, alpha, b, x_next, proj, r = ctx.saved_tensors
        T, n, C = x.shape
        dtype, phi_ = map_dtype(x), phi.to(map_dtype(x))
        grads = [torch.empty_like(v) for v in ((x,) if y is None else (x, y, H_post, H_res))]
        g_phi = phi_.new_zeros(phi.shape[::-1])  # transposed: the product that makes it is faster this way round
        with torch.autocast(x.device.type, enabled=False):
            g_pre = x.new_zeros(T, n, 1, dtype=dtype)
            for s in tiles(x, dtype) if g_in is not None else ():
                torch.bmm(*cut(s, dtype, x_next), column(g_in[s].to(dtype)), out=g_pre[s])
            g_proj, g_norm, g_alpha, g_b, H_pre = Step.logits_backward(
                (g_pre.squeeze(-1), g_post, g_res), proj, r, alpha.to(dtype), b.to(dtype), n, ctx.sinkhorn_iters
            )
            g_norm = g_norm / (n * C)
            for s in tiles(x, dtype):
                v = x_next[s].to(dtype).flatten(1)  # (T, nC)
                g_phi.addmm_(g_proj[s].t(), v)  # tile after tile: a fixed order
                g = g_norm[s] * v if g_next is None else torch.addcmul(g_next[s].to(dtype).flatten(1), g_norm[s], v)
                g = g.addmm_(g_proj[s], phi_.t()).unflatten(1, (n, C))  # gradient of x_next, through Eq 14 and 15
                if g_in is not None:
                    g.addcmul_(column(H_pre[s]), g_in[s].to(dtype).unsqueeze(1))  # and through x_in
                if y is None:
                    grads[0][s] = g
                else:  # rounded here: a boundary gives the same bits as its two halves (recompute.py)
                    g = g.to(x.dtype).to(dtype)
                    post_res_tile_backward(g, *cut(s, dtype, x, y, H_post, H_res), *(v[s] for v in grads))
        grads += [None] * (4 - len(grads))
        return *grads, g_phi.t().to(phi.dtype), g_alpha.to(alpha.dtype), g_b.to(b.dtype), None, None

    @staticmethod
    def logits_backward(g_maps, proj, r, alpha, b, n, sinkhorn_iters):
        """Gradients of the three mappings -> of proj (T, K), of the mean square times 2 / v (T, 1), alpha, b; and H_pre."""
        scale = scales(alpha, n)
        unit = proj / r  # Eq 16 without alpha
        logits = scale * unit + b
        g = mappings_backward(*g_maps, logits, n, sinkhorn_iters)  # (T, K)
        g_unit = g * unit
        g_alpha = torch.stack([part.sum() for part in g_unit.split([n, n, n * n], 1)])
        g_norm = -(g_unit @ column(scale)) / r.square()  # d r = v dv / (nC r), and r divides every logit
        return g * (scale / r), g_norm, g_alpha, g.sum(0), logits[:, :n].sigmoid()


def flat(x, y, H_post, H_res):
    """Leading dimensions as one: x (T, n, C), y (T, C), H_post (T, n), H_res (T, n, n); None stays None."""
    n, C = x.shape[-2:]
    if y is None:
        return x.reshape(-1, n, C), None, None, None
    return x.reshape(-1, n, C), y.reshape(-1, C), H_post.reshape(-1, n), H_res.reshape(-1, n, n)


def mhc_step(x, y, H_post, H_res, phi, alpha, b, sinkhorn_iters=20, eps=1e-20):
    """impl='eager' of the boundary between two sublayers: arguments and results as mhc_ref.mhc_step_ref."""
    lead, (n, C) = x.shape[:-2], x.shape[-2:]
    x_next, x_in, H_post, H_res = Step.apply(*flat(x, y, H_post, H_res), phi, alpha, b, sinkhorn_iters, eps)
    return x_next.view(*lead, n, C), x_in.view(*lead, C), H_post.view(*lead, n), H_res.view(*lead, n, n)


def mhc_post_res(x, y, H_post, H_res):
    """impl='eager' of Eq 3 alone, after the last sublayer: arguments and results as mhc_ref.mhc_post_res_ref."""
    return PostRes.apply(*flat(x, y, H_post, H_res)).view(x.shape)
mhc_step_compiled, mhc_post_res_compiled = mhc_step, mhc_post_res
