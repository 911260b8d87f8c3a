"""What README shows in Python runs, and does what the text says."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import plan
import recompute
from mhc_ref import mhc_post_res_ref, mhc_step_ref
from model import RESIDUALS
from tests.test_plan import LAYOUT
from tests.test_recompute import make, same, step, tokens
from tests.test_train import TINY

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def python_block(words):
    """The one ```python block of README that holds these words."""
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if words in b]
    return block


def test_mhc_step_in_a_model_of_ones_own():
    """The snippet of the first screen, against the equations in float64, gradient of a parameter included."""
    torch.manual_seed(0)
    n, C = 3, 10
    layers = [torch.nn.Linear(C, C, dtype=torch.float64) for _ in range(3)]
    maps = [
        tuple(torch.randn(*s, dtype=torch.float64) for s in ((n * C, n * n + 2 * n), (3,), (n * n + 2 * n,)))
        for _ in layers
    ]
    maps[0][0].requires_grad_()
    h = torch.randn(2, 5, C, dtype=torch.float64)

    x, y, H_post, H_res = h.unsqueeze(-2).expand(2, 5, n, C), None, None, None
    for layer, parameters in zip(layers, maps, strict=True):
        x, x_in, H_post, H_res = mhc_step_ref(x, y, H_post, H_res, *parameters)
        y = layer(x_in)
    want = mhc_post_res_ref(x, y, H_post, H_res).sum(-2)

    seen = {"h": h, "n": n, "layers": layers, "maps": maps}
    exec(python_block("mhc_post_res(x, y"), seen)
    torch.testing.assert_close(seen["h"], want)
    (got,), (wanted,) = (torch.autograd.grad(v.square().sum(), maps[0][0]) for v in (seen["h"], want))
    torch.testing.assert_close(got, wanted)


@pytest.fixture
def mine(tmp_path):
    """The file of 'Add your own'."""
    (tmp_path / "mine.py").write_text(python_block("RESIDUALS"))
    return tmp_path / "mine.py"


def call(*command, ok=True):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_residual_connection_of_ones_own_from_a_file(mine, tmp_path):
    """Trained with recomputation, looked at, drawn, sampled; and without its file a line says what is missing."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {i} times {i} is {i * i}." for i in range(200)))
    call("prepare_data.py", f"--dataset={tmp_path}", "--tokenizer=bytes", f"--data_dir={tmp_path}/data",
         "--val_fraction=0.5")  # fmt: skip
    how = [mine, *TINY, f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/leak", "--residual=leak"]
    assert "alarm" not in call("train.py", *how, "--max_steps=4", "--eval_interval=4", "--recompute=mhc")
    last = json.loads((tmp_path / "leak" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["composite_fwd_max"] + last["composite_bwd_min"] == pytest.approx([1] * 8)
    assert "leak" in call("figures.py", tmp_path / "leak", f"--out={tmp_path}/report.png")
    call("sample.py", mine, tmp_path / "leak", "--max_new_tokens=2")
    said = call("sample.py", tmp_path / "leak", ok=False)
    assert "residual='leak'" in said and "mine.py" in said and "Traceback" not in said


def test_a_residual_connection_of_ones_own_is_replayed_and_planned_and_only_what_acts_moves(mine, monkeypatch, capsys):
    monkeypatch.setitem(RESIDUALS, "leak", None)  # gone again afterwards
    runpy.run_path(str(mine))
    model = make(residual="leak")
    wanted = step(model)
    for i, r in enumerate(model.residuals()):
        acts = [g.abs().max() > 0 for g in r.b.grad.split(r.sizes)]
        assert acts == [i > 0, True, 0 < i < 5], i
    for mode, block in (("mhc", 1), ("mhc", -1), ("full", 4)):
        recompute.apply(model, mode, block)
        assert same(step(model), wanted), (mode, block)
    recompute.apply(model, "none")
    kept, _ = plan.activation_bytes(model.config, "none", 6, 4)
    idx, targets = tokens(model)
    saved, _ = plan.measured_bytes(model, idx, targets)
    assert idx.numel() * kept == pytest.approx(saved, rel=0.05)
    plan.report(model.config, LAYOUT)  # the dry run
    assert "memory per device" in capsys.readouterr().out
