"""What the compilers make of the kernels, ahead of time: compiled, not run. Guards the order of lines they need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_report import SHARED_MEMORY
from tests.kernel_cases import needs_triton

pytestmark = needs_triton
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDTHS = (1280, 1920, 2560)


@pytest.fixture(scope="module")
def reports():
    """{target: rows for all widths}. A process of its own: here the kernels may belong to the interpreter."""
    code = "import json, kernel_report as k\n"
    code += f"rows = [dict(row, C=C) for C in {WIDTHS} for row in k.compile_report(C)]\nprint(json.dumps(rows))"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 4 * len(TARGETS) * len(WIDTHS)
    return {target: [row for row in rows if row["target"] == target] for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_compiled_kernels(reports, target):
    for row in reports[target]:
        where = f"{row['kernel']} for {target} at C = {row['C']}: {row}"
        print(where)
        assert row["spilled"] == 0, f"spills: {where}"
        assert row["atomics"] == 0, f"atomics: {where}"
        assert row["tile_bits"] == 128, f"narrow tile accesses: {where}"
        assert row["shared"] <= SHARED_MEMORY[target], f"too much shared memory: {where}"
        if row["kernel"] != "maps_backward_kernel":  # the only one without a matrix product
            assert row["tensor"] > 0, f"no tensor cores: {where}"


def test_enough_programs(reports):
    """Programs in flight on an H100 at 4096 tokens: what there is, pinned, so that a change of blocks is seen."""
    in_flight = {row["kernel"]: row["in_flight"] for row in reports["sm_90"] if row["C"] == 2560}
    assert in_flight["mhc_step_kernel"] >= 64  # one program a 64 tokens: half of the chip's 132 processors
    assert min(n for kernel, n in in_flight.items() if kernel != "mhc_step_kernel") >= 132
