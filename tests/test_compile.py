"""torch.compile of sublayers: one graph each, without a break, and none compiled twice. Backend aot_eager: it traces
forward and backward as the default does, but needs no C++ compiler, which takes a minute."""

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import train
from model import run_sublayers
from parallel import start
from tests.test_residual import TINY, make, tokens

KINDS = [("baseline", {}), ("hc", {}), ("mhc", {}), ("mhc", {"single_pass": True})]


@pytest.fixture(autouse=True)
def forgets_what_was_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(model):
    """A forward and backward in bf16, as on a GPU -> loss and gradients in one row."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), tokens(1))[1]
    loss.backward()
    return torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in model.parameters())])


def test_every_sublayer_is_one_graph():
    """Attention, dense FFN, mixture, loss: four graphs for eight sublayers, two micro-batches; the same gradients."""
    model = make(n_layer=4, first_k_dense_replace=2)
    wanted, counter = step(model), CompileCounterWithBackend("aot_eager")
    model.compile_sublayers(backend=counter, fullgraph=True)
    for _ in range(2):
        assert (step(model) - wanted).norm() < 0.01 * wanted.norm()  # bf16 is rounded elsewhere
    assert counter.frame_count == 4


@pytest.mark.parametrize("residual, changes", KINDS)
def test_boundary_norm_and_sublayer_are_one_graph(residual, changes):
    """Whole blocks, with boundaries in plain PyTorch. (With the kernels' operators: test_operators.py.)"""
    model = make(residual=residual, impl="ref", sinkhorn_iters=2, **changes)
    x = model.embed(tokens())
    sublayers = list(model.sublayers(torch.arange(TINY["seq_len"]).unsqueeze(0)))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(run_sublayers, backend=counter, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, wanted = compiled(x, sublayers)[0], run_sublayers(x, sublayers)[0]
    assert counter.frame_count == 1
    torch.testing.assert_close(got, wanted)


def test_weights_that_are_cast_once_a_step_are_not_compiled_in_every_step(monkeypatch):
    monkeypatch.setattr(train, "dtype", "bfloat16")
    monkeypatch.setattr(train, "micro_batch_size", 1)
    model, counter = make(), CompileCounterWithBackend("eager")
    model.compile_sublayers(backend=counter, fullgraph=True)
    for step in range(3):
        batches = SimpleNamespace(of=lambda step: (tokens(step), tokens(step + 1)))
        train.forward_backward(model, batches, step, start())
    assert counter.frame_count == 4  # attention, FFN, mixture, loss


def test_a_mixture_in_fp32_is_one_graph_for_every_division_of_the_rows():
    """torch has no grouped product in fp32 that can be traced: blocks of rows stand in for it."""
    model, counter = make(n_layer=1, first_k_dense_replace=0), CompileCounterWithBackend("aot_eager")
    wanted = [model(tokens(seed))[0] for seed in range(12)]
    model.layers[0].mlp.compile(backend=counter, fullgraph=True)
    for seed, logits in enumerate(wanted):
        torch.testing.assert_close(model(tokens(seed))[0], logits)
    assert counter.frame_count == 1
