"""Many processes: DDP, FSDP2 and hybrid sharding, all of them PyTorch's own; the loop in train.py is the same for one.

    python train.py                                                              # one process
    torchrun --standalone --nproc_per_node=8 train.py --parallel=fsdp            # one node of 8
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=$HOST:29500 \\
        train.py --parallel=fsdp --shard_size=8                                  # 4 nodes; scripts/train.slurm does it

    parallel   parameters, gradients, optimizer state           setting shard_size
    'none'     whole, one process                               -
    'ddp'      whole on every process                           -
    'fsdp'     cut over all processes                           0
    'fsdp'     cut over shard_size processes, and the groups    a divisor of the number of processes, as a rule those
               of shard_size are copies of each other (HSDP)    of one node, so that the all-gathers stay inside it

The groups of FSDP2, each gathered whole when it is run and cut again after:
    every F (an attention, an FFN)   in bf16 when dtype is bfloat16; the shards, gradients and optimizer are fp32
    the embedding                    as F
    the root: all the rest           fp32: phi, alpha, b of the mappings (Eq 10-13: never rounded), norms, the final
                                     head, and gates: which expert is picked must not depend on bf16 rounding
The mappings, norms and gates of all sublayers are gathered together, once a forward, and stay until the end of its
backward: they are small (80 MB for the 27B model), and recompute.py runs them in the backward without running F. The
head is in the root because the loss calls it once a chunk, and as a group of its own it would be gathered and reduced
each time.
"""

import math
import os
import sys
import warnings
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import program
from configurator import fail

PARALLEL = ("none", "ddp", "fsdp")


def resolve_device(device):
    """'auto' -> the best device there is; a device that is not there ends the program."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in found.items() if there)
    if not found[device]:
        fail(f"device={device!r}: torch finds none here; wanted one of {[k for k, there in found.items() if there]}")
    return device


def start(parallel="none", device="cpu", shard_size=0, rank_timeout=600, expert_size=1, pipeline_size=1):
    """This process among all of the run, as torchrun's environment describes them; without torchrun it is alone.

    device: 'cpu' | 'cuda' | 'mps'. rank_timeout: seconds after which a process that does not answer ends the run.
    Use as `with start(...) as ranks:`. Raises ValueError for a layout that cannot be, naming the rule.
    """
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rank, world, local_rank = (int(os.environ.get(name, value)) for name, value in alone.items())
    check_layout(parallel, world, shard_size)
    if device == "mps" and parallel != "none":
        raise ValueError(f"parallel={parallel!r} on device='mps': torch has no communication there; wanted 'none'")
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node: wanted at most {torch.cuda.device_count()}, one process a GPU")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    if "RANK" in os.environ or parallel == "fsdp":
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        timeout = timedelta(seconds=rank_timeout)
        # device_id: NCCL connects now and not in the first collective, and a wrong device is an error here
        bound = {"device_id": torch.device(device)} if device.startswith("cuda") else {}
        dist.init_process_group(backend, timeout=timeout, **bound, **meeting_point(rank, world, timeout))
    return Ranks(parallel, rank, world, torch.device(device), shard_size, rank_timeout, expert_size, pipeline_size)


def meeting_point(rank, world, timeout):
    """The store in which the processes find each other, as arguments of init_process_group.

    torchrun --max-restarts keeps one store for all attempts, and in torch 2.13 a restarted process finds the addresses
    of dead ones there, and waits for them until rank_timeout. So every attempt gets keys of its own. Agents of several
    nodes may count attempts differently: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun open a new store.
    """
    env = os.environ
    if "RANK" not in env:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env["LOCAL_WORLD_SIZE"] != env["WORLD_SIZE"]:
        return {}
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world, is_master=False, timeout=timeout)
    store = dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": store, "rank": rank, "world_size": world}


def only_rank_0_prints():
    """Silence the other processes' standard output; errors, which go to standard error, come from each."""
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")


class Ranks:
    """The processes of a run, seen from one of them.

    .rank, .world   number of this process, and how many there are
    .part, .parts   number of this one's share of each batch, and how many shares: in a pipeline several have the same
    .device         the torch.device of this one
    .is_main        whether this is the one that prints and writes
    """

    def __init__(self, parallel, rank, world, device, shard_size, rank_timeout, expert_size=1, pipeline_size=1):
        self.parallel, self.rank, self.world, self.device = parallel, rank, world, device
        self.is_main, self.rank_timeout = rank == 0, rank_timeout
        self.shard_size = (shard_size or world) if parallel == "fsdp" else 1
        if parallel == "fsdp":
            self.mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
            if self.shard_size < world:
                shape = (world // self.shard_size, self.shard_size)
                self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        self.experts = self.pipe = self.pipeline = None
        self.part, self.parts, self.alike = rank, world, None  # alike: the group that holds the same blocks, None: all
        if expert_size > 1 or pipeline_size > 1:
            data = world // (pipeline_size * expert_size)
            names, shape = ("pipe", "data", "expert"), (pipeline_size, data, expert_size)
            mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
            self.experts = mesh["data", "expert"] if expert_size > 1 else None  # the mesh of the experts
            self.mesh = mesh["data", "expert"]._flatten("all")  # all the rest is cut over both dimensions
            self.part, self.parts, self.alike = self.mesh.get_local_rank(), self.mesh.size(), self.mesh.get_group()
            self.pipe = mesh["pipe"] if pipeline_size > 1 else None
        for mesh in (self.mesh if parallel == "fsdp" else None, self.experts, self.pipe):
            if mesh is not None:
                limit_waiting(mesh, rank_timeout)

    def __str__(self):
        if self.world == 1:
            return f"one process, parallel {self.parallel}"
        how = f"{self.parallel}, {self.world // self.shard_size} copies of {self.shard_size} shards"
        return (
            f"{self.world} processes, parallel {how if self.parallel == 'fsdp' else self.parallel}; "
            f"one that does not answer for rank_timeout={self.rank_timeout} s ends the run"
        )

    # --- the model ---

    def build_pipeline(self, model, schedule, autocast, overlaps=False):
        """Leave of a GPT on the meta device the stages of this process. autocast(): the context of a forward.
        overlaps: see overlap.py."""
        if self.pipe is not None:
            import pipeline  # here: sample.py and eval.py need none of torch's pipelining

            self.pipeline = pipeline.Pipeline(model, self.pipe, schedule, self.device, overlaps)
            self.pipeline.set_autocast(autocast)

    def shard(self, model, dtype="float32", reduce_dtype="float32", recompute="none"):
        """FSDP2 over a GPT, in place, still without values (on the meta device, so that it is never whole anywhere).
        Nothing for the other layouts. dtype: 'bfloat16' gathers the sublayers in bf16. reduce_dtype: 'bfloat16' sends
        their gradients in it, and adds up in it those of micro-batches that are not exchanged one by one. recompute:
        as of recompute.apply."""
        if self.parallel != "fsdp":
            return
        # inputs are not cast: the streams have the right dtype, and positions and angles must keep theirs
        wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        gathered = torch.bfloat16 if dtype == "bfloat16" else None
        narrow = MixedPrecisionPolicy(gathered, getattr(torch, reduce_dtype), cast_forward_inputs=False)
        # FSDP warns that writing into the view which an F returns would cost its hooks: nothing here writes into it
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        if self.experts is not None:
            import expert_parallel  # here, as pipeline above

            expert_parallel.apply(model, self.experts["expert"], self.pipeline and self.pipeline.turns)
            for _, block in model.blocks():
                if hasattr(block.mlp, "experts"):  # on their second dimension: the first is cut over "expert"
                    mesh = self.experts["data"]
                    fully_shard(block.mlp.experts, mesh=mesh, mp_policy=narrow, shard_placement_fn=lambda p: Shard(1))
        roots = self.pipeline.stages.values() if self.pipeline else [model]
        inner = groups(model)
        # roots first: what is in a group already, a group around it would not see, and a gate is inside an F
        for root in roots:
            fully_shard(
                root, mesh=self.mesh, mp_policy=wide, ignored_params=parameters(inner) - parameters(model.gates())
            )
        for module in inner:
            fully_shard(module, mesh=self.mesh, mp_policy=narrow, ignored_params=parameters(model.gates()))
        if not self.pipeline:  # whose stages are gathered for a whole step, and at once
            if recompute != "full":  # the replay of an F would send for what is behind it, which the backward has done
                prefetch(model)
            cut_again_without_backward(model)

    def initialise(self, model, seed=None):
        """Memory on this process's device for a GPT from the meta device, and its first values if there is a seed.

        Every value is drawn whole on the host, one parameter at a time, and this process keeps its shard: the weights
        of one process exactly, whatever the layout."""
        model.to_empty(device=self.device)
        for gate in model.gates():
            gate.load.zero_()  # a count, in no checkpoint
        if seed is not None:
            model.init_weights(seed, assign)

    def wrap(self, model):
        """What the loop calls in the model's place: DDP's module; the model itself for the other layouts."""
        if self.parallel != "ddp" or self.world == 1:
            return model
        # buffers are not broadcast: each process counts its own tokens on the experts, and all_sum adds them up
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)

    # --- a step ---

    def synchronise(self, net, last, every=False):
        """Called before each micro-batch's forward. Gradients are exchanged with the last micro-batch alone; until
        then each process adds up its own, whole. With `every` they are exchanged each time: that moves more, and FSDP
        then keeps only shards; under HSDP the copies still meet in the last one alone."""
        if self.parallel == "fsdp":
            net.set_requires_gradient_sync(last or every)
            net.set_requires_all_reduce(last)
            net.set_is_last_backward(last)
        elif isinstance(net, DistributedDataParallel):
            net.require_backward_grad_sync = last or every

    def share(self, ids, micro_batch_size):
        """This process's part of a batch's sequence numbers: (batch_size,) -> (micro-batches, micro_batch_size).
        The batch is the same whatever the number of processes; check_batch says what divides evenly."""
        return ids.reshape(-1, self.parts, micro_batch_size)[:, self.part]

    def all_sum(self, t):
        """t summed over the shares of the batch, in place; returns it."""
        if self.parts > 1:
            dist.all_reduce(t, group=self.alike)
        return t

    def all_most(self, value):
        """The largest of the stages' values of a float or None."""
        if self.pipe is None:
            return value
        t = torch.tensor(-math.inf if value is None else value, device=self.device)
        dist.all_reduce(t, dist.ReduceOp.MAX, group=self.pipe.get_group())
        return None if t.isneginf() else t.item()

    def in_depth_order(self, values):
        """A value for each sublayer here -> those of all 2L sublayers, in order."""
        return self.pipeline.in_depth_order(list(values)) if self.pipeline else values

    def clip_grad_norm(self, model, max_norm):
        """Scale the gradients to a norm of at most max_norm; 0: leave them. -> their norm before, over all shards."""
        lists = by_mesh(p for p in model.parameters() if p.grad is not None)
        norms = [torch.nn.utils.get_total_norm([p.grad for p in ps]) for ps in lists]
        norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
        if self.pipe is not None:
            norm = norm.square()
            dist.all_reduce(norm, group=self.pipe.get_group())
            norm = norm.sqrt()
        for ps in lists:
            torch.nn.utils.clip_grads_with_norm_(ps, max_norm or math.inf, norm)
        return norm.item()

    def barrier(self):
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    # --- the end ---

    def stop(self):
        """Leave together: a process that goes while another still talks to it has been seen to abort the other."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def __enter__(self):
        if self.is_main:
            print(self)
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None or kind is SystemExit and not error.code:
            self.stop()
        elif self.world > 1 and is_about_another_process(error):
            said = (str(error).strip() or kind.__name__).splitlines()[0]
            program.end(
                f"error: rank {self.rank}: another process is gone, or did not answer within rank_timeout="
                f"{self.rank_timeout} s: look for its own error, or raise rank_timeout if it was slow ({said})",
                1,
            )


def is_about_another_process(error):
    """Whether an exception is a collective's that was let down by another process: gloo has no type of its own."""
    said = str(error)
    words = ("Timed out", "timed out", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and any(w in said for w in words)


def limit_waiting(mesh, rank_timeout):
    """The groups that a device mesh makes for its dimensions have torch's own timeout of 30 minutes, whatever
    init_process_group was told: give them the run's."""
    for group in mesh.get_all_groups():
        _set_pg_timeout(timedelta(seconds=rank_timeout), group)


def groups(model):
    """The modules that are FSDP2's groups, without their gates. The rest is the root's: the model's, or a stage's."""
    found = [] if model.embed_tokens is None else [model.embed_tokens]
    return [*found, *(f for _, block in model.blocks() for f in (block.self_attn, block.mlp))]


def parameters(modules):
    return {p for module in modules for p in module.parameters()}


def prefetch(model):
    """Let the weights of the next sublayer be on their way while one is at work, forward and backward.

    FSDP2 asks for a group's weights when the host comes to it: too late where the host waits for the device in between,
    as in every exchange of tokens. In a backward it asks for one group ahead. But under expert_size an FFN is two, and
    the second, the routed experts, which are most of the model, it would ask for when the FFN has begun."""
    sublayers = [[model.embed_tokens]]
    for _, block in model.blocks():
        experts = [m for m in block.mlp.children() if isinstance(m, FSDPModule)]
        sublayers += [[block.self_attn], [block.mlp, *experts]]
    for here, after in pairwise(sublayers):
        here[0].set_modules_to_forward_prefetch(after)
    for before, here in pairwise(sublayers[1:]):
        here[0].set_modules_to_backward_prefetch([*here[1:], *before])


def by_mesh(parameters):
    """The parameters in lists, one for each device mesh they lie on: no operation takes DTensors of several meshes."""
    lists = {}
    for p in parameters:
        lists.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    return list(lists.values())


def assign(p, value):
    """Put a whole host tensor into parameter p, which may be a DTensor: each process cuts out its own shard."""
    if isinstance(p, DTensor):
        # src_data_rank=None: nothing is sent, for every process has drawn the same value
        value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    p.copy_(value)


def cut_again_without_backward(model):
    """Without a backward nothing would cut the root's parameters again, and until then the model would show whole ones
    without gradients in place of the shards that the optimizer has."""
    model.register_forward_hook(lambda model, *_: None if torch.is_grad_enabled() else model.reshard())
    register_fsdp_forward_method(model, "look")
    look = model.look

    def look_and_reshard(*args):
        seen = look(*args)
        model.reshard()
        return seen

    model.look = look_and_reshard


# -- what cannot be -------------------------------------------------------------------------------------------------


def check_layout(parallel, world, shard_size):
    """Raise ValueError, naming the rule broken, for a layout that cannot be."""
    if parallel not in PARALLEL:
        raise ValueError(f"parallel={parallel!r}: wanted one of {', '.join(map(repr, PARALLEL))}")
    if parallel == "none" and world > 1:
        raise ValueError(f"parallel='none' in {world} processes: they would all train alone; wanted 'ddp' or 'fsdp'")
    if shard_size and parallel != "fsdp":
        raise ValueError(f"shard_size={shard_size} with parallel={parallel!r}: only 'fsdp' shards; wanted 0")
    if shard_size and world % shard_size:
        raise ValueError(f"shard_size={shard_size} does not divide the {world} processes; {nearest(shard_size, world)}")


def check_batch(batch_size, micro_batch_size, world):
    """Raise ValueError, with the nearest that are, unless a step is a whole number of micro-batches on each process."""
    if batch_size % (micro_batch_size * world) == 0:
        return
    unit = micro_batch_size * world
    low = batch_size // unit * unit
    ways = [f"batch_size={' or '.join(str(b) for b in (low, low + unit) if b)}"]
    if batch_size % world == 0:
        ways.append(f"micro_batch_size={nearest_divisor(micro_batch_size, batch_size // world)}")
    if batch_size % micro_batch_size == 0 and world > 1:
        fewer = nearest_divisor(world, batch_size // micro_batch_size)
        ways.append(f"{fewer} process{'es' if fewer > 1 else ''}")
    raise ValueError(
        f"batch_size={batch_size} is not a multiple of micro_batch_size={micro_batch_size} x {world} process"
        f"{'es' if world > 1 else ''}; the nearest that fit: {', or '.join(ways)}"
    )


def nearest_divisor(value, of):
    """The divisor of `of` nearest to value."""
    small = [d for d in range(1, math.isqrt(of) + 1) if of % d == 0]
    return min(sorted({*small, *(of // d for d in small)}), key=lambda d: abs(d - value))


def nearest(value, of):
    return f"the nearest that does is {nearest_divisor(value, of)}"
