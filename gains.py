"""What the mappings do to a signal: the paper's Amax gain magnitudes (Section 3, Figs 3 and 7), and alarms.

    maps = model.residual_maps(idx)                     # over the 2L sublayers: H_pre, H_post, H_res
    gains([H_res for _, _, H_res in maps])              # lists over depth, for metrics.jsonl
    alarms(...)                                         # lines to print when a mapping is dead

Rows of H_res are output streams. So |row sum| is what H_res does to a signal that all streams carry, forward, and
|column sum| is what it does to a gradient that all streams carry, backward. The gain is the maximum over rows
(columns), averaged over tokens. The maximum hides attenuation, so the minimum is measured beside it.
"""

import torch
from torch.distributed.tensor import DTensor


def row_gains(M):
    """M (..., n, n) -> max and min over rows of |row sum|, averaged over tokens: the forward gain, two floats."""
    sums = M.sum(-1).abs()
    return sums.amax(-1).mean().item(), sums.amin(-1).mean().item()


def column_gains(M):
    """M (..., n, n) -> max and min over columns of |column sum|, averaged over tokens: the backward gain."""
    return row_gains(M.mT)


def product(matrices):
    """Product over depth of a list of (..., n, n), later sublayers on the left; the identity for an empty list."""
    P = torch.eye(matrices[0].shape[-1], dtype=matrices[0].dtype)
    for M in matrices:
        P = M @ P
    return P


def in_double(H_res):
    """(tokens, n, n) each, on the host in fp64: HC's products leave fp32 behind, and not every device has fp64."""
    return [H.cpu().double().reshape(-1, *H.shape[-2:]) for H in H_res]


def gains(H_res):
    """H_res: a list over sublayers of (..., n, n) -> {name: list over sublayers}.

    Names: {single, composite} _ {fwd, bwd} _ {max, min}. The forward composite at l is the product of sublayers 1..l,
    the backward one at l the product of l..L.
    """
    H_res = in_double(H_res)
    L = len(H_res)
    forward, backward = [H_res[0]], [H_res[-1]]
    for i in range(1, L):
        forward.append(H_res[i] @ forward[-1])
        backward.append(backward[-1] @ H_res[L - 1 - i])
    backward.reverse()
    found = {
        "single_fwd": [row_gains(H) for H in H_res],
        "single_bwd": [column_gains(H) for H in H_res],
        "composite_fwd": [row_gains(P) for P in forward],
        "composite_bwd": [column_gains(P) for P in backward],
    }
    return {f"{k}_{m}": [pair[i] for pair in v] for k, v in found.items() for i, m in enumerate(("max", "min"))}


def heat_maps(H_res):
    """H_res: a list over sublayers of (..., n, n) -> {title: (n, n)}, averaged over tokens, as in Fig 8."""
    H_res = in_double(H_res)
    L = len(H_res)
    maps = {f"sublayer {i + 1}": H_res[i] for i in sorted({0, (L - 1) // 2, L - 1})}
    for first, last in ((0, L // 2), (L // 2, L), (0, L)):
        if last > first:
            maps[f"sublayers {first + 1}-{last}"] = product(H_res[first:last])
    return {title: M.mean(0).numpy() for title, M in maps.items()}


def stream_spread(x):
    """x (B, T, n, C) -> how far the streams are from their mean, relative to their size: 0 when all are identical."""
    x = x.float()
    return ((x - x.mean(-2, keepdim=True)).norm() / x.norm()).item()


def res_gradients(residuals):
    """Gradient norm of what makes H_res from x (mHC: phi's last n^2 columns, HC: theta's last n), per sublayer.

    None where that map is dead by construction (residual.live_maps) and where no gradient has been computed.
    """
    norms = []
    for grad in (r.res_gradient() for r in residuals):
        norm = None if grad is None else grad.float().norm()
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        norms.append(None if norm is None else norm.item())
    return norms


def alarms(kind, grad_norms, spreads, H_res):
    """Lines that name mappings which cannot learn any more, or never could; none for a healthy model.

    kind: the class of the residual connections; grad_norms: res_gradients(); spreads: stream_spread of the x each
    sublayer reads; H_res: a list of (..., n, n).
    The first sublayer's streams are identical by construction, and dead maps have None for a gradient: not reported.
    """
    lines = []
    alive = sorted(g for g in grad_norms if g is not None)
    median = alive[len(alive) // 2] if alive else 0.0
    for i, (grad, spread, H) in enumerate(zip(grad_norms, spreads, H_res, strict=True)):
        where, n = f"alarm: sublayer {i + 1}:", H.shape[-1]
        if grad is not None and grad <= 1e-6 * median:
            found = f"the gradient of {kind.res_weight} is {grad:.1e}"
            lines.append(f"{where} {found}, the median over sublayers {median:.1e}")
        if i > 0 and n > 1 and spread < 1e-6:
            lines.append(f"{where} all {n} streams are identical (relative spread {spread:.1e})")
        if kind.saturates and grad is not None and n > 1 and (H * (1 - H)).abs().max() < 1e-6:
            lines.append(f"{where} Sinkhorn is saturated: every entry of H_res is 0 or 1, and learns no more")
    return lines
