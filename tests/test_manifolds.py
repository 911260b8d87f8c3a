"""The manifolds of H_res against references written from the papers' equations in numpy, in double precision; and each
as a setting of the model."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import checkpoint
import plan
import recompute
from gains import alarms, gains, heat_maps, res_gradients, stream_spread
from manifolds import MANIFOLDS, all_permutations, check_manifold
from mhc_ref import mhc_coeffs_ref
from model import GPT, MHC, GPTConfig
from parallel import Ranks
from sample import generate
from tests.ranks import run_ranks
from tests.test_plan import LAYOUT

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


@pytest.mark.parametrize("name,n", CASES)
def test_where_h_res_is_not_learned_it_is_the_identity(name, n):
    assert torch.equal(MANIFOLDS[name].H_res(MANIFOLDS[name].fixed(n), n), torch.eye(n))


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


# -- in the model -----------------------------------------------------------------------------------------------------


class Copies(TorchFunctionMode):
    """Fails where a value of the host's is copied to the device, or waited for: a step would stop there on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.linalg.solve, torch.linalg.inv), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_maps_and_their_gradients_copy_nothing_to_the_device(manifold):
    n, C = 4, 6
    K = 2 * n + MANIFOLDS[manifold].n_logits(n)
    phi, b = torch.randn(n * C, K, requires_grad=True), torch.randn(K, requires_grad=True)
    x, alpha, H_res = torch.randn(5, n, C), torch.randn(3, requires_grad=True), MANIFOLDS[manifold].H_res
    with Copies():
        maps = mhc_coeffs_ref(x, phi, alpha, b, manifold=lambda logits: H_res(logits, n))
        sum(H.square().sum() for H in maps).backward()
    assert phi.grad.isfinite().all() and alpha.grad[:2].abs().min() > 0


def test_all_permutations_in_lexicographic_order():
    for n in (1, 2, 3, 4):
        rows = [[row.index(1) for row in P] for P in all_permutations(n, "cpu").int().tolist()]
        assert rows == [list(order) for order in itertools.permutations(range(n))]


SMALL = dict(
    vocab_size=61, seq_len=16, n_layer=2, n_embd=24, n_head=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
    v_head_dim=8, intermediate_size=40, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    n_streams=4, init_std=0.1,
)  # fmt: skip


def make(manifold, single_pass=False, impl="eager"):
    model = GPT(GPTConfig(**SMALL, manifold=manifold, single_pass=single_pass, impl=impl))
    model.init_weights(0)
    return model


def tokens(batch=2):
    idx = torch.randint(SMALL["vocab_size"], (batch, SMALL["seq_len"] + 1), generator=torch.Generator().manual_seed(2))
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(*tokens())[1]
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("single_pass", [False, True])
@pytest.mark.parametrize("name", MANIFOLDS)
def test_a_model_trains_on_every_manifold(name, single_pass):
    """Parameters, the equations, every live map moves and no dead one does; gains, heat maps, alarms."""
    model, n, K = make(name, single_pass), 4, MANIFOLDS[name].n_logits(4)
    own = sum(p.numel() for r in model.residuals() for p in r.parameters())
    assert own == 4 * (3 + (2 * n + K) * (1 + n * 24))  # alpha, b, phi
    ref = make(name, single_pass, impl="ref")
    for a, b in zip(loss_and_gradients(model), loss_and_gradients(ref), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-3)
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-20, weight_decay=0)
    for _ in range(3):
        loss_and_gradients(model)
        optimizer.step()
    for s, r in enumerate(model.residuals()):
        path = f"layers.{s // 2}.{'mlp' if s % 2 else 'attn'}_residual."
        res = name != "identity" and s > 0 and (s < 3 or single_pass)  # a sum comes after the last, or its H_pre
        assert r.live == (s > 0 or single_pass, True, res or name == "sinkhorn" and s == 3)
        live = (*r.live[:2], res)  # what its truncation leaves for Sinkhorn's last one to learn is nothing here
        for p, sizes in ((r.alpha, (1, 1, 1)), (r.b, r.sizes), (r.phi, r.sizes)):
            by = (p.detach() - start[path + next(k for k, v in r.named_parameters() if v is p)]).abs().split(sizes, -1)
            assert all((d > 0).all() if acts else (d == 0).all() for d, acts in zip(by, live, strict=True)), (s, by)
    seen = model.look(tokens()[0], lambda residual, x: (residual.maps(x)[2], stream_spread(x)))
    H_res, spreads = [H for H, _ in seen], [spread for _, spread in seen]
    found = gains(H_res)
    for of in ("single_fwd_max", "single_bwd_max", "composite_fwd_max", "composite_bwd_min"):
        np.testing.assert_allclose(found[of], 1, atol=5e-3 if name == "sinkhorn" else 1e-5)
    assert all(v.shape[-2:] == (n, n) for v in heat_maps(H_res).values())
    assert alarms(MHC, res_gradients(model.residuals()), spreads, H_res) == []


@pytest.mark.parametrize("name", [name for name in MANIFOLDS if name != "sinkhorn"])
def test_the_kernels_take_every_manifold(name):
    """Triton's interpreter; single-pass or not in turns."""
    pytest.importorskip("triton")
    single_pass = list(MANIFOLDS).index(name) % 2 == 0
    found = loss_and_gradients(make(name, single_pass, impl="triton"))
    for a, b in zip(found, loss_and_gradients(make(name, single_pass, impl="ref")), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("single_pass", [False, True])
@pytest.mark.parametrize("name", MANIFOLDS)
def test_recomputation_changes_no_bit_on_any_manifold(name, single_pass):
    model = make(name, single_pass)
    wanted = loss_and_gradients(model)
    for mode, block in (("mhc", 1), ("mhc", 3), ("full", 2)):
        recompute.apply(model, mode, block)
        assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(model), wanted, strict=True)), (mode, block)


@pytest.mark.parametrize("single_pass", [False, True])
@pytest.mark.parametrize("name", MANIFOLDS)
def test_checkpoints_sampling_and_the_dry_run_know_every_manifold(name, single_pass, tmp_path, capsys):
    model = make(name, single_pass)
    checkpoint.save(str(tmp_path), 1, model, None, {}, vars(model.config))
    back, _ = checkpoint.load_model(str(tmp_path))
    assert (back.config.manifold, back.config.single_pass) == (name, single_pass)
    prompt = tokens()[0][0, :5].tolist()
    new = generate(back, [prompt], 6, temperature=0)[0]
    for k in range(6):  # by the cache as by the whole model, from the weights as they were
        assert model.eval()(torch.tensor([prompt + new[:k]]))[0][0, -1].argmax() == new[k]
    s = LAYOUT | dict(parallel="none", plan_devices=1, recompute="mhc", batch_size=8, micro_batch_size=8, seq_len=16)
    plan.report(model.config, s)
    out = capsys.readouterr().out
    assert f"params_total={sum(p.numel() for p in model.parameters())}\n" in out and f"manifold={name!r}" in out


def sharded_equals_whole():
    rank = torch.distributed.get_rank()
    for k, name in enumerate(MANIFOLDS):
        whole = make(name, single_pass=k % 2 == 0)
        wanted = loss_and_gradients(whole)
        with torch.device("meta"):
            model = GPT(whole.config)
        recompute.apply(model, "mhc", 3)
        ranks = Ranks("fsdp", rank, 2, torch.device("cpu"), 0, 60)
        ranks.shard(model)
        ranks.initialise(model, 0)
        found = loss_and_gradients(model)  # the same tokens on both ranks
        for a, b in zip(found, wanted, strict=True):
            a = a.full_tensor() if hasattr(a, "full_tensor") else a
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_fsdp_trains_every_manifold_as_one_process_does():
    run_ranks(2, sharded_equals_whole)


def test_the_model_refuses_a_number_of_streams_that_a_manifold_cannot_take():
    with pytest.raises(ValueError, match="manifold='permutations' with n_streams=8: wanted at most 4"):
        GPTConfig(manifold="permutations", n_streams=8)
    assert GPTConfig(manifold="permutations", n_streams=8, residual="hc").n_streams == 8  # HC is on none of them
