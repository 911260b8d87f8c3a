"""torch.compile of sublayers: one graph each, without a break, and none compiled twice. Backend aot_eager: it traces
forward and backward as the default does, but needs no C++ compiler, which takes a minute."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from model import run_sublayers
from tests.test_residual import TINY, make, tokens

KINDS = [("baseline", {}), ("hc", {}), ("mhc", {}), ("mhc", {"single_pass": True})]


@pytest.fixture(autouse=True)
def forgets_what_was_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(model):
    """A forward and backward in bf16, as on a GPU -> loss, gradients."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), tokens(1))[1]
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("residual, changes", KINDS)
def test_every_sublayer_is_one_graph(residual, changes):
    """Attention, dense FFN and mixture: three graphs for eight sublayers, two micro-batches; the same gradients."""
    model = make(residual=residual, n_layer=4, first_k_dense_replace=2, **changes)
    wanted, counter = step(model), CompileCounterWithBackend("aot_eager")
    model.compile_sublayers(backend=counter, fullgraph=True)
    for _ in range(2):
        for g, w in zip(step(model), wanted, strict=True):
            torch.testing.assert_close(g, w)
    assert counter.frame_count == 3


@pytest.mark.parametrize("residual, changes", KINDS)
def test_boundary_norm_and_sublayer_are_one_graph(residual, changes):
    """A whole block, dense and of experts, with its boundaries written in PyTorch. (The kernels': test_operators.py.)"""
    model = make(residual=residual, n_layer=2, impl="ref", **changes)
    x = model.embed(tokens()).detach().requires_grad_()
    sublayers = list(model.sublayers(torch.arange(TINY["seq_len"]).unsqueeze(0)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run_sublayers, backend=counter, fullgraph=True)
    outs = []
    for run in (run_sublayers, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = run(x, sublayers)
        outs.append((out.detach(), torch.autograd.grad(out.float().square().mean(), x)[0]))
    assert counter.frame_count == 1
    for g, w in zip(*outs, strict=True):
        torch.testing.assert_close(g, w)


def test_experts_outside_of_the_grouped_product_run_as_they_are():
    """In fp32 it has no version that can be traced; the loop in its place must not be compiled for every division of the rows."""
    model, counter = make(n_layer=1, first_k_dense_replace=0), CompileCounterWithBackend("aot_eager")
    model.compile_sublayers(backend=counter)
    for seed in range(12):
        idx = tokens(seed)
        model(idx, idx)[1].backward()
    assert counter.frame_count <= 4  # attention; the mixture before and after the loop
