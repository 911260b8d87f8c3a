"""bench.py: timings in turn, the spread, and what the command line refuses. No timing is judged here."""

import subprocess
import sys
from pathlib import Path

import pytest

import bench

ROOT = Path(__file__).parent.parent


def test_every_round_calls_every_function_in_turn():
    calls = []
    seconds = bench.time_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_spread_is_half_the_quartile_range():
    assert bench.spread([1, 2, 3, 4, 5]) == 1
    assert bench.spread([1, 2, 3, 4, 1e9]) == 1  # one bad round does not move it


@pytest.mark.parametrize(
    "args, message",
    [
        (["cqu"], "wanted one of cpu"),
        (["cpu", "--widths=640"], "640 has no block; wanted some of 512, 1280"),
        (["cpu", "--tokens=100"], "wanted a multiple of seq_len"),
        (["cpu", "--round=3"], "did you mean rounds"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(args, message):
    done = subprocess.run([sys.executable, "bench.py", *args], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
