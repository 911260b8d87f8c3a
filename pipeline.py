"""Pipeline parallelism: the depth cut into stages, each on its own ranks, the streams handed from one to the next.

    torchrun --nproc_per_node=8 train.py --parallel=fsdp --pipeline_size=4 --pipeline_schedule=dualpipev ...

    schedule      stages   where                                                                     needs
    'dualpipev'   2W       rank r has r and 2W-1-r: a V, so that rank 0 has both ends, data and loss   2W micro-batches
    'zbv'         2W       the same V, in zero-bubble's order                                        1
    '1f1b'        W        rank r has stage r                                                        1

W = pipeline_size. The schedules, sends and receives are torch.distributed.pipelining's. A stage is a range of blocks,
balanced by FLOPs; embedding, norm and head belong to the first and the last, which therefore get fewer blocks or none.
What goes over a boundary are the closed streams, x (B, T, n, C) in their own dtype, n times what a plain residual
sends, and the residual connection's carry, where it has one. So a cut always falls between two segments of
recomputation (recompute.py starts one with each stage, as the paper has it). Streams are expanded in the first stage
alone and collapsed in the last alone.

Backward passes are whole. torch's schedules split some into an input and a weight part, to fill bubbles with the
second; but a boundary's gradients come out of one pass over its streams, and split it would run twice. So 'zbv' has the
bubbles of a whole backward here: take it for its placement, not for its name. The forward and the backward that
'dualpipev' pairs run one after the other, or in turns: overlap.py.

One GPT on each rank keeps what is its own, under its own global names; the other blocks are None. So the optimizer and
checkpoint.py see parameters as ever, and a checkpoint can be read by another layout.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV, ScheduleZBVZeroBubble
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    FULL_BACKWARD,
    Schedule1F1B,
    _Action,
)
from torch.utils._pytree import tree_map_only

import overlap
from layers import MoE
from model import GPT, RESIDUALS

SCHEDULES = ("dualpipev", "zbv", "1f1b")


def whole_backwards(actions):
    """A rank's list of actions with every split backward made whole, where its input part stood."""
    whole = []
    for action in actions:
        if action is not None and action.computation_type == BACKWARD_INPUT:
            action = _Action(action.stage_index, FULL_BACKWARD, action.microbatch_index)
        if action is None or action.computation_type != BACKWARD_WEIGHT:
            whole.append(action)
    return whole


class DualPipeV(ScheduleDualPipeV):
    def _calculate_single_rank_operations(self, rank):
        return whole_backwards(super()._calculate_single_rank_operations(rank))


class ZBV(ScheduleZBVZeroBubble):
    def _calculate_single_rank_operations(self, rank):
        return whole_backwards(super()._calculate_single_rank_operations(rank))


def order(schedule, size, micro_batches):
    """What each rank runs, in order, as torch's schedules have it: for each a list of (kind, stage, micro-batch), kind
    'F' or 'B'. A forward and a backward that the schedule pairs to overlap stand one after the other."""
    if schedule == "1f1b":
        return [one_forward_one_backward(rank, size, micro_batches) for rank in range(size)]
    planner = object.__new__({"dualpipev": DualPipeV, "zbv": ZBV}[schedule])  # its plan wants no process group
    planner.pp_group_size, planner._n_microbatches, planner.num_stages = size, micro_batches, 2 * size
    flat = []
    for rank in range(size):
        actions = [a for a in planner._calculate_single_rank_operations(rank) if a is not None]
        actions = [part for a in actions for part in a.sub_actions or (a,)]
        kinds = ["F" if a.computation_type == FORWARD else "B" for a in actions]
        flat.append([(kind, a.stage_index, a.microbatch_index) for kind, a in zip(kinds, actions, strict=True)])
    return flat


def one_forward_one_backward(rank, size, micro_batches):
    """Rank's actions in 1F1B: forwards until the first gradient can be back, then backward and forward in turn."""
    ahead = min(micro_batches, size - rank)
    actions = [("F", rank, m) for m in range(ahead)]
    for m in range(micro_batches):
        actions.append(("B", rank, m))
        if m + ahead < micro_batches:
            actions.append(("F", rank, m + ahead))
    return actions


def in_flight(actions):
    """The most forwards on one rank whose backward has not been: the stages' activations that it keeps at once."""
    open_now = most = 0
    for kind, _, _ in actions:
        open_now += 1 if kind == "F" else -1
        most = max(most, open_now)
    return most


def stages_of(rank, size, schedule):
    """The numbers of the stages on one rank of the pipeline."""
    return [rank] if schedule == "1f1b" else [rank, 2 * size - 1 - rank]


def sends(rank, size, schedule):
    """How often one rank sends a micro-batch's boundary to another: streams to the next stage, gradients back."""
    owner = {s: r for r in range(size) for s in stages_of(r, size, schedule)}
    return sum(owner.get(s + way, rank) != rank for s in stages_of(rank, size, schedule) for way in (-1, 1))


def balance(costs, head, stages):
    """Cut blocks into `stages` runs so that the dearest is as cheap as can be: -> a range of block numbers each.

    costs: FLOPs of each block; head: those of the output head, in the last stage. Blocks are taken greedily from the
    left under the lowest limit that leaves none over; what is then too long for the rest stays with the last.
    """

    def cut(limit):
        ranges, start = [], 0
        for s in range(stages):
            room, end = limit - (head if s == stages - 1 else 0), start
            # the last stages need no block each: only the limit decides
            while end < len(costs) and costs[end] <= room:
                room, end = room - costs[end], end + 1
            ranges.append(range(start, end))
            start = end
        return ranges if start == len(costs) else None

    runs = [sum(costs[i:j]) for i in range(len(costs)) for j in range(i, len(costs) + 1)]
    limits = {run + extra for run in runs for extra in (0, head)}
    return next(ranges for limit in sorted(limits) if limit >= head and (ranges := cut(limit)))


def block_flops(config):
    """Forward FLOPs of each block, and of the head, per token, but for a common factor: parameters a token meets, and
    attention's products over the sequence."""
    with torch.device("meta"):
        model = GPT(config)
    c, costs = config, []
    for block in model.layers:
        idle = 0
        if isinstance(block.mlp, MoE):
            idle = sum(p.numel() // len(p) * (len(p) - c.num_experts_per_tok) for p in block.mlp.experts.parameters())
        attention = c.seq_len * c.n_head * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
        costs.append(sum(p.numel() for p in block.parameters()) - idle + attention)
    return costs, model.lm_head.weight.numel()


def cut(config, size, schedule):
    """The range of blocks of every stage of a model of this GPTConfig."""
    return balance(*block_flops(config), size if schedule == "1f1b" else 2 * size)


class Stage(nn.Module):
    """One stage: shares its modules with the GPT, of which it runs a range of blocks, and the ends it has."""

    def __init__(self, model, blocks, first, last):
        super().__init__()
        self.range, self.first, self.last, self.look = blocks, first, last, None
        self.blocks = nn.ModuleList(model.layers[i] for i in blocks)
        if first:
            self.embed_tokens = model.embed_tokens
        if last:
            self.norm, self.lm_head, self.collapse_head = model.norm, model.lm_head, model.collapse_head
        self.model, self.autocast = [model], nullcontext  # in a list: not a part of this module
        self.lane = overlap.NoLane()

    def forward(self, x, carry=None):
        """idx (B, T) in the first stage, else streams (B, T, n, C), and the carry, if any -> the same for the next
        stage; from the last the final norm's output (B, T, C)."""
        (model,) = self.model
        with self.autocast():
            x = model.embed(x) if self.first else x
            positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)  # (1, T)
            sublayers = model.sublayers(positions, within=self.range)
            if torch.is_grad_enabled():
                sublayers = overlap.boundaries_beside(sublayers, self.lane)
            x, carry = model.run_sublayers(x, sublayers, self.look, carry)
            if self.last:
                return model.exit(x, carry)
        return x if carry is None else (x, carry)


class Pipeline:
    """The stages of this rank, and what runs them with those of the others. mesh: of the W ranks of one pipeline;
    overlaps: whether DualPipeV's pairs take turns, see overlap.py."""

    def __init__(self, model, mesh, schedule, device, overlaps=False):
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.schedule_name, self.device, self.schedule, self.model = schedule, device, None, model
        ranges = cut(model.config, self.size, schedule)
        self.n_stages = len(ranges)
        self.owner = [0] * self.n_stages
        for r in range(self.size):
            for s in stages_of(r, self.size, schedule):
                self.owner[s] = r
        mine = stages_of(self.rank, self.size, schedule)
        self.stages = {s: Stage(model, ranges[s], s == 0, s == self.n_stages - 1) for s in mine}
        self.turns = overlap.Turns() if overlaps else None
        cut_model(model, self.rank, self.size, schedule)
        model.forward, model.look = self.forward, self.look

    def set_autocast(self, autocast):
        """autocast(): the context of a forward. schedule.step runs backwards too, so it cannot stand around that."""
        for stage in self.stages.values():
            stage.autocast = autocast
        self.autocast = autocast

    # --- training: all micro-batches of a step at once ---

    def step(self, idx, targets, micro_batches):
        """idx, targets (B, T), to be cut into so many micro-batches -> the mean loss, on every rank; adds gradients."""
        if self.schedule is None:
            self.schedule = self.make_schedule(micro_batches, idx.shape[0] // micro_batches, idx.shape[1])
        losses = []
        self.schedule.step(
            *([idx] if 0 in self.stages else []),
            target=targets if self.n_stages - 1 in self.stages else None,
            losses=losses,
            return_outputs=False,
        )
        total = torch.stack([loss.detach() for loss in losses]).sum() if losses else torch.zeros((), device=self.device)
        return self.from_last(total)

    def make_schedule(self, micro_batches, B, T):
        """torch's schedule over this rank's stages. Shapes are told, not found out: that would run the model once, and
        count its tokens on the experts."""
        made = []
        for s, stage in self.stages.items():
            x = self.boundary(B, T)
            ins = (torch.empty(B, T, dtype=torch.long, device="meta"),) if stage.first else x
            out = (x[0][:, :, 0],) if stage.last else x
            made.append(PipelineStage(stage, s, self.n_stages, self.device, ins, out, group=self.group))

        def loss(h, targets):
            with self.autocast():
                return self.model.loss(h.flatten(0, 1), targets.flatten()) / micro_batches

        if self.schedule_name == "1f1b":
            return Schedule1F1B(made[0], micro_batches, loss, scale_grads=False)
        schedule = {"dualpipev": DualPipeV, "zbv": ZBV}[self.schedule_name](
            made, micro_batches, loss, scale_grads=False
        )
        if self.turns is not None:
            for stage in self.stages.values():
                stage.lane = overlap.lane(self.device)
            lanes = {s: stage.lane for s, stage in self.stages.items()}
            overlap.Overlap(schedule, dict(zip(self.stages, made, strict=True)), lanes, self.turns)
        return schedule

    def boundary(self, B, T):
        """What goes from stage to stage, without values: the streams, and the carry if there is one."""
        c = self.model.config
        dtype = torch.get_autocast_dtype(self.device.type) if self.is_autocast() else torch.float32
        x = torch.empty(B, T, c.n_streams, c.n_embd, dtype=dtype, device="meta")
        carry = RESIDUALS[c.residual].closed_carry(c, B, T)
        return tuple(t.requires_grad_() for t in (x, carry) if t is not None)  # gradients come back for them

    def is_autocast(self):
        with self.autocast():
            return torch.is_autocast_enabled(self.device.type)

    # --- evaluation: one batch after the other, through all stages ---

    @torch.no_grad()
    def forward(self, idx, targets=None, cache=None):
        """In GPT.forward's place, without gradients: every rank calls it, every rank gets the loss."""
        h = self.run(idx)
        loss = torch.zeros((), device=self.device)
        if h is not None:
            with self.autocast():
                loss = self.model.loss(h.flatten(0, 1), targets.flatten())
        self.reshard()
        return None, self.from_last(loss)

    def reshard(self):
        """Cut the stages' parameters again: without a backward nothing else would."""
        for stage in self.stages.values():
            if isinstance(stage, FSDPModule):
                stage.reshard()

    def run(self, idx):
        """idx (B, T) through the stages -> the final norm's output on the last one's rank, None elsewhere."""
        state = (idx,)
        for s in range(self.n_stages):
            if s not in self.stages:
                continue
            if s > 0 and self.owner[s - 1] != self.rank:
                state = tuple(torch.empty_like(t, device=self.device) for t in self.boundary(*idx.shape))
                for t in state:
                    dist.recv(t, group=self.group, group_src=self.owner[s - 1])
            out = self.stages[s](*state)
            state = out if isinstance(out, tuple) else (out,)
            if s < self.n_stages - 1 and self.owner[s + 1] != self.rank:
                for t in state:
                    dist.send(t.contiguous(), group=self.group, group_dst=self.owner[s + 1])
        return state[0] if self.n_stages - 1 in self.stages else None

    @torch.no_grad()
    def look(self, idx, see):
        """In GPT.look's place: the results of all 2L sublayers, on every rank, in host memory."""
        seen, training = [], self.model.training
        self.model.eval()
        for stage in self.stages.values():
            stage.look = lambda residual, x: seen.append(see(residual, x))
        self.run(idx)
        self.reshard()
        for stage in self.stages.values():
            stage.look = None
        self.model.train(training)
        return self.in_depth_order(tree_map_only(torch.Tensor, torch.Tensor.cpu, seen))

    # --- between the ranks of a pipeline ---

    def from_last(self, t):
        """The last stage's t, on every rank."""
        dist.broadcast(t, group=self.group, group_src=self.owner[-1])
        return t

    def in_depth_order(self, values):
        """A value for each sublayer here, in order -> those of all 2L sublayers, on every rank."""
        mine = {(i, k): values.pop(0) for i, _ in self.model.blocks() for k in (0, 1)}
        everyones = [None] * self.size
        dist.all_gather_object(everyones, mine, group=self.group)
        return [value for _, value in sorted((kv for found in everyones for kv in found.items()), key=lambda kv: kv[0])]


def cut_model(model, rank, size, schedule):
    """Leave a GPT on the meta device, in place, what one rank of a pipeline holds."""
    ranges, mine = cut(model.config, size, schedule), stages_of(rank, size, schedule)
    keep_only(model, [i for s in mine for i in ranges[s]], 0 in mine, len(ranges) - 1 in mine)


def keep_only(model, blocks, first, last):
    """Leave a GPT, in place, the blocks and ends of one rank; what it counted as a whole it goes on saying."""
    params, flops = model.num_params(), model.flops_per_token()
    model.num_params, model.flops_per_token = lambda: params, lambda: flops
    for i in range(len(model.layers)):
        if i not in blocks:
            model.layers[i] = None
    if not first:
        model.embed_tokens = None
    if not last:
        model.norm = model.lm_head = model.collapse_head = None


def check(config, s, world):
    """Raise ValueError, naming the rule, for a pipeline that cannot be; s: a run's settings."""
    size, schedule = s["pipeline_size"], s["pipeline_schedule"]
    if s["pipeline_overlap"] and (size == 1 or schedule != "dualpipev" or s["expert_size"] == 1):
        raise ValueError(
            f"pipeline_overlap=True: wanted pipeline_size and expert_size above 1 and pipeline_schedule='dualpipev', "
            f"whose pairs take turns while tokens are on their way to experts; got {size}, {s['expert_size']} and "
            f"{schedule!r}"
        )
    if size == 1:
        return
    if s["parallel"] != "fsdp" or s["shard_size"] or s["reduce_always"]:
        raise ValueError(
            f"pipeline_size={size}: wanted parallel='fsdp', shard_size=0 and reduce_always=False (gradients are "
            f"reduced once a step); got {s['parallel']!r}, {s['shard_size']} and {s['reduce_always']}"
        )
    if not s["micro_batch_size"]:
        raise ValueError(f"micro_batch_size=0: wanted a number with pipeline_size={size}, whose schedule it decides")
    if world % size:
        raise ValueError(f"pipeline_size={size} does not divide the {world} processes")
    stages = size if schedule == "1f1b" else 2 * size
    if stages > config.n_layer + 2:
        raise ValueError(f"pipeline_size={size}: {stages} stages for n_layer={config.n_layer} blocks and two ends")
    micro_batches = s["batch_size"] // (s["micro_batch_size"] * (world // size))
    if schedule == "dualpipev" and micro_batches < stages:
        raise ValueError(
            f"pipeline_schedule='dualpipev': wanted as many micro-batches in a step as stages, {stages}; there are "
            f"{micro_batches}: take a smaller micro_batch_size or a larger batch_size"
        )
