"""Expert parallelism: the routed experts of every mixture cut over the ranks of a group, their tokens sent to them.

    torchrun --nproc_per_node=8 train.py config/mhc_27b.py --parallel=fsdp --expert_size=8

P ranks of a group, as a rule the GPUs of one node, hold E/P experts each, whole; a token goes to where its experts are
and comes back, by an all-to-all each way. Against FSDP alone, which brings all experts to every token, a micro-batch
moves k copies of each token instead of E experts. No token is dropped, whatever the imbalance.

    rows by expert, from all E      ->  exchange  ->  rows by sender, for the E/P experts here
    -> regroup: rows by expert here ->  experts   ->  regroup and exchange back

The lengths of what is exchanged are known to the device alone, and an all-to-all wants them on the host: that is the
one wait for the device in a layer. The experts' parameters keep their names and are DTensors, cut on their first
dimension over the group and on their second, by FSDP2, over the ranks of other groups that hold the same experts
(parallel.py): checkpoint.py reads and writes them as it does any other.

Letters: P ranks in the group, E experts, k of them for each of N tokens, C width. Each rank has its own tokens.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from layers import Combine, Dispatch, MoE


def apply(model, mesh, on_the_wire=None):
    """Cut the experts of a GPT on the meta device over `mesh`, a one-dimensional device mesh of P ranks, in place.

    on_the_wire() is called whenever tokens have been sent, before they are waited for (overlap.py)."""
    for _, block in model.blocks():
        if not isinstance(block.mlp, MoE):
            continue
        for name, p in list(block.mlp.experts.named_parameters()):
            mine = torch.empty(len(p) // mesh.size(), *p.shape[1:], device=p.device, dtype=p.dtype)
            cut = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)
            setattr(block.mlp.experts, name, torch.nn.Parameter(cut))
        block.mlp.run_experts = partial(run_experts, block.mlp.experts, mesh.get_group(), on_the_wire)


@torch.compiler.disable  # lengths that the host is told would be compiled in, anew for every batch
def run_experts(experts, group, on_the_wire, x, ends):
    """What Experts.forward does, with the experts of all ranks: x (N*k, C) sorted by expert, ends (E,) -> (N*k, C)."""
    P = group.size()
    if torch.is_autocast_enabled(x.device.type):  # half the bytes on the wire: the experts compute in it anyway
        x = x.to(torch.get_autocast_dtype(x.device.type))
    leaving = ends.diff(prepend=ends.new_zeros(1)).view(P, -1)  # (P, E/P): rows for each expert of each rank
    arriving = torch.empty_like(leaving)  # (P, E/P): rows from each rank for each expert here
    dist.all_to_all_single(arriving, leaving.contiguous(), group=group)
    sent, received = torch.stack((leaving.sum(1), arriving.sum(1))).tolist()  # the layer's one wait for the device

    x = Exchange.apply(GradientTimes.apply(x, P), received, sent, group, on_the_wire)  # (M, C), by sender
    here = torch.arange(arriving.shape[1], device=x.device).repeat(P)
    here = here.repeat_interleave(arriving.flatten(), output_size=len(x))  # (M,): the expert of each row
    order = here.argsort(stable=True)
    slots = order.argsort()
    y = experts(Dispatch.apply(x, order, slots, 1), arriving.sum(0).cumsum(0).to(torch.int32))
    y = Combine.apply(y, order, slots, 1).squeeze(1)  # (M, C), by sender again
    return GradientTimes.apply(Exchange.apply(y, sent, received, group, on_the_wire), 1 / P)


def exchange(x, received, sent, group, on_the_wire):
    """Rows of x to every rank of the group, sent[r] of them to rank r in order, and theirs here: (M, C)."""
    x, out = x.contiguous(), x.new_empty(sum(received), x.shape[1])
    work = dist.all_to_all_single(out, x, received, sent, group=group, async_op=True)
    if on_the_wire is not None:
        on_the_wire()
    work.wait()
    return out


class Exchange(torch.autograd.Function):
    """exchange with a gradient, which goes the other way; torch's own waits in its backward as soon as it has sent."""

    @staticmethod
    def forward(ctx, x, received, sent, group, on_the_wire):
        ctx.back = sent, received, group, on_the_wire
        return exchange(x, received, sent, group, on_the_wire)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return exchange(g, *ctx.back), None, None, None, None


class GradientTimes(torch.autograd.Function):
    """The identity; the gradient is multiplied by a factor.

    A loss is the mean over its rank's own tokens, and FSDP takes the mean of the gradients over the ranks that hold the
    same experts. But these experts saw the tokens of P ranks: their gradient is P times too large. It is divided on the
    way to them and multiplied again behind them, so that the rest of the model sees nothing of it.
    """

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.factor, None


def check(config, expert_size, world, parallel, shard_size, node=0):
    """Raise ValueError, naming the rule, for a number of ranks that cannot share the experts of this GPTConfig.

    node: processes of a node (LOCAL_WORLD_SIZE); 0: not known."""
    P = expert_size
    if P == 1:
        return
    if parallel != "fsdp" or shard_size:
        raise ValueError(f"expert_size={P}: wanted parallel='fsdp' with shard_size=0, the experts' groups are its own; "
                         f"got parallel={parallel!r}, shard_size={shard_size}")  # fmt: skip
    if world % P:
        raise ValueError(f"expert_size={P} does not divide the {world} processes")
    if node % P:
        raise ValueError(f"expert_size={P}: wanted a divisor of the {node} processes of a node: tokens go to experts "
                         "and back in every layer, which is for the links inside a node")  # fmt: skip
    if not config.has_moe or config.n_routed_experts % P:
        raise ValueError(f"expert_size={P} does not divide n_routed_experts={config.n_routed_experts}, which it cuts")
    for name in ("moe_intermediate_size", "n_embd"):
        if (width := getattr(config, name)) % (world // P):
            raise ValueError(f"expert_size={P}: the {world // P} ranks that hold the same experts cut {name} between "
                             f"them, and {width} is no multiple of {world // P}")  # fmt: skip
