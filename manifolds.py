"""The manifolds that mHC's H_res can live on: all of them doubly stochastic matrices, each by its own paper.

    manifold            H_res                                                        logits        n         paper
    'sinkhorn'          Sinkhorn-Knopp of exp(logits): rows exact, columns nearly    n^2           any       mHC
    'identity'          I: nothing to learn                                          0             any       iHC
    'permutations'      mixture of all n! permutation matrices                       n!            1 to 4    mHC-lite
    'kronecker'         Kronecker product of 2 x 2 matrices                          log2 n        2^k       KromHC
    'orthostochastic'   squared blocks of an orthogonal matrix                       n(2n-1)       any       go-mHC
    'budget'            entries one by one within what rows and columns have left    (n-1)^2       any       TBP-mHC

mHC is arXiv 2512.24880, iHC 2607.28611, mHC-lite 2601.05732, KromHC 2601.21579, go-mHC 2604.02309, TBP-mHC 2605.21724.

    manifold = MANIFOLDS["budget"]
    H_res = manifold.H_res(logits, n)       # (..., manifold.n_logits(n)) -> (..., n, n)

H_pre and H_post are the same in all. As everywhere x_out[i] = sum_j H_res[i, j] x[j], and logits of entries or pairs
stand in row-major order. All but Sinkhorn's are exact, and doubly stochastic to rounding at any logit. Arithmetic is in
fp32, or fp64 when the logits are, and the gradient is autograd's.

The first logits are near the identity. Those that are learned are not exactly there, since each of these formulas is
flat at the identity (a sigmoid or softmax saturates, a square has no slope at 0): H_res would get no gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mhc_ref import map_dtype, sinkhorn_ref

BLOCK = 2  # s of go-mHC: with 1 H_res is orthostochastic, larger ones fill more of the polytope


def sinkhorn(logits, n, sinkhorn_iters=20):
    """mHC, Eq 9: logits (..., n^2) of exp, T_r(T_c(.)) repeated -> H_res (..., n, n). mhc.py has faster ones."""
    return sinkhorn_ref(logits.unflatten(-1, (n, n)), sinkhorn_iters)


def identity(logits, n):
    """iHC: H_res = I; logits (..., 0) tell the shape. Only H_pre and H_post are learned."""
    return torch.eye(n, dtype=map_dtype(logits), device=logits.device).expand(*logits.shape[:-1], n, n)


def all_permutations(n, device):
    """(n!, n, n), in lexicographic order, the identity first. Made on the device: a copy to it would wait each time."""
    k, rows = torch.arange(math.factorial(n), device=device), []
    free = torch.ones(len(k), n, dtype=torch.bool, device=device)  # columns without a one
    for i in range(n):
        which = k // math.factorial(n - 1 - i) % (n - i)  # of the free ones: k's digits in the factorial base
        rows.append(free & (free.cumsum(1) == which.unsqueeze(1) + 1))
        free = free & ~rows[-1]
    return torch.stack(rows, 1)


def permutations(logits, n):
    """mHC-lite: H_res = sum_k softmax(logits)_k P_k over all n! permutations, P_k[i, j] = 1 where order_k[i] = j."""
    logits = logits.to(map_dtype(logits))
    P = all_permutations(n, logits.device).to(logits.dtype)
    return torch.einsum("...k,kij->...ij", logits.softmax(-1), P)


def kronecker(logits, n):
    """KromHC: H_res = U_1 (x) U_2 (x) ..., U_k = (1 - s_k) I + s_k J, J the swap of two, s = sigmoid(logits).

    The first factor is the outermost: it mixes one half of the streams with the other.
    """
    logits = logits.to(map_dtype(logits))
    stay, swap = (-logits).sigmoid(), logits.sigmoid()  # (..., log2 n); 1 - s without losing its last bits
    H = logits.new_ones(*logits.shape[:-1], 1, 1)
    for s, t in zip(stay.unbind(-1), swap.unbind(-1), strict=True):
        U = torch.stack((s, t, t, s), -1).unflatten(-1, (2, 2))
        H = torch.einsum("...ij,...kl->...ikjl", H, U).flatten(-4, -3).flatten(-2)
    return H


def orthostochastic(logits, n):
    """go-mHC: Q = (I - A)(I + A)^-1 with A skew (ns, ns), and H_res[i, j] = ||Q_ij||_F^2 / s of its (s, s) blocks.

    logits: A above its diagonal. I + A is never singular, but at logits of 80 its condition costs fp32 some digits of
    Q's orthogonality; one step of Newton-Schulz gives them back.
    """
    M = n * BLOCK
    i, j = torch.triu_indices(M, M, 1, device=logits.device)
    A = logits.new_zeros(*logits.shape[:-1], M, M, dtype=map_dtype(logits))
    A[..., i, j] = logits.to(A.dtype)
    A = A - A.mT
    eye = torch.eye(M, dtype=A.dtype, device=A.device)
    Q = torch.linalg.solve_ex(eye + A, eye - A)[0]  # the two factors commute; `solve` waits, to look for an error
    Q = 1.5 * Q - 0.5 * Q @ (Q.mT @ Q)
    return Q.square().unflatten(-1, (n, BLOCK)).unflatten(-3, (n, BLOCK)).sum((-3, -1)) / BLOCK


def budget(logits, n):
    """TBP-mHC: entry by entry, row by row, H_res[i, j] = L + (U - L) sigmoid(logit) for i, j < n - 1.

    U = min(r, c_j): what row i and column j still have to give. L = max(0, r - sum_{k>j} c_k): what the columns behind
    could not take up. (The bound from the rows below never binds: each still has 1, and no column needs more.) The last
    column and the last row take what is left.
    """
    share = logits.to(map_dtype(logits)).sigmoid().unflatten(-1, (n - 1, n - 1)) if n > 1 else None
    columns = [logits.new_ones(logits.shape[:-1], dtype=map_dtype(logits)) for _ in range(n)]
    rows = []
    for i in range(n - 1):
        left, row = torch.ones_like(columns[0]), []
        for j in range(n - 1):
            low = (left - sum(columns[j + 1 :])).clamp(min=0)
            high = torch.minimum(left, columns[j])
            row.append(low + (high - low).clamp(min=0) * share[..., i, j])  # rounding may put low above high
            left = left - row[j]
            columns[j] = columns[j] - row[j]
        row.append(left)
        columns[-1] = columns[-1] - left
        rows.append(torch.stack(row, -1))
    return torch.stack((*rows, torch.stack(columns, -1)), -2)  # (..., n, n)


# ----------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Manifold:
    n_logits: Callable  # n -> how many logits one H_res takes
    H_res: Callable  # logits (..., n_logits(n)), n -> (..., n, n)
    first: Callable  # n -> the first logits, (n_logits(n),) in fp32
    fixed: Callable  # n -> logits of which H_res is exactly I in fp32, where it is not learned
    why_not: Callable = lambda n: None  # n -> what keeps it from n streams, None if nothing does


def first_orthostochastic(n):
    """A's blocks are a [[1, -1], [1, 1]] above the diagonal, 0 on it: H_res is 8 a^2 = .0025 off it, like mHC's.

    With one sign throughout, H_res could at first move in n(n-1)/2 of its (n-1)^2 directions only; so it can in all.
    """
    p, q = torch.triu_indices(n * BLOCK, n * BLOCK, 1)
    sign = torch.where((p % BLOCK == 0) & (q % BLOCK == 1), -1.0, 1.0)
    return torch.where(p // BLOCK == q // BLOCK, 0.0, sign * (0.0025 / 8) ** 0.5)


def too_many_permutations(n):
    return f"at most 4 streams, since it mixes n! permutations ({math.factorial(n):,} here)" if n > 4 else None


def no_power_of_2(n):
    return "a power of 2 of streams, since it is a product of 2 x 2 matrices" if n & (n - 1) else None


def one_of_all(n, away):
    """Logits of permutations: 0 at the identity, which comes first, and `away` elsewhere."""
    return torch.tensor([0.0] + [away] * (math.factorial(n) - 1))


def diagonal(n, on, off):
    return (on - off) * torch.eye(n).flatten() + off


MANIFOLDS = {
    # 6I - 3 is the paper's A.6: .993 on the diagonal of 4 streams. 0 and -8 are mHC-lite's and KromHC's, the rest ours
    "sinkhorn": Manifold(lambda n: n * n, sinkhorn, lambda n: diagonal(n, 3, -3), lambda n: diagonal(n, 200, 0)),
    "identity": Manifold(lambda n: 0, identity, lambda n: torch.empty(0), lambda n: torch.empty(0)),
    "permutations": Manifold(
        math.factorial, permutations, lambda n: one_of_all(n, -8), lambda n: one_of_all(n, -200), too_many_permutations
    ),
    "kronecker": Manifold(
        lambda n: n.bit_length() - 1,
        kronecker,
        lambda n: torch.full((n.bit_length() - 1,), -8.0),
        lambda n: torch.full((n.bit_length() - 1,), -200.0),
        no_power_of_2,
    ),
    "orthostochastic": Manifold(
        lambda n: BLOCK * n * (BLOCK * n - 1) // 2,
        orthostochastic,
        first_orthostochastic,
        lambda n: torch.zeros(BLOCK * n * (BLOCK * n - 1) // 2),
    ),
    "budget": Manifold(
        lambda n: (n - 1) ** 2, budget, lambda n: diagonal(n - 1, 6, -6), lambda n: diagonal(n - 1, 200, -200)
    ),
}


def check_manifold(name, n):
    """Raise ValueError, saying what is wanted, for an unknown manifold or one that does not take n streams."""
    if name not in MANIFOLDS:
        raise ValueError(f"manifold={name!r}: wanted one of {', '.join(map(repr, MANIFOLDS))}")
    if wanted := MANIFOLDS[name].why_not(n):
        others = [repr(k) for k, m in MANIFOLDS.items() if m.why_not(n) is None]
        raise ValueError(f"manifold={name!r} with n_streams={n}: wanted {wanted}; or one of {', '.join(others)}")
