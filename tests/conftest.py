"""Kernels run in Triton's interpreter on a CPU, unless `pytest -m gpu` asks for the compiled ones on a GPU."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import program  # noqa: E402

program.wait_kindly()  # as every program does, before anything imports torch


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU; deselected unless asked for with `pytest -m gpu`")
    if config.getoption("markexpr") != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


def pytest_collection_modifyitems(config, items):
    if config.getoption("markexpr") == "":
        gpu = [item for item in items if item.get_closest_marker("gpu")]  # keywords hold folders too
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]
    share, of = map(int, os.environ.get("SHARE_OF_TESTS", "0/1").split("/"))  # tools/gpu_hour.py
    items[:] = items[share::of]
