"""FP8 emulated on a CPU, against products of rounded operands; which products have it and which not; refusals."""

import pytest
import torch

import fp8
import recompute
from layers import Experts
from model import GPT, GPTConfig
from tests.test_residual import TINY, make, tokens

pytest.importorskip("torchao")


def nearest(t, dim=None):
    """The value of FP8 nearest to each of t, scaled so that the largest along dim (of all) fits: by definition."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    values = values[values.isfinite()].unique()
    most = t.double().abs().amax() if dim is None else t.double().abs().amax(dim, keepdim=True)
    scale = 448 / most if dim is None else 2 ** (448 / most).log2().floor()
    return values[(t.double().unsqueeze(-1) * scale.unsqueeze(-1) - values).abs().argmin(-1)] / scale


def test_a_grouped_product_multiplies_rounded_operands():
    """Forward and both gradients, scales along what is summed; an expert without rows, rows behind the last."""
    x, w, g = torch.randn(37, 24), 0.3 * torch.randn(4, 10, 24), torch.randn(37, 10)
    w[0] *= 100
    w[2][1:] *= 1e6  # beside which row 0 would vanish, if it had no scale of its own
    x.requires_grad_(), w.requires_grad_()
    ends = torch.tensor([9, 9, 30, 35], dtype=torch.int32)
    y = fp8.Emulated.apply(x, w.transpose(1, 2), ends)
    y.backward(g)
    d_x, d_w = torch.zeros(37, 24).double(), torch.zeros(4, 10, 24).double()
    for e, (a, b) in enumerate(((0, 9), (9, 9), (9, 30), (30, 35))):
        if a == b:
            continue
        torch.testing.assert_close(y[a:b].double(), nearest(x[a:b], 1) @ nearest(w[e], 1).T, rtol=1e-5, atol=1e-5)
        d_x[a:b] = nearest(g[a:b], 1) @ nearest(w[e], 0)
        d_w[e] = nearest(g[a:b], 0).T @ nearest(x[a:b], 0)
    torch.testing.assert_close(x.grad.double(), d_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), d_w, rtol=1e-5, atol=1e-5)
    assert y[35:].abs().max() == 0


def test_padding_the_rows_of_experts_changes_nothing():
    experts = Experts(GPTConfig(**TINY))
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, ends = torch.randn(37, TINY["n_embd"]), torch.tensor([9, 9, 30, 37], dtype=torch.int32)
    seen = []

    def grouped(x, w_t, ends):
        seen.append((len(x), ends.tolist()))
        return fp8.by_group(x, w_t, ends)

    torch.testing.assert_close(fp8.run_experts(experts, grouped, x, ends), experts(x, ends))
    assert seen == [(112, [16, 16, 48, 64])] * 3  # 37 + 4 * 15 rows at most, in whole sixteens


def step(model, autocast=True):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(tokens(), tokens(1))[1]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def test_what_is_in_fp8_and_what_is_not(monkeypatch):
    """By rounding so coarsely that it shows: each matrix of F makes a difference, and is multiplied once a forward."""
    wide, narrow = make(), make()
    fp8.apply(narrow, "cpu")
    kinds = {name: type(m).__name__ for name, m in narrow.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {name for name, kind in kinds.items() if kind != "Float8Linear"} == {"lm_head"}
    assert len(kinds) == 1 + 2 * 4 + 3 + 3  # the head; both MLAs, the dense FFN, the shared experts
    assert {n: p.shape for n, p in narrow.named_parameters()} == {n: p.shape for n, p in wide.named_parameters()}
    assert all(p.dtype == torch.float32 for p in narrow.parameters())
    calls, inner = [], fp8.by_group
    monkeypatch.setattr(fp8, "by_group", lambda x, w_t, ends: calls.append(w_t.shape) or inner(x, w_t, ends))
    (loss, grads), (wanted, wanted_grads) = step(narrow), step(wide)
    assert len(calls) == 6  # gate, up, down, and their inputs' gradients
    assert 0 < abs(loss / wanted - 1) < 0.01
    for name, g in grads.items():
        error = ((g - wanted_grads[name]).norm() / wanted_grads[name].norm().clamp(min=1e-12)).item()
        assert g.dtype == torch.float32 and error < 0.35, (name, error)


def test_weights_written_with_fp8_are_read_without():
    narrow, wide = make(), GPT(GPTConfig(**TINY))
    fp8.apply(narrow, "cpu")
    wide.load_state_dict(narrow.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(narrow.parameters(), wide.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["mhc", "full"])
def test_recomputation_gives_the_same_bits(mode):
    model = make()
    fp8.apply(model, "cpu")
    wanted = step(model)
    recompute.apply(model, mode)
    got = step(model)
    assert got[0] == wanted[0] and all(torch.equal(g, wanted[1][name]) for name, g in got[1].items())


@pytest.mark.parametrize(
    "device, dtype, has_moe, words",
    [
        ("cpu", "float32", False, "wanted dtype='bfloat16'"),
        ("mps", "bfloat16", False, "wanted an NVIDIA GPU, or a CPU"),
        ("cuda", "bfloat16", False, "capability 8.9 or more, this one has 8.0"),
        ("cuda", "bfloat16", True, "capability 9.0 or more for experts, this one has 8.0"),
    ],
)
def test_where_it_cannot_be_it_is_refused(device, dtype, has_moe, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match=f"^fp8=True: .*{words}"):
        fp8.check(device, dtype, has_moe)


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(fp8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torchao"):
        fp8.check("cpu", "bfloat16", False)


def test_a_matrix_that_the_hardware_does_not_take_is_named():
    with pytest.raises(ValueError, match="layers.0: kv_a_proj_with_mqa.weight is 20 x 32, wanted multiples of 16"):
        fp8.apply(make(qk_nope_head_dim=12, v_head_dim=16, n_embd=32, kv_lora_rank=16), "cuda")
