"""The depth cut over ranks: where the cuts fall, what runs how often, what is refused. Whole runs: test_parallel.py."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import layers
import mhc_cpu
import pipeline
import plan
import recompute
from model import GPT, GPTConfig, run_sublayers
from parallel import Ranks
from tests.ranks import run_ranks
from tests.test_plan import LAYOUT
from tools.pipeline_report import Times, simulate

SMALL = dict(
    vocab_size=64, seq_len=8, n_layer=6, n_embd=32, n_head=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
)  # fmt: skip


def build(size, schedule, mode="none", compiled=False, **settings):
    """This rank's part of a small model, with values, and the batch of its pipeline: (idx, targets) (8, 8)."""
    ranks = Ranks("fsdp", dist.get_rank(), dist.get_world_size(), torch.device("cpu"), 0, 60, 1, size)
    with torch.device("meta"):
        gpt = GPT(GPTConfig(**SMALL | settings))
    recompute.apply(gpt, mode)
    if compiled:
        gpt.compile_sublayers(backend="eager")
    ranks.build_pipeline(gpt, schedule, nullcontext)
    ranks.shard(gpt)
    ranks.initialise(gpt, seed=1)
    tokens = torch.randint(64, (8, 9), generator=torch.Generator().manual_seed(0))
    return ranks, gpt, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def whole(idx, targets, **settings):
    """The same of one process: loss, and the model with its gradients."""
    gpt = GPT(GPTConfig(**SMALL | settings))
    gpt.init_weights(1)
    loss = gpt(idx, targets)[1]
    loss.backward()
    return loss.item(), gpt


@pytest.mark.parametrize(
    "costs, head, stages, want",
    [
        ([1] * 8, 0, 4, [2, 2, 2, 2]),
        (
            [1] * 30,
            1,
            16,
            [2] * 14 + [2, 0],
        ),  # one of two blocks beside the head, or none: the dearest costs 2 either way
        ([5, 1, 1, 1, 1, 1], 0, 2, [1, 5]),
        ([1, 1], 9, 4, [2, 0, 0, 0]),  # the head alone is dearer than all the rest
    ],
)
def test_stages_are_balanced(costs, head, stages, want):
    ranges = pipeline.balance(costs, head, stages)
    assert [i for r in ranges for i in r] == list(range(len(costs))) and [len(r) for r in ranges] == want


def test_the_27b_model_over_16_stages():
    """Of 30 blocks no stage gets more than two, and the head none beside it."""
    config = GPTConfig(
        vocab_size=129280, seq_len=4096, n_layer=30, n_embd=2560, n_head=32, n_routed_experts=72, num_experts_per_tok=6,
        n_shared_experts=2, moe_intermediate_size=1536, intermediate_size=8 * 1536,
    )  # fmt: skip
    costs, head = pipeline.block_flops(config)
    of_stage = [sum(costs[i] for i in r) for r in pipeline.cut(config, 8, "dualpipev")]
    of_stage[-1] += head
    assert max(of_stage) <= 2.5 * sum(of_stage) / 30 and len(of_stage) == 16


def check_once(size, schedule, mode):
    """Boundaries, experts and their gradients, once for each micro-batch and sublayer here, whatever the schedule."""
    ranks, gpt, idx, targets = build(size, schedule, mode)
    calls = {"forward": 0, "backward": 0, "F": 0}

    def count(function, name):
        def counted(*args):
            calls[name] += 1
            return function(*args)

        return staticmethod(counted)

    mhc_cpu.Step.forward = count(mhc_cpu.Step.forward, "forward")
    mhc_cpu.Step.backward = count(mhc_cpu.Step.backward, "backward")
    run = layers.Experts.forward
    layers.Experts.forward = lambda self, *a: count(run, "F").__func__(self, *a)
    ranks.pipeline.step(idx, targets, 8)
    sublayers, mixtures = len(gpt.residuals()), len(gpt.gates())
    replays = 1 if mode == "none" else 2
    assert calls == {"forward": 8 * sublayers * replays, "backward": 8 * sublayers, "F": 8 * mixtures}, calls
    assert gpt.expert_load().sum(1).tolist() == [8 * 8 * 2] * mixtures  # no token is counted twice


@pytest.mark.parametrize("schedule, mode", [("dualpipev", "none"), ("zbv", "none"), ("dualpipev", "mhc")])
def test_a_boundary_runs_once_for_each_micro_batch(schedule, mode):
    run_ranks(2, check_once, 2, schedule, mode)


def check_gradients(schedule, compiled=False, **settings):
    """Every gradient, the norm over all stages, a validation loss, and the maps of all sublayers."""
    ranks, gpt, idx, targets = build(2, schedule, compiled=compiled, **settings)
    want, one = whole(idx, targets, **settings)
    assert ranks.pipeline.step(idx, targets, 8).item() == pytest.approx(want, abs=1e-6)
    gradients = dict(one.named_parameters())
    for name, p in gpt.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), gradients[name].grad, msg=lambda m, n=name: f"{n}: {m}")
    norm = torch.nn.utils.get_total_norm([p.grad for p in one.parameters()]).item()
    assert ranks.clip_grad_norm(gpt, 0) == pytest.approx(norm, rel=1e-5)
    assert gpt(idx[:2], targets[:2])[1].item() == pytest.approx(one(idx[:2], targets[:2])[1].item(), abs=1e-6)
    seen, wanted = (m.look(idx[:1], lambda residual, x: residual.maps(x)[2]) for m in (gpt, one))
    assert len(seen) == 12 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(seen, wanted, strict=True))
    assert gpt.num_params() == one.num_params() and gpt.flops_per_token() == one.flops_per_token()
    held = [name for name, _ in gpt.named_parameters()]
    assert set(held) < set(gradients), "a rank holds its own stages only"


@pytest.mark.parametrize("schedule", pipeline.SCHEDULES)
def test_two_ranks_compute_what_one_process_does(schedule):
    run_ranks(2, check_gradients, schedule)


def check_single_pass():
    check_gradients("dualpipev", compiled=True, single_pass=True)


def test_compiled_stages_hand_the_H_pre_of_single_pass_to_the_next():
    run_ranks(2, check_single_pass)


def check_order(schedule, settings):
    """torch is watched at its stages' own methods, and where it sends."""
    ranks, gpt, idx, targets = build(4, schedule, **settings)
    seen, sent = [], []

    def watch(kind, inner):
        def watched(self, mb, *args, **kwargs):
            seen.append((kind, self.stage_index, mb))
            return inner(self, mb, *args, **kwargs)

        return watched

    def weigh(inner):
        def weighed(self, mb):
            ops = inner(self, mb)
            sent.extend(op.tensor.nbytes for op in ops)
            return ops

        return weighed

    PipelineStage.get_fwd_send_ops = weigh(PipelineStage.get_fwd_send_ops)
    PipelineStage.get_bwd_send_ops = weigh(PipelineStage.get_bwd_send_ops)
    PipelineStage.forward_one_chunk = watch("F", PipelineStage.forward_one_chunk)
    PipelineStage.backward_one_chunk = watch("B", PipelineStage.backward_one_chunk)
    ranks.pipeline.step(idx, targets, 8)
    rank = dist.get_rank()
    assert seen == pipeline.order(schedule, 4, 8)[rank]
    s = LAYOUT | dict(pipeline_size=4, pipeline_schedule=schedule, batch_size=8, seq_len=8)
    assert sum(sent) == plan.communication(gpt, s, 1, rank)["streams between stages"] > 0


@pytest.mark.parametrize("schedule, settings", [("dualpipev", {}), ("zbv", dict(single_pass=True)), ("1f1b", {})])
def test_the_order_and_the_bytes_are_those_of_what_torch_executes(schedule, settings):
    """On every one of four ranks."""
    run_ranks(4, check_order, schedule, settings)


def test_no_sublayers_change_nothing():
    x, carry = torch.randn(2, 3, 4, 5), object()
    assert run_sublayers(x, [], carry=carry) == (x, carry)


SETTINGS = dict(
    pipeline_size=2, pipeline_schedule="dualpipev", pipeline_overlap=False, expert_size=1, parallel="fsdp",
    shard_size=0, reduce_always=False, batch_size=8, micro_batch_size=1,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, world, words",
    [
        (dict(parallel="ddp"), 2, "wanted parallel='fsdp'"),
        (dict(shard_size=2), 4, "shard_size=0"),
        (dict(reduce_always=True), 2, "reduce_always=False"),
        (dict(pipeline_size=3), 4, "does not divide the 4 processes"),
        (dict(pipeline_size=8), 8, "16 stages for n_layer=6 blocks"),
        (dict(pipeline_overlap=True), 2, "wanted pipeline_size and expert_size above 1"),
        (dict(pipeline_overlap=True, expert_size=2, pipeline_schedule="zbv"), 4, "got 2, 2 and 'zbv'"),
        (dict(pipeline_overlap=True, expert_size=2, pipeline_size=1), 4, "got 1, 2 and 'dualpipev'"),
        (dict(micro_batch_size=4), 2, "as many micro-batches in a step as stages, 4; there are 2"),
    ],
)
def test_pipelines_that_cannot_be_name_the_rule(changes, world, words):
    with pytest.raises(ValueError, match=words):
        pipeline.check(GPTConfig(**SMALL), SETTINGS | changes, world)


def play(schedule, size, micro_batches, **times):
    return simulate(
        schedule, size, micro_batches, Times(**dict(forward=1.0, backward=2.0, wire=0.0, exposed=False) | times)
    )


def test_a_step_on_paper_has_the_bubble_of_the_formula():
    """1F1B with equal stages: (W - 1) forwards and backwards idle; the wire only delays, or is waited for."""
    step, bubble, waited, held = play("1f1b", 4, 16)
    assert step == 3 * (16 + 3) and bubble == pytest.approx(3 / 19) and waited == 0 and held == 4
    later = play("1f1b", 4, 16, wire=0.1)[0]
    worst, _, waited, _ = play("1f1b", 4, 16, wire=0.1, exposed=True)
    assert step < later < worst and waited == pytest.approx(0.1 * 32)  # a rank in the middle sends both ways
    assert play("dualpipev", 4, 16)[1] < bubble  # with two half-size stages a rank: its times are not halved here


def test_no_schedule_waits_for_itself():
    for schedule in pipeline.SCHEDULES:
        for size in (2, 3, 4):
            assert play(schedule, size, 2 * size + 1)[0] > 0
