"""Gains against numbers worked out by hand on matrices that are not symmetric, and alarms that must go off."""

import pytest
import torch

from gains import alarms, gains, heat_maps, res_gradients, stream_spread
from model import HC, MHC

A = torch.tensor([[1.0, 2.0], [0.0, -4.0]])  # row sums 3, -4; column sums 1, -2
Z = torch.tensor([[0.5, 0.0], [1.0, 1.0]])  # row sums .5, 2; column sums 1.5, 1
# Z A (sublayer 1 is A, 2 is Z) = [[.5, 1], [1, -2]]: row sums 1.5, -1; column sums 1.5, -1


def test_gains_of_two_sublayers_by_hand():
    assert gains([A, Z]) == {
        "single_fwd_max": [4, 2], "single_fwd_min": [3, 0.5],
        "single_bwd_max": [2, 1.5], "single_bwd_min": [1, 1],
        "composite_fwd_max": [4, 1.5], "composite_fwd_min": [3, 1],
        "composite_bwd_max": [1.5, 1.5], "composite_bwd_min": [1, 1],
    }  # fmt: skip


def test_gains_average_over_tokens_after_the_maximum():
    per_token = torch.stack((A, torch.diag(torch.tensor([10.0, 0.0]))))  # maxima 4 and 10, of different rows
    assert gains([per_token])["single_fwd_max"] == [7.0]
    assert gains([per_token])["single_bwd_max"] == [6.0]


def test_composites_start_at_the_first_sublayer_forward_and_end_at_the_last_backward():
    maps = [torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(i)).double() for i in range(5)]
    got = gains(maps)
    for end in range(5):
        P, Q = torch.eye(4).double(), torch.eye(4).double()
        for H in maps[: end + 1]:
            P = H @ P
        for H in maps[end:]:
            Q = H @ Q
        assert got["composite_fwd_max"][end] == pytest.approx(P.sum(-1).abs().amax(-1).mean().item())
        assert got["composite_bwd_max"][end] == pytest.approx(Q.sum(-2).abs().amax(-1).mean().item())


def test_heat_maps_are_of_the_first_middle_and_last_and_of_both_halves():
    maps = heat_maps([A, Z, A, Z])
    assert list(maps) == ["sublayer 1", "sublayer 2", "sublayer 4", "sublayers 1-2", "sublayers 3-4", "sublayers 1-4"]
    torch.testing.assert_close(torch.tensor(maps["sublayers 1-2"]), (Z @ A).double())
    torch.testing.assert_close(torch.tensor(maps["sublayers 1-4"]), (Z @ A @ Z @ A).double())


def test_stream_spread():
    x = torch.randn(2, 3, 1, 5).expand(2, 3, 4, 5)
    assert stream_spread(x) < 1e-7
    assert stream_spread(torch.tensor([[[[1.0], [-1.0]]]])) == pytest.approx(1)


HEALTHY = [torch.full((2, 2), 0.5)] * 3


def test_a_healthy_model_raises_no_alarm_nor_do_maps_dead_by_construction():
    assert alarms(MHC, [None, 1.0, 2.0], [0.0, 0.3, 0.3], HEALTHY) == []
    assert alarms(HC, [None, 1.0, 2.0], [0.0, 0.3, 0.3], [torch.eye(2)] * 3) == []  # HC starts at the identity


@pytest.mark.parametrize(
    "grads,spreads,H_res,words",
    [
        ([1.0, 1e-7, 2.0], [0.0, 0.3, 0.3], HEALTHY, "sublayer 2: the gradient of phi_res"),
        ([None, 1.0, 2.0], [0.0, 0.3, 1e-8], HEALTHY, "sublayer 3: all 2 streams are identical"),
        ([None, 1.0, 2.0], [0.0, 0.3, 0.3], HEALTHY[:2] + [torch.eye(2)], "sublayer 3: Sinkhorn is saturated"),
    ],
)
def test_a_dead_map_raises_its_alarm(grads, spreads, H_res, words):
    (line,) = alarms(MHC, grads, spreads, H_res)
    assert line.startswith("alarm: ") and words in line


def test_res_gradients_are_of_the_columns_that_make_H_res():
    from tests.test_residual import make, tokens

    for residual, columns in (("mhc", 16), ("hc", 4)):
        model = make(residual=residual)
        if residual == "hc":
            for r in model.residuals():
                torch.nn.init.normal_(r.theta, std=0.02)
        model(tokens(), tokens(1))[1].backward()
        norms = res_gradients(model.residuals())
        weights = [r.phi if residual == "mhc" else r.theta for r in model.residuals()]
        want = [w.grad[:, -columns:].norm().item() for w in weights]
        assert [n is None for n in norms] == ([True, False, False, True] if residual == "mhc" else [False] * 4)
        assert all(n is None or n == pytest.approx(w) and n > 0 for n, w in zip(norms, want, strict=True))
