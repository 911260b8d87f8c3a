"""Single-pass mHC: three sites deep, against a float64 reference written from the equations: values and gradients.

A site maps the streams that it makes, and reads them through the H_pre of the site before. So every H_pre gets its
gradient from the next site, and the last one's from what reads the streams at the end. And the setting of the model.
"""

import contextlib
import statistics

import pytest
import torch
import torch.distributed as dist

import checkpoint
import mhc
import plan
import recompute
from gains import alarms, gains, res_gradients, stream_spread
from mhc_ref import mhc_coeffs_ref, mhc_post_res_ref, mhc_pre_ref
from model import GPT, MHC, GPTConfig, expand_streams
from parallel import Ranks
from tests.kernel_cases import interpreter, needs_triton
from tests.ranks import run_ranks
from tests.test_plan import settings as plan_settings
from tests.test_residual import TINY, tokens

SITES, T, N, C = 3, 5, 4, 12
FP32, FP64 = torch.float32, torch.float64
IMPLS = ["ref", "eager", pytest.param("triton", marks=needs_triton)]


def make(std, n=N, seed=0):
    """x, then phi, alpha, b and the sublayer's weight of each site, in float64. Nothing is symmetric."""
    gen = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=gen, dtype=FP64)  # noqa: E731
    tensors = [randn(T, n, C)]
    for _ in range(SITES):
        phi, alpha = randn(n * C, n * n + 2 * n) / (n * C) ** 0.5, std * torch.tensor([0.7, -0.8, 0.9], dtype=FP64)
        tensors += [phi, alpha, 0.5 * std * randn(n * n + 2 * n), randn(C, C) / C**0.5]
    return [t.float().double() for t in tensors]  # exact in both dtypes


def by_the_equations(x, *weights):
    """One token after the other, one stream after the other; exp and divisions as they stand."""
    n = x.shape[1]
    outs = []
    for token in x:
        streams, H_pre = list(token), [1.0] + [0.0] * (n - 1)  # the first site reads stream 0
        y = H_post = H_res = None
        for site in range(SITES):
            phi, alpha, b, W = weights[4 * site : 4 * site + 4]
            if y is not None:  # Eq 3
                streams = [sum(H_res[i, j] * streams[j] for j in range(n)) + H_post[i] * y for i in range(n)]
            x_in = sum(H_pre[i] * streams[i] for i in range(n))
            v = torch.cat(streams)
            v = v / ((v * v).sum() / len(v)).sqrt()
            H_pre = 1 / (1 + torch.exp(-(alpha[0] * (v @ phi[:, :n]) + b[:n])))
            H_post = 2 / (1 + torch.exp(-(alpha[1] * (v @ phi[:, n : 2 * n]) + b[n : 2 * n])))
            res = (alpha[2] * (v @ phi[:, 2 * n :]) + b[2 * n :]).reshape(n, n)
            H_res = torch.exp(res - res.max())
            for _ in range(20):
                H_res = H_res / H_res.sum(0)
                H_res = H_res / H_res.sum(1, keepdim=True)
            y = torch.tanh(x_in @ W)
        streams = [sum(H_res[i, j] * streams[j] for j in range(n)) + H_post[i] * y for i in range(n)]
        outs.append(sum(H_pre[i] * streams[i] for i in range(n)))  # what the final norm reads
    return torch.stack(outs)


def chain(x, *weights, impl="ref"):
    """The same by mhc_step; the end by mhc_post_res and mhc_pre."""
    y = H_post = H_res = None
    H_pre = torch.zeros(x.shape[:-1], dtype=x.dtype)
    H_pre[:, 0] = 1
    for site in range(SITES):
        *params, W = weights[4 * site : 4 * site + 4]
        x, x_in, H_pre, H_post, H_res = mhc.mhc_step(x, y, H_post, H_res, *params, impl=impl, H_pre=H_pre)
        y = torch.tanh(x_in @ W)
    return mhc.mhc_pre(mhc.mhc_post_res(x, y, H_post, H_res, impl=impl), H_pre)


def evaluate(f, tensors, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    out = f(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=FP64).float()
    return [out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)]


def worst(got, want):
    return ((got.double() - want).abs().max() / want.abs().max()).item()


NAMES = ["out", "d_x", *(f"d_{name} of site {s}" for s in range(SITES) for name in ("phi", "alpha", "b", "W"))]


@pytest.mark.parametrize("std, n", [(1, 4), (3, 4), (6, 2), (1, 1)])
def test_the_twin_is_the_equations(std, n):
    tensors = make(std, n)
    want = evaluate(by_the_equations, tensors, FP64)
    for name, g, w in zip(NAMES, evaluate(chain, tensors, FP64), want, strict=True):
        assert worst(g, w) < 1e-9, name
    for site in range(SITES):
        d_phi_pre = want[2 + 4 * site][:, :n]
        assert d_phi_pre.abs().max() > 1e-3, "H_pre has a gradient at every site, through what the next one reads"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("std, seeds", [(1, 1), (80, 15)])
def test_every_impl_in_fp32_is_as_good_as_the_twin(impl, std, seeds):
    """The median over seeds: at std 80 each site multiplies what rounding the one before has left, and one seed is a
    throw of dice."""
    errors = []  # of every seed: pairs (this one's, the twin's)
    for seed in range(seeds):
        tensors = make(std, seed=seed)
        want = evaluate(by_the_equations if std == 1 else chain, tensors, FP64)
        with interpreter("cpu") if impl == "triton" else contextlib.nullcontext():
            got, twin = (evaluate(lambda *t, i=i: chain(*t, impl=i), tensors, FP32) for i in (impl, "ref"))
        assert all(g.isfinite().all() for g in got)
        errors.append([(worst(g, w), worst(t, w)) for g, t, w in zip(got, twin, want, strict=True)])
    for name, pairs in zip(NAMES, zip(*errors, strict=True), strict=True):
        ours, twins = map(statistics.median, zip(*pairs, strict=True))
        assert twins < (1e-5 if std == 1 else 1e-3), name
        assert ours <= 2 * twins + 1e-6, f"{name}: {ours:.2e}, the twin {twins:.2e}"


# ----------------------------------------------------------------------------------------------------------------------
# single_pass as a setting of the model. Beside these: test_residual (which maps are live), test_recompute,
# test_generate, test_plan.


def make_model(**changes):
    gpt = GPT(GPTConfig(**TINY | {"single_pass": True} | changes))
    gpt.init_weights(1)
    return gpt


def by_hand(gpt, idx):
    """The hidden states by the twin's functions, sublayer after sublayer: H_pre of one site reads at the next."""
    x = expand_streams(gpt.embed_tokens(idx), N)
    H_pre = torch.zeros(x.shape[:-1], dtype=x.dtype)
    H_pre[..., 0] = 1
    positions = torch.arange(idx.shape[1]).unsqueeze(0)
    for s, (residual, norm, f) in enumerate(gpt.sublayers(positions)):
        if s:
            x = mhc_post_res_ref(x, y, H_post, H_res)  # noqa: F821
        y = f(norm(mhc_pre_ref(x, H_pre)))
        H_pre, H_post, H_res = mhc_coeffs_ref(x, residual.phi, residual.alpha, residual.b)
    return gpt.norm(mhc_pre_ref(mhc_post_res_ref(x, y, H_post, H_res), H_pre))


@pytest.mark.parametrize("impl", ["ref", "eager"])
def test_the_model_is_the_chain_of_its_sites(impl):
    gpt, idx = make_model(impl=impl, alpha_init=0.5, init_std=0.1).double(), tokens()
    got = []
    for f in (gpt.hidden, lambda idx: by_hand(gpt, idx)):
        gpt.zero_grad()
        h = f(idx)
        (h * torch.randn(h.shape, generator=torch.Generator().manual_seed(0), dtype=FP64)).sum().backward()
        got.append([h, *(p.grad for p in gpt.parameters() if p.grad is not None)])
    for a, b in zip(*got, strict=True):
        live = b.norm() > 1e-12  # by hand the first H_res gets a gradient of rounding noise
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10) or not live
    other = make_model(impl=impl, alpha_init=0.5, init_std=0.1, single_pass=False).double()
    assert (other.hidden(idx) - got[0][0]).abs().max() > 0.01


def test_a_sublayer_reads_its_home_stream_at_first():
    """H_pre .98 at the home of the sublayer that reads through it: the next one, and n wide after the last."""
    gpt = make_model()
    for s, (H_pre, H_post, _) in enumerate(gpt.residual_maps(tokens())):
        assert (H_pre.argmax(-1) == (s + 1) % N).all() and (H_post.argmax(-1) == s % N).all()


def test_the_last_H_res_acts_unless_the_last_H_pre_reads_all_streams_alike():
    """And then through its column sums alone: as under collapse='sum'."""
    for learned, summed in (("pre,post,res", False), ("post,res", True)):
        *others, last = make_model(learned_maps=learned).residuals()
        assert last.is_summed == summed and not any(r.is_summed for r in others)
    gpt = make_model(learned_maps="post,res")
    gpt(tokens(), tokens(1))[1].backward()
    assert gpt.residuals()[1].b.grad[2 * N :].any() and not gpt.residuals()[-1].b.grad[2 * N :].any()


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(residual="hc"), "single_pass=True: wanted residual='mhc', which alone has it; got 'hc'"),
        (dict(residual="baseline"), "single_pass=True: wanted residual='mhc'"),
        (dict(collapse="head"), "collapse='head' with single_pass=True: wanted collapse='sum'"),
    ],
)
def test_what_it_does_not_go_with_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**TINY | {"single_pass": True} | changes)


def check_fsdp_and_a_pipeline():
    """Two ranks, sharded, and two stages with two segments each: the loss and the gradients of one process."""
    idx, targets = tokens(batch=8), tokens(1, batch=8)
    one = make_model(n_layer=4)
    want = one(idx, targets)[1]
    want.backward()
    gradients = {name: p.grad for name, p in one.named_parameters()}
    for schedule in (None, "zbv"):
        stages = 2 if schedule else 1
        ranks = Ranks("fsdp", dist.get_rank(), dist.get_world_size(), torch.device("cpu"), 0, 60, 1, stages)
        with torch.device("meta"):
            gpt = GPT(one.config)
        recompute.apply(gpt, "mhc", 2)
        if schedule:
            ranks.build_pipeline(gpt, schedule, contextlib.nullcontext)
        ranks.shard(gpt)
        ranks.initialise(gpt, seed=1)
        if schedule:
            loss = ranks.pipeline.step(idx, targets, 8)
        else:
            loss = gpt(idx, targets)[1]
            loss.backward()
        assert loss.item() == pytest.approx(want.item(), abs=1e-5)
        for name, p in gpt.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), gradients[name], msg=lambda m, n=name: f"{n}: {m}")


def test_fsdp_and_a_pipeline_train_it_as_one_process_does():
    run_ranks(2, check_fsdp_and_a_pipeline)


def test_checkpoints_the_dry_run_and_the_gains_know_it(tmp_path, capsys):
    gpt = make_model()
    checkpoint.save(str(tmp_path), 1, gpt, None, {}, vars(gpt.config))
    back, _ = checkpoint.load_model(str(tmp_path))
    assert back.config.single_pass and torch.equal(back(tokens())[0], gpt(tokens())[0])
    plan.report(gpt.config, plan_settings())
    assert "single-pass" in capsys.readouterr().out
    gpt(tokens(), tokens(1))[1].backward()
    seen = gpt.look(tokens(), lambda residual, x: (residual.maps(x)[2], stream_spread(x)))
    H_res, spreads = zip(*seen, strict=True)
    assert gains(H_res)["composite_fwd_max"][-1] == pytest.approx(1, abs=1e-5)
    norms = res_gradients(gpt.residuals())
    assert [v is None for v in norms] == [True, False, False, False]
    assert alarms(MHC, norms, spreads, H_res) == []


@pytest.mark.parametrize("z", [-80.0, -20.0, -1.0, 0.0, 5.0, 20.0, 80.0])
def test_a_saturated_gate_keeps_its_gradient(z):
    """In fp32 1 - sigmoid(20) is 0; sigmoid(-20), 2e-9, is not."""
    from mhc_ref import sigmoid_ref

    small = torch.tensor(z, requires_grad=True)
    sigmoid_ref(small).backward()
    exact = torch.tensor(z, dtype=FP64)
    assert small.grad.item() == pytest.approx((exact.sigmoid() * (-exact).sigmoid()).item(), rel=1e-5)
    assert sigmoid_ref(small).item() == pytest.approx(exact.sigmoid().item(), rel=1e-5)
