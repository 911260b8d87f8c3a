"""The manifolds of H_res against references written from the papers' equations in numpy, in double precision."""

import itertools
import math

import numpy as np
import pytest
import torch

from manifolds import MANIFOLDS, check_manifold

CASES = [(name, n) for name, m in MANIFOLDS.items() for n in (1, 2, 3, 4, 8) if m.why_not(n) is None]
SEVERAL = [(name, n) for name, n in CASES if n > 1]
EXACT = [(name, n) for name, n in CASES if name != "sinkhorn"]
LEARNED = [(name, n) for name, n in SEVERAL if name != "identity"]
NEW = [(name, n) for name, n in LEARNED if name != "sinkhorn"]  # its gradients are tested in test_residual.py


def some_logits(name, n, std, tokens=(3, 2), dtype=torch.float64):
    g = torch.Generator().manual_seed(n)
    return (torch.randn(*tokens, MANIFOLDS[name].n_logits(n), generator=g, dtype=torch.float64) * std).to(dtype)


# -- one token each, by the equations ----------------------------------------------------------------------------------


def sigmoid(t):
    return 1 / (1 + np.exp(-t))


def sinkhorn_by_definition(t, n):
    M = np.exp(t.astype(np.longdouble)).reshape(n, n)
    for _ in range(20):
        M = M / M.sum(0, keepdims=True)
        M = M / M.sum(1, keepdims=True)
    return M.astype(float)


def identity_by_definition(t, n):
    return np.eye(n)


def permutations_by_definition(t, n):
    weights = np.exp(t - t.max())
    H = np.zeros((n, n))
    for w, order in zip(weights / weights.sum(), itertools.permutations(range(n)), strict=True):
        for i in range(n):
            H[i, order[i]] += w
    return H


def kronecker_by_definition(t, n):
    """H[i, j] is the product over the bits of i and j, the highest first: stay where they agree, swap where not."""
    H = np.ones((n, n))
    for i, j in itertools.product(range(n), repeat=2):
        for k, logit in enumerate(t):
            bit = len(t) - 1 - k
            H[i, j] *= sigmoid(logit) if (i >> bit & 1) != (j >> bit & 1) else sigmoid(-logit)
    return H


def orthostochastic_by_definition(t, n, s=2):
    logits, A = iter(t), np.zeros((n * s, n * s))
    for p in range(n * s):
        for q in range(p + 1, n * s):
            A[p, q] = next(logits)
            A[q, p] = -A[p, q]
    Q = (np.eye(n * s) - A) @ np.linalg.inv(np.eye(n * s) + A)
    return np.array([[(Q[s * i : s * i + s, s * j : s * j + s] ** 2).sum() / s for j in range(n)] for i in range(n)])


def budget_by_definition(t, n):
    """With both lower bounds: the columns behind, and the rows below, must be able to take up the rest."""
    H, r, c = np.zeros((n, n)), np.ones(n), np.ones(n)
    for i, j in itertools.product(range(n), repeat=2):
        upper = min(r[i], c[j])
        lower = max(0, r[i] - c[j + 1 :].sum(), c[j] - r[i + 1 :].sum())
        free = i < n - 1 and j < n - 1
        H[i, j] = lower + (upper - lower) * sigmoid(t[i * (n - 1) + j]) if free else upper
        r[i] -= H[i, j]
        c[j] -= H[i, j]
    return H


@pytest.mark.parametrize("name,n", CASES)
@pytest.mark.parametrize("std", [1, 20])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_each_manifold_equals_its_equations(name, n, std, dtype, tolerance):
    logits = some_logits(name, n, std, dtype=dtype)
    H = MANIFOLDS[name].H_res(logits, n)
    assert H.dtype == dtype and H.shape == (3, 2, n, n)
    for at in np.ndindex(3, 2):
        want = globals()[f"{name}_by_definition"](logits[at].double().numpy(), n)
        np.testing.assert_allclose(H[at].double().numpy(), want, atol=tolerance)


@pytest.mark.parametrize("name,n", EXACT)
@pytest.mark.parametrize("std", [1, 80])
def test_all_but_sinkhorns_are_doubly_stochastic_at_any_logit(name, n, std):
    H = MANIFOLDS[name].H_res(some_logits(name, n, std, tokens=(2000,), dtype=torch.float32), n)
    assert (H.sum(-1) - 1).abs().max() < 1e-6 and (H.sum(-2) - 1).abs().max() < 1e-6 and H.min() > -1e-6


@pytest.mark.parametrize("n", [2, 4, 8])
def test_sinkhorns_rows_are_exact_and_its_columns_are_not(n):
    H = MANIFOLDS["sinkhorn"].H_res(some_logits("sinkhorn", n, 80, tokens=(200,), dtype=torch.float32), n)
    assert (H.sum(-1) - 1).abs().max() < 1e-5 < 1e-2 < (H.sum(-2) - 1).abs().max()


@pytest.mark.parametrize("name,n", NEW)
def test_gradients_equal_finite_differences(name, n):
    """eps is well below the distance of these logits to a kink of budget's minimum and maximum."""
    logits = some_logits(name, n, 1.5, tokens=(1,)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: MANIFOLDS[name].H_res(t, n), logits, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name,n", NEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_large_logits(name, n, dtype):
    logits = some_logits(name, n, 80, tokens=(100,), dtype=dtype).requires_grad_()
    (MANIFOLDS[name].H_res(logits, n) * torch.arange(n * n).view(n, n) ** 2).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().max() > 0


@pytest.mark.parametrize("name,n", CASES)
def test_the_first_logits_are_near_the_identity(name, n):
    first = MANIFOLDS[name].first(n)
    assert first.shape == (MANIFOLDS[name].n_logits(n),) and first.dtype == torch.float32
    H = MANIFOLDS[name].H_res(first, n)
    assert (H - torch.eye(n)).abs().max() < 0.0025 * n


@pytest.mark.parametrize("name,n", LEARNED)
def test_at_the_first_logits_h_res_can_move_in_every_direction(name, n):
    """Of the (n-1)^2 of doubly stochastic matrices; KromHC's have log2 n, Sinkhorn's truncated columns some more."""
    m = MANIFOLDS[name]
    slope = torch.autograd.functional.jacobian(lambda t: m.H_res(t, n), m.first(n).double()).flatten(0, 1)
    dims = int(math.log2(n)) if name == "kronecker" else (n - 1) ** 2
    rank = torch.linalg.matrix_rank(slope, rtol=1e-5)
    assert rank == dims or name == "sinkhorn" and rank > dims
    unused = slope.abs().amax(0) < 1e-6
    within = torch.tensor([p // 2 == q // 2 for p, q in itertools.combinations(range(2 * n), 2)])
    # turning one block within itself changes nothing as long as n = 2; nowhere else is a logit without effect
    assert torch.equal(unused, within) if (name, n) == ("orthostochastic", 2) else not unused.any()


@pytest.mark.parametrize("name", MANIFOLDS)
def test_maps_are_fp32_whatever_the_logits(name):
    logits = some_logits(name, 4, 1, dtype=torch.bfloat16)
    assert MANIFOLDS[name].H_res(logits, 4).dtype == torch.float32


def test_a_row_of_h_res_is_an_output_stream():
    """A logit that the transpose would put elsewhere: KromHC's matrices are symmetric, the others' are not."""
    for name, n in LEARNED:
        if name != "kronecker" and n > 2:
            H = MANIFOLDS[name].H_res(some_logits(name, n, 1.0), n)
            assert (H - H.mT).abs().max() > 0.05
    order = list(itertools.permutations(range(3))).index((2, 0, 1))
    H = MANIFOLDS["permutations"].H_res(100 * torch.eye(6)[order], 3)
    assert H.argmax(-1).tolist() == [2, 0, 1]  # row i reads stream order[i]


def test_refusals_say_what_is_wanted():
    with pytest.raises(ValueError, match=r"n_streams=8: wanted at most 4.*40,320.*'budget'"):
        check_manifold("permutations", 8)
    with pytest.raises(ValueError, match=r"manifold='kronecker' with n_streams=6: wanted a power of 2"):
        check_manifold("kronecker", 6)
    with pytest.raises(ValueError, match=r"manifold='sinkhron': wanted one of 'sinkhorn', 'identity'"):
        check_manifold("sinkhron", 4)
    for name, n in CASES:
        check_manifold(name, n)
