"""The bytes the kernels ask for, counted in Triton's interpreter; and that the counter sees what it must refuse."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mhc_ref
import sinkhorn_kernel
from tests.kernel_cases import needs_triton
from tools import kernel_report
from tools.kernel_report import Traffic, example, liger_step, liger_traffic, retune, total, traffic

pytestmark = needs_triton
if sinkhorn_kernel.triton is not None:
    import triton
    import triton.language as tl
    import triton.testing

    @triton.jit
    def copy(x_ptr, y_ptr, N, STEP: tl.constexpr):
        at = tl.program_id(0) * STEP + tl.arange(0, 16)
        tl.store(y_ptr + at, tl.load(x_ptr + at, at < N), at < N)

    @triton.jit
    def write_then_read(x_ptr, y_ptr):
        at = tl.arange(0, 16)
        tl.store(y_ptr + at, tl.load(x_ptr + at))
        tl.store(y_ptr + at, tl.load(y_ptr + at) + 1)

    @triton.jit
    def add(x_ptr, y_ptr):
        tl.atomic_add(y_ptr + tl.arange(0, 16), tl.load(x_ptr + tl.arange(0, 16)))


def test_a_boundary_moves_what_the_essay_says():
    forward, backward = traffic(C=128, n=4, T=250)
    assert total(forward, "streams") == pytest.approx((9 + 5, 9 + 5))
    assert total(backward, "streams") == pytest.approx((5 + 15 + 4, 24))
    assert total(forward, "phi")[0] <= 4 and total(backward, "phi")[0] <= 14
    forward, backward = traffic(C=128, n=4, T=250, single_pass=True)
    assert total(forward, "streams") == pytest.approx((10, 10))
    assert total(backward, "streams") == pytest.approx((15 + 4, 19))
    assert total(forward, "phi")[0] <= 4 and total(backward, "phi")[0] <= 14


def test_retuning_finds_the_fastest_rows(capsys):
    """With times that only pretend: 'phi_backward' is fastest in the tile it has, the others in another one."""
    wanted, ran = {"streams": (32, 16), "read": (32, 128), "read_backward": (16, 32)}, []
    wanted |= {"phi_backward": (32, 64), "streams_backward": (16, 64)}

    def bench(boundary):
        seen = {kernel: sinkhorn_kernel.blocks(kernel, 1, 16)[:2] for kernel in wanted}
        if not ran:
            boundary()
        ran.append(seen)
        if seen["streams"][0] == 128:
            raise triton.runtime.errors.OutOfResources(300, 227, "shared memory")
        return sum(seen[kernel] != wanted[kernel] for kernel in wanted)

    blocks = sinkhorn_kernel.blocks
    times = retune(example(C=64, n=1, T=8), bench)
    assert {kernel: min(rows, key=rows.get)[:2] for kernel, rows in times.items()} == wanted
    assert next(iter(times["streams"]))[:2] == (64, 32) and "out of resource" in capsys.readouterr().out
    assert sinkhorn_kernel.blocks is blocks


def test_retuning_by_itself_compiles_ahead_and_times_no_row_that_spills(monkeypatch, capsys):
    """With a card, times and compilations that only pretend: whatever is not 32 tokens high spills."""
    monkeypatch.setattr(kernel_report, "need_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(triton.testing, "do_bench", lambda boundary: 1.0)
    monkeypatch.setattr(kernel_report, "example", lambda C, n, T, device: example(C, n, T))
    monkeypatch.setattr(kernel_report, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(1))
    monkeypatch.setattr(kernel_report, "compile_row", lambda kernel, row, C, n, T: 8 * (row[0] != 32))
    kernel_report.print_retune(64, 1, 8)
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(kernel_report.TUNED)
    for kernel, line in zip(kernel_report.TUNED, lines, strict=True):
        _, *others = kernel_report.rows_to_try(kernel, 1, 64)
        dropped = sum(row[0] != 32 for row in others)
        assert line.endswith(f"{1 + len(others) - dropped} tried, {dropped} dropped") and 0 < dropped < len(others)


def test_the_counter_counts():
    x, y = torch.arange(32.0), torch.zeros(32)
    with Traffic() as seen:
        copy[(2,)](x, y, 20, STEP=16)
    assert torch.equal(y[:20], x[:20])
    assert seen.asked["copy", "streams"] == seen.distinct["copy", "streams"] == 2 * 20 * 4  # masked lanes ask nothing
    with Traffic() as seen:
        y.sum(0)
    assert seen.asked["PyTorch operations", "phi"] == 33 * 4
    with Traffic(C=16) as seen:  # rows of the streams' width
        x.view(2, 16).bfloat16()
    assert seen.asked["PyTorch operations", "streams"] == 32 * (4 + 2)
    with Traffic(atomics=True) as seen:  # for Liger's count; alpha by keyword, as there
        add[(1,)](x, y_ptr=y)
    assert seen.asked["add", "streams"] == seen.distinct["add", "streams"] == 2 * 16 * 4


def test_liger_boundary_is_the_same_and_moves_more():
    """The column beside ours: where Liger is installed, that it computes the same boundary, and what it asks for."""
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    tensors = example(C=64, n=4, T=32, dtype=torch.float32)
    outs = liger_step(*tensors)  # it multiplies phi in tf32, which Triton's interpreter alone computes exactly
    for got, want in zip(outs, mhc_ref.mhc_step_ref(*tensors), strict=True):
        assert torch.allclose(got, want, atol=1e-4)
    forward, backward = liger_traffic(C=64, n=4, T=32)
    for counted, asked in ((forward, 23), (backward, 45)):
        alone = {key: v for key, v in counted.items() if key[0] != "PyTorch operations"}
        assert total(alone, "streams")[0] == pytest.approx(asked)


@pytest.mark.parametrize(
    "launch, message",
    [
        (lambda x, y: copy[(2,)](x, y, 32, STEP=8), "two programs write"),
        (lambda x, y: copy[(3,)](x, y, 48, STEP=16), "outside every argument"),
        (lambda x, y: write_then_read[(1,)](x, y), "which the same launch wrote"),
        (lambda x, y: add[(1,)](x, y), "atomic"),
    ],
)
def test_the_counter_refuses(launch, message):
    memory = torch.zeros(1000)  # x and y inside a larger block, so that a stray access does no harm
    with pytest.raises(Exception, match=message), Traffic():
        launch(memory[100:132], memory[500:532])
