"""What the compilers make of the kernels, ahead of time: compiled, not run. Guards the order of lines they need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel_cases import needs_triton
from tools.kernel_report import SHARED_MEMORY

pytestmark = needs_triton
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDTHS = (1280, 1920, 2560)
BF16 = [(C, 4, "bfloat16", "middle", TARGETS) for C in WIDTHS]
FORMS = [(2560, 4, "bfloat16", form, TARGETS) for form in ("first", "last")]
FORMS += [(2560, 2, "bfloat16", form, ("sm_90",)) for form in ("first", "last")]
FORMS += [(2560, 2, "float32", "first", TARGETS)]
FEWER_STREAMS = [(2560, n, "bfloat16", "middle", TARGETS) for n in (2, 1)]
DTYPES = [(2560, 4, dtype, "middle", TARGETS) for dtype in ("float32", "float16")]
EIGHT_STREAMS = [(2560, 8, "bfloat16", form, TARGETS) for form in ("first", "middle", "last")]
EIGHT_STREAMS += [(2560, 8, dtype, "middle", TARGETS) for dtype in ("float32", "float16")]
CASES = BF16 + FORMS + FEWER_STREAMS + DTYPES + EIGHT_STREAMS


@pytest.fixture(scope="module")
def reports():
    """Rows of all cases. A process of its own: here the kernels may belong to the interpreter."""
    code = "import json, torch\nfrom tools import kernel_report as k\nrows = []\n"
    code += f"for C, n, dtype, form, targets in {CASES}:\n"
    code += "    for row in k.compile_report(C, n, targets, getattr(torch, dtype), form):\n"
    code += "        rows.append(dict(row, C=C, n=n, dtype=dtype, form=form))\nprint(json.dumps(rows))"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == sum((2 if form == "last" else 4) * len(targets) for *_, form, targets in CASES)
    return rows


def check(row):
    """What holds for every kernel, of any case."""
    print(row)
    assert row["spilled"] == 0, f"spills: {row}"
    assert row["atomics"] == 0, f"atomics: {row}"
    assert row["shared"] <= SHARED_MEMORY[row["target"]], f"too much shared memory: {row}"
    if row["kernel"] != "maps_backward_kernel" and row["form"] != "last":  # these have no matrix product
        assert row["tensor"] > 0, f"no tensor cores: {row}"


@pytest.mark.parametrize("target", TARGETS)
def test_compiled_kernels(reports, target):
    """Up to 4 streams, all dtypes, all forms: nothing spilled, and tiles in the widest accesses there are."""
    rows = [row for row in reports if row["n"] <= 4 and row["target"] == target]
    assert {(row["form"], row["dtype"]) for row in rows} >= {("first", "bfloat16"), ("middle", "float32")}
    for row in rows:
        check(row)
        assert row["tile_bits"] == (None if row["dtype"] == "float32" else 128), f"narrow tile accesses: {row}"


@pytest.mark.parametrize("target", TARGETS)
def test_eight_streams(reports, target):
    """Nothing spilled here either. `streams` moves 64 bits at a time; for fp16 on NVIDIA it moves 16, and `step` 64."""
    narrow = {("streams_backward_kernel", "bfloat16"): 64, ("streams_backward_kernel", "float16"): 64}
    if target != "gfx942":
        narrow |= {("mhc_step_kernel", "float16"): 64, ("streams_backward_kernel", "float16"): 16}
    for row in [row for row in reports if row["n"] == 8 and row["target"] == target]:
        check(row)
        wanted = None if row["dtype"] == "float32" else narrow.get((row["kernel"], row["dtype"]), 128)
        assert row["tile_bits"] == wanted, f"tile accesses: {row}"


def test_enough_programs(reports):
    """Programs in flight on an H100 at 4096 tokens: what there is, pinned, so that a change of blocks is seen."""
    case = {"target": "sm_90", "C": 2560, "n": 4, "dtype": "bfloat16", "form": "middle"}
    in_flight = {row["kernel"]: row["in_flight"] for row in reports if case.items() <= row.items()}
    assert in_flight["mhc_step_kernel"] >= 64  # one program a 64 tokens: half of the chip's 132 processors
    assert min(n for kernel, n in in_flight.items() if kernel != "mhc_step_kernel") >= 132
