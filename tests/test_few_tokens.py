"""Few tokens: the Triton kernels share the channels out, so that a decode step does not run on one processor."""

import pytest
import torch

import sinkhorn_kernel as kernels
from tests.kernel_cases import NAMES, assert_as_good_as_twin, interpreter, make_inputs, needs_triton, outputs_and_grads
from tests.test_sinkhorn_kernel import BF16, OUTS, SINGLE_OUTS, triton_step, twin_step
from tools.kernel_report import example, run_boundary

pytestmark = needs_triton
PROCESSORS, C = 132, 2560  # an H100's
WALKS = ("streams_kernel", "read_kernel", "read_backward_kernel", "streams_backward_kernel")  # over channels


@pytest.fixture
def work(monkeypatch):
    """T, single_pass -> {kernel: (programs, channel tiles that one walks over)} of a boundary, forward and backward."""
    from triton.runtime.interpreter import GridExecutor

    found = {}

    def record(launch, *args, **kwargs):
        named = dict(zip(launch.arg_names, args, strict=False)) | kwargs
        if launch.fn.__name__ in WALKS:
            tiles = named.get("TILES", 1)  # read_kernel: one a program
            assert launch.grid[1] * tiles * named["BC"] >= C, "channels are left out"
            found[launch.fn.__name__] = launch.grid[0] * launch.grid[1], tiles

    def of_boundary(T, single_pass):
        found.clear()
        run_boundary(example(C, 4, T, device="meta"), single_pass)
        return dict(found)

    monkeypatch.setattr(GridExecutor, "__call__", record)
    return of_boundary


@pytest.mark.parametrize("single_pass", [False, True])
@pytest.mark.parametrize("T", [1, 16, 64, 4096])
def test_no_program_walks_over_channels_while_processors_idle(T, single_pass, work):
    """Each processor has a program; or where there are not so many channel tiles, each tile has one of its own."""
    found = work(T, single_pass)
    assert len(found) == (2 if single_pass else 4)
    for kernel, (programs, tiles) in found.items():
        assert programs >= PROCESSORS or tiles == 1, f"{kernel}: {programs} programs, {tiles} tiles each"
        assert T > 64 or programs >= 20, f"{kernel}: {programs} programs"


def test_a_decode_step_is_a_program_a_tile(work):
    """64 tokens or fewer: 80 programs of 32 channels each, none of which goes over its own twice."""
    for T in (1, 16, 64):
        assert work(T, True)["streams_kernel"] == work(T, False)["streams_kernel"] == (80, 1)


@pytest.mark.parametrize("T, form", [(1, "middle"), (17, "single middle")])
def test_values_and_gradients_from_many_shares(T, form):
    """Six shares of every sum over the channels, which the next kernel adds four at once, and two."""
    tensors = make_inputs(T, 4, 161, BF16, 3, form=form)
    BT, BC, _ = kernels.blocks("streams", 4, 161, BF16)
    assert kernels.channel_tiles(T, BT, 161, BC) == (1, 6)
    with interpreter("cpu"):
        got = outputs_and_grads(triton_step, tensors)
    twin, want = outputs_and_grads(twin_step, tensors), outputs_and_grads(twin_step, tensors, torch.float64)
    names = [*(OUTS if form == "middle" else SINGLE_OUTS), *(f"d_{k}" for k in NAMES)]
    assert_as_good_as_twin(got, twin, want, names[: len(got)])
