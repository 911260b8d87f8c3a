"""The equations of mHC in plain PyTorch: slow, short, and what every faster path is tested against.

Letters: B batch, T time, n streams, C width of one stream; '...' stands for (B, T) or any other leading dimensions.
Each function here is the twin of the function of the same name, less `_ref`, in mhc.py.
Equation numbers are those of arXiv 2512.24880.

The mappings live in fp32 whatever x is (Eq 10-13), or in fp64 when x is fp64, as in the tests.
"""

import torch
import torch.nn.functional as F


def map_dtype(x):
    """The dtype of all mapping arithmetic for a stream tensor x: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sinkhorn_ref(logits, sinkhorn_iters=20):
    """Sinkhorn-Knopp projection of exp(logits) towards the doubly stochastic matrices (Eq 9).

    logits (..., n, n) -> H_res (..., n, n): M <- T_r(T_c(M)), columns first and rows last, so that row sums are exact
    and the truncation error sits in the column sums. The iteration runs on log M: the same mathematics, but a column
    whose entries all underflow is no longer 0/0, so values and gradients stay finite and right at any logit size.
    """
    log_M = logits.to(map_dtype(logits))
    for _ in range(sinkhorn_iters):
        log_M = log_M - log_M.logsumexp(-2, keepdim=True)  # T_c: every column sums to 1
        log_M = log_M - log_M.logsumexp(-1, keepdim=True)  # T_r: every row sums to 1
    return log_M.exp()


def sigmoid_ref(z):
    """sigmoid(z), by its logarithm. Its gradient is sigmoid(z) sigmoid(-z), which autograd takes from the result H as
    H (1 - H): in fp32 that is 0 from z = 17 on, where 4e-8 is right."""
    return F.logsigmoid(z).exp()


def mhc_maps_ref(proj, r, alpha, b, n, sinkhorn_iters=20, manifold=None):
    """The three mappings of one sublayer from its projections proj (..., n^2+2n) and norms r (..., 1) (Eq 16-19).

    manifold: what takes the place of Sinkhorn, if anything: a function of the K logits of H_res (..., K) that returns
    H_res (..., n, n); proj and b then have 2n + K columns.
    """
    sizes = n, n, len(b) - 2 * n
    scale = torch.cat([a.expand(size) for a, size in zip(alpha.to(proj.dtype), sizes, strict=True)])
    logits = scale / r * proj + b.to(proj.dtype)  # Eq 16: dividing after the matmul is the RMSNorm
    pre, post, res = logits.split(sizes, -1)
    if manifold is None:
        H_res = sinkhorn_ref(res.unflatten(-1, (n, n)), sinkhorn_iters)  # Eq 19     (..., n, n)
    else:
        H_res = manifold(res)
    return sigmoid_ref(pre), 2 * sigmoid_ref(post), H_res  # Eq 17, 18, 19


def mhc_coeffs_ref(x, phi, alpha, b, sinkhorn_iters=20, eps=1e-20, manifold=None):
    """The three mappings of one sublayer, from the streams x (Eq 7-8, ordered as Eq 14-19).

    x (..., n, C), phi (nC, n^2+2n), alpha (3,), b (n^2+2n,) -> H_pre (..., n), H_post (..., n), H_res (..., n, n).
    Columns of phi and b: pre | post | res, with logit (i, j) of H_res in column 2n + n*i + j. manifold: see
    mhc_maps_ref.
    """
    v = x.flatten(-2).to(map_dtype(x))  # (..., nC): the norm is over all streams at once
    proj = v @ phi.to(v.dtype)  # Eq 14                                         (..., n^2+2n)
    r = (v.square().mean(-1, keepdim=True) + eps).sqrt()  # Eq 15               (..., 1)
    return mhc_maps_ref(proj, r, alpha, b, x.shape[-2], sinkhorn_iters, manifold)


def hc_maps_ref(proj, r, alpha, b):
    """Hyper-Connections' three mappings (Eq 5) from projections and norms of each stream: unconstrained, through tanh.

    proj (..., n, n+2), columns pre, post, and n of res; r (..., n, 1) -> as mhc_maps_ref.
    """
    n = proj.shape[-2]
    dynamic = (proj / r).tanh()  # (..., n, n+2): [j, k] = tanh(theta_k . x_j / r_j)
    pre, post, res = b.to(proj.dtype).split([n, n, n * n])
    alpha = alpha.to(proj.dtype)
    H_res = alpha[2] * dynamic[..., 2:].mT + res.view(n, n)  # [i, j] = theta_res[i] . x_j / r_j
    return alpha[0] * dynamic[..., 0] + pre, alpha[1] * dynamic[..., 1] + post, H_res


def hc_coeffs_ref(x, theta, alpha, b, eps=1e-20):
    """Hyper-Connections' three mappings of one sublayer: x (..., n, C), theta (C, n+2), alpha (3,), b (n^2+2n,)."""
    v = x.to(map_dtype(x))
    r = (v.square().mean(-1, keepdim=True) + eps).sqrt()  # (..., n, 1): each stream by itself
    return hc_maps_ref(v @ theta.to(v.dtype), r, alpha, b)


def mhc_pre_ref(x, H_pre):
    """x (..., n, C), H_pre (..., n) -> x_in (..., C) = sum_j H_pre[j] x[j], in x's dtype."""
    return (H_pre.unsqueeze(-1) * x).sum(-2).to(x.dtype)


def mhc_post_res_ref(x, y, H_post, H_res):
    """The update of Eq 3: x_next[i] = sum_j H_res[i, j] x[j] + H_post[i] y, in x's dtype.

    x (..., n, C), y (..., C), H_post (..., n), H_res (..., n, n) -> x_next (..., n, C). Rows of H_res: output streams.
    """
    mixed = (H_res.unsqueeze(-1) * x.unsqueeze(-3)).sum(-2)  # (..., i, j, 1) * (..., 1, j, C), summed over j
    return (mixed + H_post.unsqueeze(-1) * y.unsqueeze(-2)).to(x.dtype)


def mhc_step_ref(x, y, H_post, H_res, phi, alpha, b, sinkhorn_iters=20, eps=1e-20, H_pre=None, manifold=None):
    """The boundary between two sublayers: close the one before (Eq 3), map and read for the one after (Eq 7-9).

    x (..., n, C), y (..., C) the output of the sublayer before with its H_post (..., n) and H_res (..., n, n); all
    three None before the first sublayer. phi, alpha, b belong to the sublayer after.
    -> x_next (..., n, C), x_in (..., C) its input, and its H_post, H_res. x_next is rounded to x's dtype before
    anything reads it, so that a replay from a stored x gives the same bits.

    With H_pre (..., n): single-pass mHC. x_next is read through this H_pre, which the boundary before made, and the
    H_pre made here reads at the next one: -> x_next, x_in, H_pre, H_post, H_res. Before the first sublayer H_pre is the
    caller's: one-hot, stream 0. manifold: see mhc_maps_ref.
    """
    x_next = x if y is None else mhc_post_res_ref(x, y, H_post, H_res)
    H_pre_next, H_post, H_res = mhc_coeffs_ref(x_next, phi, alpha, b, sinkhorn_iters, eps, manifold)
    if H_pre is None:
        return x_next, mhc_pre_ref(x_next, H_pre_next), H_post, H_res
    return x_next, mhc_pre_ref(x_next, H_pre), H_pre_next, H_post, H_res


def hc_step_ref(x, y, H_post, H_res, theta, alpha, b, eps=1e-20):
    """Hyper-Connections' boundary, as mhc_step_ref's: theta (C, n+2), alpha (3,), b (n^2+2n,) of the sublayer after."""
    x_next = x if y is None else mhc_post_res_ref(x, y, H_post, H_res)
    H_pre, H_post, H_res = hc_coeffs_ref(x_next, theta, alpha, b, eps)
    return x_next, mhc_pre_ref(x_next, H_pre), H_post, H_res
