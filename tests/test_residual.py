"""The residual connections against references written from the equations in numpy, in long double."""

import copy

import numpy as np
import pytest
import torch

from mhc_ref import mhc_coeffs_ref, mhc_post_res_ref, mhc_pre_ref, mhc_step_ref, sinkhorn_ref
from model import GPT, HC, MHC, GPTConfig, cut_converged, expand_streams

B, T, N, C = 2, 3, 4, 5  # odd and different from one another, so that no axis can stand in for another
TINY = dict(
    vocab_size=61, seq_len=16, n_layer=2, n_embd=24, n_head=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
    v_head_dim=8, intermediate_size=40, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
)  # fmt: skip


def make(**changes):
    model = GPT(GPTConfig(**TINY | changes))
    model.init_weights(seed=1)
    return model


def tokens(seed=0, batch=2):
    return torch.randint(TINY["vocab_size"], (batch, TINY["seq_len"]), generator=torch.Generator().manual_seed(seed))


def sinkhorn_by_definition(logits, iters):
    """Eq 9 as it stands, on exp(logits), in long double: columns first, rows last."""
    M = np.exp(logits.astype(np.longdouble))
    for _ in range(iters):
        M = M / M.sum(-2, keepdims=True)
        M = M / M.sum(-1, keepdims=True)
    return M


def maps_by_definition(x, phi, alpha, b, iters):
    """Eq 7-9 for one token: x (n, C)."""
    n, sigmoid = len(x), lambda z: 1 / (1 + np.exp(-z))
    v = x.reshape(-1)
    v = v / np.sqrt((v**2).mean())  # RMSNorm over all n*C
    pre = alpha[0] * (v @ phi[:, :n]) + b[:n]
    post = alpha[1] * (v @ phi[:, n : 2 * n]) + b[n : 2 * n]
    res = alpha[2] * (v @ phi[:, 2 * n :]).reshape(n, n) + b[2 * n :].reshape(n, n)
    return sigmoid(pre), 2 * sigmoid(post), sinkhorn_by_definition(res, iters)


def case(std, seed=0, n=N):
    """Asymmetric inputs whose logits have about this standard deviation."""
    g = np.random.default_rng(seed)
    x, y = g.normal(size=(B, T, n, C)), g.normal(size=(B, T, C))
    phi = g.normal(size=(n * C, n * n + 2 * n)) / np.sqrt(n * C)
    alpha = np.array([0.7, -1.3, 1.1]) * std
    b = g.normal(size=n * n + 2 * n) * std
    return x, y, phi, alpha, b


@pytest.mark.parametrize("std", [1, 3, 6, 80])
@pytest.mark.parametrize("iters", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_maps_and_update_equal_the_equations(std, iters, dtype, tolerance):
    x, y, phi, alpha, b = case(std)
    g = np.random.default_rng(1)
    H_post_before, H_res_before = g.normal(size=(B, T, N)), g.normal(size=(B, T, N, N))
    args = [torch.tensor(a, dtype=dtype) for a in (x, y, H_post_before, H_res_before, phi, alpha, b)]
    x_next, x_in, H_post, H_res = mhc_step_ref(*args, sinkhorn_iters=iters)
    for t in np.ndindex(B, T):
        want = np.stack(
            [sum(H_res_before[t][i, j] * x[t][j] for j in range(N)) + H_post_before[t][i] * y[t] for i in range(N)]
        )  # Eq 3, written out
        pre, post, res = maps_by_definition(want, phi, alpha, b, iters)
        size = tolerance * max(1, std / 10)  # fp32 logits of size 80 carry an error of 80 eps
        np.testing.assert_allclose(x_next[t], want, atol=tolerance)
        np.testing.assert_allclose(H_post[t], post.astype(float), atol=size)
        np.testing.assert_allclose(H_res[t], res.astype(float), atol=size)
        np.testing.assert_allclose(x_in[t], sum(pre[j] * want[j] for j in range(N)).astype(float), atol=10 * size)


@pytest.mark.parametrize("std", [1, 6, 20, 80])
def test_sinkhorn_gradient_in_fp32_equals_finite_differences(std):
    g = np.random.default_rng(3)
    logits, weight = (g.normal(size=(3, 3)) * std).astype(np.float32), g.normal(size=(3, 3))
    logits[1] = logits[0] + g.normal(size=3)  # two rows near to each other: the gradient is not zero at any std
    z = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    (sinkhorn_ref(z, 5) * torch.tensor(weight, dtype=torch.float32)).sum().backward()
    assert z.grad.abs().max() > 1e-2
    h = np.longdouble(1e-6)
    for i, j in np.ndindex(3, 3):
        d = np.zeros((3, 3), dtype=np.longdouble)
        d[i, j] = h
        up, down = (sinkhorn_by_definition(logits + s * d, 5) for s in (1, -1))
        assert abs(float(((up - down) * weight).sum() / (2 * h)) - z.grad[i, j].item()) < 2e-5


@pytest.mark.parametrize("std", [20, 40, 80])
def test_sinkhorn_stays_finite_where_exp_would_not(std):
    z = (torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(0)) * std).requires_grad_()
    H = sinkhorn_ref(z)
    (H * torch.randn(4, 4)).sum().backward()
    assert H.isfinite().all() and z.grad.isfinite().all()
    torch.testing.assert_close(H.sum(-1), torch.ones(50, 4))  # rows last: exact whatever the logits


def test_rows_are_exact_and_the_truncation_is_in_the_columns():
    H = sinkhorn_ref(torch.randn(100, 4, 4, generator=torch.Generator().manual_seed(0)).double() * 3, 3)
    assert (H.sum(-1) - 1).abs().max() < 1e-14 < 1e-3 < (H.sum(-2) - 1).abs().max()


def test_a_permutation_sends_stream_j_to_stream_i():
    x = torch.randn(N, C)
    H_res = torch.zeros(N, N)
    for j, i in enumerate((2, 0, 3, 1)):
        H_res[i, j] = 1  # row i, column j: not symmetric, not its own inverse
    x_next = mhc_post_res_ref(x, torch.zeros(C), torch.zeros(N), H_res)
    for j, i in enumerate((2, 0, 3, 1)):
        torch.testing.assert_close(x_next[i], x[j])


def test_pre_reads_the_streams_it_is_told_to():
    x = torch.randn(B, T, N, C)
    torch.testing.assert_close(mhc_pre_ref(x, torch.tensor([0.0, 2, 0, 1])), 2 * x[:, :, 1] + x[:, :, 3])


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_other_numbers_of_streams(n):
    x, _, phi, alpha, b = case(2, n=n)
    got = mhc_coeffs_ref(*(torch.tensor(a) for a in (x, phi, alpha, b)), sinkhorn_iters=4)
    want = maps_by_definition(x[1, 2], phi, alpha, b, 4)
    for a, w in zip(got, want, strict=True):
        np.testing.assert_allclose(a[1, 2], w.astype(float), atol=1e-12)
    if n == 1:
        assert (got[2] == 1).all()


def test_hc_maps_equal_equation_5():
    g = np.random.default_rng(5)
    hc = HC(GPTConfig(**TINY | {"n_embd": C, "residual": "hc"}), s=1)
    theta, alpha, b = g.normal(size=(C, N + 2)), np.array([0.5, -2.0, 1.5]), g.normal(size=N * N + 2 * N)
    with torch.no_grad():
        for p, v in ((hc.theta, theta), (hc.alpha, alpha), (hc.b, b)):
            p.copy_(torch.tensor(v))
    x = g.normal(size=(B, T, N, C))
    H_pre, H_post, H_res = (H.detach() for H in hc.maps(torch.tensor(x, dtype=torch.float32)))
    for t in np.ndindex(B, T):
        x_norm = x[t] / np.sqrt((x[t] ** 2).mean(-1, keepdims=True))  # each stream by itself
        pre = alpha[0] * np.tanh(theta[:, 0] @ x_norm.T) + b[:N]
        post = alpha[1] * np.tanh(theta[:, 1] @ x_norm.T) + b[N : 2 * N]
        res = alpha[2] * np.tanh(theta[:, 2:].T @ x_norm.T) + b[2 * N :].reshape(N, N)
        for got, want in ((H_pre, pre), (H_post, post), (H_res, res)):
            np.testing.assert_allclose(got[t], want, atol=1e-5)


@pytest.mark.parametrize("residual, single_pass", [("hc", False), ("mhc", False), ("mhc", True)])
def test_with_neutral_maps_the_model_is_the_baseline(residual, single_pass):
    model, baseline = make(residual=residual, single_pass=single_pass), make(residual="baseline")
    with torch.no_grad():
        for r in model.residuals():
            r.alpha.zero_()
            eye = torch.eye(N).flatten()
            quarter, ones = torch.full((N,), 0.25), torch.ones(N)
            neutral = (quarter.logit(), 0 * ones, 200 * eye) if residual == "mhc" else (quarter, ones, eye)
            r.b.copy_(torch.cat(neutral))
    torch.testing.assert_close(model(tokens())[0], baseline(tokens())[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("residual", ["hc", "mhc"])
def test_changing_H_res_changes_the_output(residual):
    model = make(residual=residual)
    before = model(tokens())[0]
    with torch.no_grad():  # of the second sublayer, whose streams differ
        model.layers[0].mlp_residual.b[2 * N :].copy_(torch.randn(N * N, generator=torch.Generator().manual_seed(0)))
    assert (model(tokens())[0] - before).abs().max() > 1e-4


def test_streams_are_expanded_once_and_collapsed_once(monkeypatch):
    import model as module

    calls = []
    for name in ("expand_streams", "collapse_streams"):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=whole, name=name: (calls.append(name), f(*a))[1])
    make()(tokens())
    assert calls == ["expand_streams", "collapse_streams"]
    assert expand_streams(torch.zeros(B, T, C), N).shape == (B, T, N, C)


def train_a_little(model, steps=20, seed=0):
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) == matrix], "weight_decay": 0.1 * matrix}
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-20)
    for step in range(steps):
        idx = tokens(seed + step, batch=4)
        optimizer.zero_grad()
        model(idx, idx.roll(-1, 1))[1].backward()
        optimizer.step()


@pytest.mark.parametrize(
    "residual,end,dead_ones",
    [("hc", "sum", [0]), ("mhc", "sum", [0, 2, 17]), ("mhc", "head", [0, 2]), ("mhc", "H_pre", [2])],
)
def test_every_live_map_moves_every_dead_one_stays_and_streams_differ(residual, end, dead_ones):
    ends = dict(single_pass=True) if end == "H_pre" else dict(collapse=end)
    model = make(residual=residual, **ends, n_layer=3)
    before = [m for r in model.residual_maps(tokens()) for m in r]
    b_before = [r.b.detach().clone() for r in model.residuals()]
    train_a_little(model)
    after = [m for r in model.residual_maps(tokens()) for m in r]
    # under 'sum' mHC's last H_res has nothing to learn while Sinkhorn converges
    lives = [(*r.live[:2], r.live[2] and not getattr(r, "is_summed", False)) for r in model.residuals()]
    live = [alive for r in lives for alive in r]
    for i, (m0, m1, alive) in enumerate(zip(before, after, live, strict=True)):
        if alive:  # H_pre starts where the sigmoid is flat
            assert (m1 - m0).abs().max() > 2e-4, f"map {i % 3} of sublayer {i // 3 + 1} has not moved"
    for r, r_live, b0 in zip(model.residuals(), lives, b_before, strict=True):
        for part, part0, alive in zip(r.b.split(r.sizes), b0.split(r.sizes), r_live, strict=True):
            assert (part - part0).abs().max() > 1e-3 if alive else torch.equal(part, part0)
    dead = [i for i, alive in enumerate(live) if not alive]
    assert dead == dead_ones
    spread = model.look(tokens(), lambda r, x: (x - x.mean(-2, keepdim=True)).norm() / x.norm())
    assert min(spread[1:]) > 1e-2


@pytest.mark.parametrize("maps_init,diagonal,spread", [("home", 0.711, 1e-2), ("paper", 0.993, 1e-5)])
def test_both_starts_have_the_H_res_they_say_part_the_streams_and_leave_each_live_map_a_gradient(
    maps_init, diagonal, spread
):
    """In fp64: a gradient of 1e-11 is one, where the rounding noise is 1e-19."""
    model = make(maps_init=maps_init, n_layer=4).double()
    with torch.no_grad():
        for _, H_post, H_res in model.residual_maps(tokens()):
            assert (H_res.diagonal(dim1=-2, dim2=-1) - diagonal).abs().max() < 2e-3
            assert maps_init == "home" or (H_post - 1).abs().max() < 2e-2
    spreads = model.look(tokens(), lambda r, x: ((x - x.mean(-2, keepdim=True)).norm() / x.norm()).item())
    assert spreads[0] < 1e-15 and min(spreads[1:]) > spread
    model(tokens(), tokens(1))[1].backward()
    for r in model.residuals():
        for p, sizes in ((r.phi, r.sizes), (r.alpha, (1, 1, 1)), (r.b, r.sizes)):
            grads = list(zip(p.grad.split(sizes, -1), r.live, strict=True))
            for grad, live in grads[:2] if r.is_summed else grads:  # the last H_res: tested below
                assert grad.norm() > 1e-11 if live else grad.norm() == 0


@pytest.mark.parametrize(
    "residual,learned",
    [
        ("hc", "res"),
        ("hc", "pre,res"),
        ("mhc", "post"),
        ("mhc", "pre,post"),
        ("mhc", "post,res"),
        ("mhc", "post,pre,res"),
    ],
)
def test_maps_that_are_not_learned_are_and_stay_one_nth_ones_and_the_identity(residual, learned):
    model, kept = make(residual=residual, learned_maps=learned, n_layer=3), learned.split(",")
    for _ in range(2):
        for r, (H_pre, H_post, H_res) in zip(model.residuals(), model.residual_maps(tokens()), strict=True):
            neutral = {
                "pre": (H_pre, torch.full((N,), 1 / N)),
                "post": (H_post, torch.ones(N)),
                "res": (H_res, torch.eye(N)),
            }
            for name, (H, fixed) in neutral.items():
                same = torch.allclose(H, fixed.expand_as(H), rtol=0, atol=1e-6)
                assert same or name in kept, (r.s, name)
        train_a_little(model, steps=4)
    moved = [m for r in model.residuals()[1:-1] for m in r.b.grad.split(r.sizes)]
    assert [bool(g.any()) for g in moved] == [name in kept for name in ("pre", "post", "res")] * 4


def test_with_H_res_alone_learned_HCs_streams_stay_copies_and_mHC_is_refused():
    """Table 1's first row: H_pre = 1/n and H_post = 1 treat all streams alike; what is learned is their common size."""
    model = make(residual="hc", learned_maps="res").double()
    train_a_little(model, steps=4)
    assert max(model.look(tokens(), lambda r, x: (x - x.mean(-2, keepdim=True)).norm() / x.norm())) < 1e-6
    assert (model.residual_maps(tokens())[1][2].sum(-1) - 1).abs().max() > 1e-3
    for learned, words in (
        ("res", "no map would act"),
        ("pre,res", "no map would act"),
        ("pre,rest", "wanted some of"),
    ):
        with pytest.raises(ValueError, match=words):
            GPTConfig(**TINY | {"learned_maps": learned})


def uncut(model):
    """Every map in the graph, whether it acts or not: the whole gradient, and in fp64 the true one."""
    for r in model.residuals():
        r.live, r.is_summed = (True, True, True), False
    return model


def b_gradients(model):
    """Of pre, post and res for each sublayer, in fp64."""
    model(tokens(batch=4), tokens(1, batch=4))[1].backward()
    return [[g.double() for g in r.b.grad.split(r.sizes)] for r in model.residuals()]


@pytest.mark.parametrize(
    "residual,n,single_pass",
    [("hc", 4, False), ("mhc", 4, False), ("hc", 1, False), ("mhc", 1, False), ("mhc", 4, True), ("mhc", 1, True)],
)
def test_dead_maps_have_no_effect_and_that_is_why_they_are_cut(residual, n, single_pass):
    """The gradient that `live` throws away is rounding noise: in fp64 it is 1e-9 of a live map's, or less."""
    collapse = "head" if n > 1 and not single_pass else "sum"
    model = make(residual=residual, n_streams=n, collapse=collapse, single_pass=single_pass).double()
    lives = [r.live for r in model.residuals()]
    uncut(model)
    train_a_little(model, steps=2)  # HC's streams are equal at the start
    model.zero_grad()
    model(tokens(), tokens(1))[1].backward()
    grads = [
        (p.norm().item(), alive)
        for r, live in zip(model.residuals(), lives, strict=True)
        for p, alive in zip(r.b.grad.split(r.sizes), live, strict=True)
    ]
    dead, alive = ([g for g, a in grads if a == wanted] for wanted in (False, True))
    assert dead and max(dead) < 1e-9 * min(alive)


@pytest.mark.parametrize("residual,n", [("hc", 4), ("mhc", 4), ("mhc", 1)])
def test_the_first_H_pre_learns_where_norm_eps_lets_it_act(residual, n):
    """The pre-norm removes a scale but for norm_eps. The gradient that is left is true at 1e-6, and at 1e-10 noise."""
    for norm_eps, alive in ((1e-5, True), (1e-6, True), (1e-10, False), (1e-20, False)):
        model = make(residual=residual, n_streams=n, norm_eps=norm_eps)
        (got, *_), *_ = b_gradients(model)
        (want, *_), *_ = b_gradients(uncut(copy.deepcopy(model).double()))
        (noisy, *_), *_ = b_gradients(uncut(copy.deepcopy(model)))
        assert model.residuals()[0].live[0] == alive
        if alive:
            assert (got - want).norm() < 0.03 * want.norm()
        else:
            assert (got == 0).all() and (noisy - want).norm() > want.norm()


@pytest.mark.parametrize("iters,std", [(20, 0), (20, 8), (5, 2)])
def test_the_last_H_res_learns_where_sinkhorn_has_not_converged(iters, std):
    """Under 'sum' it acts through its column sums. std: of the logits; 0 stands for the first values."""
    model = make(sinkhorn_iters=iters, n_layer=3)
    last = model.residuals()[-1]
    if std:
        with torch.no_grad():
            last.b[2 * N :] = std * torch.randn(N * N, generator=torch.Generator().manual_seed(5))
    got = b_gradients(model)[-1][2]
    want, noisy = (b_gradients(uncut(m))[-1][2] for m in (copy.deepcopy(model).double(), copy.deepcopy(model)))
    if std:
        assert (got - want).norm() < 0.05 * want.norm()
    else:
        assert (got == 0).all() and (noisy - want).norm() > 2 * want.norm()


def test_one_token_is_cut_and_the_next_is_not():
    logits = torch.stack((torch.eye(N), 8 * torch.randn(N, N, generator=torch.Generator().manual_seed(5))))
    H_res = sinkhorn_ref(logits).requires_grad_()
    cut = cut_converged(H_res)
    assert torch.equal(cut, H_res)
    (cut * torch.arange(1.0, N + 1)).sum().backward()
    assert (H_res.grad[0] == 0).all() and (H_res.grad[1] == torch.arange(1.0, N + 1)).all()


def test_mappings_are_fp32_and_streams_bf16_under_bf16_autocast():
    model = make(residual="mhc")
    dtypes = set()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.look(tokens(), lambda r, x: dtypes.update([x.dtype, *(m.dtype for m in r.maps(x))]))
        seen = model.look(tokens(), lambda r, x: (x, r.maps(x)))
    assert dtypes == {torch.bfloat16, torch.float32}
    for r, (x, maps) in zip(model.residuals(), seen, strict=True):  # not computed in bf16 and then widened
        want = mhc_coeffs_ref(x.double(), r.phi.double(), r.alpha.double(), r.b.double())
        for m, w in zip(maps, want, strict=True):
            torch.testing.assert_close(m.double(), w, atol=1e-5, rtol=1e-5)


def test_residual_maps_are_the_maps_the_forward_applies():
    model = make(residual="mhc")
    applied = []
    step = MHC.forward

    def spy(self, *args):
        out = step(self, *args)
        applied.append(out[2])  # the carry
        return out

    MHC.forward = spy
    try:
        maps = model.residual_maps(tokens())
    finally:
        MHC.forward = step
    assert len(maps) == len(applied) == 2 * TINY["n_layer"]
    for (H_pre, H_post, H_res), (post, res) in zip(maps, applied, strict=True):
        assert H_pre.shape == (2, TINY["seq_len"], N) and H_res.shape == (2, TINY["seq_len"], N, N)
        torch.testing.assert_close(H_post, post)
        torch.testing.assert_close(H_res, res)
