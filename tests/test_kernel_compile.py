"""What the compilers make of the kernels, ahead of time: compiled, not run. Guards the order of lines they need.

With another Triton first on PYTHONPATH (3.6.0 is the oldest that is held to this) it guards up to 4 streams in bf16.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sinkhorn_kernel
from tests.kernel_cases import needs_triton
from tools.kernel_report import SHARED_MEMORY

pytestmark = needs_triton
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
STREAMS = ("streams_kernel", "streams_backward_kernel")  # what differs between forms
PHI = (*STREAMS, "phi_backward_kernel")  # what differs between dtypes, but for plain loads and stores
OLD = sinkhorn_kernel.triton is not None and tuple(map(int, sinkhorn_kernel.triton.__version__.split(".")[:2])) < (3, 7)

# n, dtype, form, single-pass, targets, kernels (None: all)
CASES = [(4, "bfloat16", "middle", False, TARGETS, None), (2, "bfloat16", "middle", False, ("sm_90",), None)]
CASES += [(n, "bfloat16", "middle", True, TARGETS, STREAMS) for n in (4, 2, 1)]
CASES += [(4, "bfloat16", form, False, ("sm_80", "sm_90", "gfx942"), STREAMS) for form in ("first", "last")]
CASES += [(4, "bfloat16", "first", True, ("sm_90",), STREAMS)]
if not OLD:
    CASES += [(4, dtype, "middle", True, TARGETS, PHI) for dtype in ("float32", "float16")]
    CASES += [(8, "bfloat16", "middle", False, TARGETS, (*PHI, "maps_backward_kernel"))]
    CASES += [(8, "bfloat16", form, form == "middle", ("sm_90",), STREAMS) for form in ("middle", "last")]
    CASES += [(8, dtype, "middle", True, TARGETS, PHI) for dtype in ("float32", "float16")]
    CASES += [(2, "float32", "first", False, ("sm_90",), STREAMS)]
# Another row of the block table for NVIDIA's `streams_backward`: not pipelined, 128 bits a thread, two programs to an
# SM. Which is faster nobody has timed; that it too spills nothing is kept true.
WIDE = (32, 32, 4, 1)
WIDE_TARGETS = () if OLD else ("sm_80", "sm_90", "sm_100")


@pytest.fixture(scope="module")
def reports():
    """Rows of all cases. Processes of their own: here the kernels may belong to the interpreter."""
    code = "import json, os, torch\nfrom concurrent.futures import ProcessPoolExecutor\n"
    code += "import sinkhorn_kernel as sk\nfrom tools import kernel_report as k\n"
    code += "table, given = sk.BLOCKS['streams_backward'], sk.BLOCKS['streams_backward']['nvidia']\n"
    code += "def report(case):\n    n, dtype, form, single_pass, target, only, wide = case\n"
    code += f"    table['nvidia'] = {WIDE} if wide else given\n"
    code += "    rows = k.compile_report(2560, n, (target,), getattr(torch, dtype), form, single_pass, only)\n"
    code += "    return [dict(row, n=n, dtype=dtype, form=form, single_pass=single_pass, wide=wide) for row in rows]\n"
    code += f"cases = [(*case, target, only, False) for *case, targets, only in {CASES} for target in targets]\n"
    code += "cases += [(4, 'bfloat16', 'middle', True, target, ('streams_backward_kernel',), True)"
    code += f" for target in {WIDE_TARGETS}]\n"
    code += "with ProcessPoolExecutor(min(8, os.cpu_count())) as pool:\n"  # each takes some 400 MB
    code += "    print(json.dumps(sum(pool.map(report, cases), [])))"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    wanted = sum(len(targets) * (len(only) if only else 7) for *_, targets, only in CASES)
    assert len(rows) == wanted + len(WIDE_TARGETS)
    return rows


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(reports, target):
    """Of any kernel, in any form; nor an atomic; and products run on tensor cores."""
    for row in (row for row in reports if row["target"] == target):
        print(row)
        assert row["spilled"] == 0, f"spills: {row}"
        assert row["atomics"] == 0, f"atomics: {row}"
        assert row["shared"] <= SHARED_MEMORY[target], f"too much shared memory: {row}"
        if row["kernel"] in PHI and row["form"] != "last":  # the others have no matrix product
            assert row["tensor"] > 0, f"no tensor cores: {row}"


NARROW = {  # bits of a thread's access to a tile, where they are not 128: kernel, whether 8 streams, dtype, maker
    ("streams_backward_kernel", False, "bfloat16", "nvidia"): 64,
    ("streams_backward_kernel", False, "float16", "nvidia"): 64,
    ("streams_backward_kernel", True, "bfloat16", "nvidia"): 64,
    ("streams_backward_kernel", True, "bfloat16", "amd"): 64,
    ("streams_backward_kernel", True, "float16", "nvidia"): 16,
    ("streams_backward_kernel", True, "float16", "amd"): 64,
    ("streams_kernel", True, "float16", "nvidia"): 64,
}


@pytest.mark.parametrize("target", TARGETS)
def test_tiles_move_in_wide_accesses(reports, target):
    maker = "amd" if target.startswith("gfx") else "nvidia"
    for row in (row for row in reports if row["target"] == target and row["dtype"] != "float32"):
        wanted = 128 if row["wide"] else NARROW.get((row["kernel"], row["n"] == 8, row["dtype"], maker), 128)
        assert row["tile_bits"] in (None, wanted), f"tile accesses: {row}"


def test_enough_programs(reports):
    """At 4096 tokens there is work for each of an H100's 132 processors; but for the mappings, 1/400 of the bytes."""
    case = {"target": "sm_90", "n": 4, "dtype": "bfloat16", "form": "middle", "wide": False}
    in_flight = {row["kernel"]: row["in_flight"] for row in reports if case.items() <= row.items()}
    assert len(in_flight) == 7
    assert min(n for kernel, n in in_flight.items() if kernel != "maps_kernel") >= 132
