"""What README shows in Python runs, and does what the text says."""

import re
from pathlib import Path

import torch

from mhc_ref import mhc_post_res_ref, mhc_step_ref

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
