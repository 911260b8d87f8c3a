"""Experts cut over ranks: what each holds, gradients, idle ranks, what is refused. test_parallel.py has whole runs."""

import pytest
import torch
import torch.distributed as dist

import expert_parallel
from model import GPT, GPTConfig
from parallel import Ranks
from tests.ranks import run_ranks
from train import uneven

CONFIG = GPTConfig(
    vocab_size=64, seq_len=8, n_layer=2, n_embd=32, n_head=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
)  # fmt: skip


def gradients(model, favourites=(), shares=1):
    """Of four sequences, or this rank's of `shares` equal shares; the experts `favourites` get all tokens."""
    gate = model.layers[1].mlp.gate
    for e in favourites:
        gate.e_score_correction_bias[e] = 10.0
    idx = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(0))
    idx = idx.chunk(shares)[dist.get_rank() if shares > 1 else 0]
    model(idx[:, :-1], idx[:, 1:])[1].backward()


def one_process(favourites):
    model = GPT(CONFIG)
    model.init_weights(1)
    gradients(model, favourites)
    return model


def check_gradients(P, favourites, compiled=False):
    ranks = Ranks("fsdp", dist.get_rank(), dist.get_world_size(), torch.device("cpu"), 0, 60, P)
    with torch.device("meta"):
        model = GPT(CONFIG)
    ranks.shard(model)
    ranks.initialise(model, seed=1)
    experts = model.layers[1].mlp.experts.gate_proj
    if compiled:
        model.compile_sublayers(backend="aot_eager")
    assert experts.shape == (8, 16, 32) and experts.to_local().shape == (8 // P, 16 * P // ranks.world, 32)
    gradients(model, favourites, ranks.world)
    wanted = one_process(favourites)
    for (name, p), q in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=lambda m, name=name: f"{name}: {m}")
    norm = torch.nn.utils.get_total_norm([q.grad for q in wanted.parameters()]).item()
    assert ranks.clip_grad_norm(model, norm / 2) == pytest.approx(norm, rel=1e-5)
    clipped = model.layers[1].mlp.experts.down_proj.grad.full_tensor()
    torch.testing.assert_close(clipped, wanted.layers[1].mlp.experts.down_proj.grad / 2)


@pytest.mark.parametrize("favourites", [(), (1, 2)], ids=["all", "one rank's"])
@pytest.mark.parametrize("world, P", [(2, 2), (4, 2)])
def test_gradients_and_norm_of_one_process(world, P, favourites):
    """With every expert at work, and with all tokens on experts of one rank, so that the others' get none."""
    run_ranks(world, check_gradients, P, favourites)


def test_compiled_sublayers_exchange_rows_as_others_do():
    run_ranks(2, check_gradients, 2, (), True)


def check_waits():
    """A mixture waits for the device once: one list is read from it in a forward, none in a backward."""
    ranks = Ranks("fsdp", dist.get_rank(), 2, torch.device("cpu"), 0, 60, 2)
    with torch.device("meta"):
        model = GPT(CONFIG)
    ranks.shard(model)
    ranks.initialise(model, seed=1)
    read, tolist = [], torch.Tensor.tolist
    torch.Tensor.tolist = lambda t: read.append(t.shape) or tolist(t)
    gradients(model, shares=2)
    assert read == [(2, 2)]  # of the one mixture: rows sent to and received from each of two ranks


def test_one_wait_for_the_device_a_layer():
    run_ranks(2, check_waits)


@pytest.mark.parametrize(
    "P, world, parallel, shard_size, words",
    [
        (2, 4, "ddp", 0, "wanted parallel='fsdp'"),
        (2, 4, "fsdp", 2, "shard_size=0"),
        (4, 6, "fsdp", 0, "does not divide the 6 processes"),
        (3, 3, "fsdp", 0, "does not divide n_routed_experts=8"),
        (2, 6, "fsdp", 0, "cut moe_intermediate_size between them, and 16"),
    ],
)
def test_layouts_that_cannot_be_name_the_rule(P, world, parallel, shard_size, words):
    with pytest.raises(ValueError, match=words):
        expert_parallel.check(CONFIG, P, world, parallel, shard_size)


def test_the_ranks_that_exchange_tokens_are_of_one_node():
    expert_parallel.check(CONFIG, 2, 8, "fsdp", 0, node=4)
    for node in (3, 1):
        with pytest.raises(ValueError, match=f"expert_size=2: wanted a divisor of the {node} processes of a node"):
            expert_parallel.check(CONFIG, 2, 12, "fsdp", 0, node=node)


def test_how_uneven_a_load_is():
    load = torch.tensor([[4, 0, 0, 0], [1, 1, 1, 1]])
    assert uneven(load, 4) == 4 and uneven(load, 2) == 2 and uneven(load[1:], 4) == 1 and uneven(load[:0], 4) is None
