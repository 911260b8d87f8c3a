"""What a run would take, estimated before anything is allocated: parameters, memory, communication, days.

    python train.py config/mhc_27b.py --dry_run=True
    python train.py config/mhc_27b.py --dry_run=True --plan_devices=64 --shard_size=8 --recompute=none
    python train.py config/mhc_3b.py --dry_run=True --plan_devices=8 --plan_device=A100 --plan_mfu=0.35

The parameters are counted on the model itself, built on the meta device. Memory and communication are derived from what
parallel.py and recompute.py do; tests hold the activations against a run measured by LiveBytes and the communication
against the bytes of the collectives themselves. All of it on CPUs: no figure here has been compared with a GPU's.

A fork that changes attention or the FFN changes, beside the model itself: attention_bytes, mlp_bytes or moe_bytes (what
that F keeps for the backward, per token; tests/test_plan.py says whether it is right), sublayer_bytes if blocks are no
longer one attention and one FFN, GPT.flops_per_token (its attention term is counted by hand), and parallel.groups if
there are other parts to gather. Without, memory, days and MFU are wrong in silence; parameters are counted anyway.

Letters as in model.py; S shard_size, W processes, A micro-batches a step, L sublayers, N tokens of a micro-batch.
"""

import math
import os
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import expert_parallel
import layers
import pipeline
import program
from mhc_gpu import STREAMS
from model import GPT, MHC, RESIDUALS, projection_bytes
from parallel import check_batch, check_layout, groups, parameters
from recompute import best_block, block_cost, block_length
from sinkhorn_kernel import blocks as kernel_blocks
from sinkhorn_kernel import channel_tiles

MEMORY = {"B200": 180e9, "H200": 141e9, "H100": 80e9, "A100": 80e9, "MI300X": 192e9}  # bytes, from the makers
BANDWIDTH = {"B200": 8e12, "H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "MI300X": 5.3e12}  # bytes/s, likewise
COPIES_OF_LOGITS = 3  # of one chunk in the loss: as they come, in fp32, and their gradient


def peak_flops(device_name):
    """Dense bf16 FLOP/s of a GPU by its name, from the makers' data sheets; None for what is not listed."""
    for key, peak in (("B200", 2.25e15), ("H200", 989e12), ("H100", 989e12), ("A100", 312e12), ("MI300X", 1307e12)):
        if key in device_name:
            return peak
    return None


# -- activations ----------------------------------------------------------------------------------------------------


def attention_bytes(c, e):
    """What MLA keeps for the backward per token, without its input z; e: bytes of an activation."""
    H, head = c.n_head, c.qk_nope_head_dim + c.qk_rope_head_dim
    q, k, kv = H * head, H * head, H * (c.qk_nope_head_dim + c.v_head_dim)  # v is a view into kv
    kept = e * (q + k + kv + H * c.v_head_dim) + 4 * H  # the output, and the log-sum-exp of each row
    ranks = (c.kv_lora_rank, c.q_lora_rank) if c.q_lora_rank else (c.kv_lora_rank,)
    return kept + sum((8 + e) * r + 4 for r in ranks)  # each has a norm: its input and product in fp32, its output


def mlp_bytes(hidden, e):
    """SwiGLU: both projections, silu of one, the product."""
    return 4 * e * hidden


def moe_bytes(c, e):
    """Gate, the k copies of each token sorted by expert, their SwiGLUs, their outputs, the shared experts."""
    k, C = c.num_experts_per_tok, c.n_embd
    gate = 4 * c.n_routed_experts + 4 + 32 * k + (4 * C if e == 2 else 0)  # fp32: a wider copy of bf16 input
    routed = 2 * k * e * C + k * mlp_bytes(c.moe_intermediate_size, e)
    return gate + routed + mlp_bytes(c.n_shared_experts * c.moe_intermediate_size, e)


def norm_bytes(c, e):
    """RMSNorm and F's input z: the norm's input and its product in fp32, z."""
    return 8 * c.n_embd + 4 + e * c.n_embd


def sublayer_bytes(c, e):
    """Per sublayer, what F keeps without z: 2 n_layer numbers."""
    dense, moe = mlp_bytes(c.intermediate_size, e), moe_bytes(c, e) if c.has_moe else 0
    return [v for i in range(c.n_layer) for v in (attention_bytes(c, e), dense if i < c.first_k_dense_replace else moe)]


def shares_bytes(c, e, tokens):
    """What the Triton kernels' sums over the channels take beyond one share of them, per token: with few tokens several
    programs share the channels, and each share stays until the backward (sinkhorn_kernel.channel_tiles)."""
    n, C = c.n_streams, c.n_embd
    summed = issubclass(RESIDUALS[c.residual], MHC) and c.manifold == "sinkhorn"
    if not summed or c.impl not in ("auto", "triton") or n not in STREAMS:
        return 0
    BT, BC, _ = kernel_blocks("streams", n, C, torch.bfloat16 if e == 2 else torch.float32)
    _, shares = channel_tiles(tokens, BT, C, BC)
    return (shares - 1) * projection_bytes(n, n * n)


def activation_bytes(c, recompute, block, e, blocks=None, tokens=2**20):
    """Per token: (kept for the backward, the most a replay adds to it). block: sublayers in a segment; blocks: numbers
    of the transformer blocks that are there, all by default; tokens: of a micro-batch, if they are few."""
    blocks = range(c.n_layer) if blocks is None else blocks
    F, L = [b for i in blocks for b in sublayer_bytes(c, e)[2 * i : 2 * i + 2]], 2 * len(blocks)
    boundary = RESIDUALS[c.residual].kept_bytes(c, e) + shares_bytes(c, e, tokens) + norm_bytes(c, e)
    start = e * c.n_streams * c.n_embd
    ends = 8 * c.n_embd + e * c.n_embd  # the final norm, what the head reads
    if (carry := RESIDUALS[c.residual].closed_carry(c, 1, 1)) is not None:
        start += carry.nbytes
        ends += start  # the streams that it reads at the end
    starts = start * math.ceil(L / block)
    if recompute == "none":
        return sum(F) + boundary * L + ends, 0
    if recompute == "mhc":
        there = e * c.n_embd  # F's outputs are not made again
        return sum(F) + there * L + starts + ends, (boundary - there) * block
    return starts + ends, max((sum(F[i : i + block]) + boundary * block for i in range(0, L, block)), default=0)


# -- memory and communication ---------------------------------------------------------------------------------------


def group_sizes(model, without=()):
    """(parameters, whether in bf16) of each of FSDP2's groups, the root last; without the parameters in `without`."""
    apart = {id(p) for p in [*without, *parameters(model.gates())]}
    sizes = [sum(p.numel() for p in module.parameters() if id(p) not in apart) for module in groups(model)]
    rest = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in without) - sum(sizes)
    return [*((size, True) for size in sizes), (rest, False)]


def cut_experts(model, s):
    """The experts' parameters that expert_parallel.py cuts; none without it."""
    return [p for _, b in model.blocks() if hasattr(b.mlp, "experts") for p in b.mlp.experts.parameters()
            if s["expert_size"] > 1]  # fmt: skip


def of_rank(config, s, rank=0):
    """(the GPT on the meta device with what is of one rank of its pipeline: all, without one; micro-batches whose
    activations it keeps at once)."""
    with torch.device("meta"):
        model = GPT(config)
    size, schedule = s["pipeline_size"], s["pipeline_schedule"]
    if size == 1:
        return model, 1
    pipeline.cut_model(model, rank, size, schedule)
    micro_batches = s["batch_size"] // (s["micro_batch_size"] * (s["world"] // size))
    held = pipeline.in_flight(pipeline.order(schedule, size, micro_batches)[rank])
    return model, held / len(pipeline.stages_of(rank, size, schedule))


def memory(model, s, world, block, held=1):
    """{what: bytes} on one device. s: the run's settings; model and held: of one rank of a pipeline, see of_rank, and
    world then the ranks that have the same."""
    c, e = model.config, 2 if s["dtype"] == "bfloat16" else 4
    P = sum(p.numel() for p in model.parameters())
    S = (s["shard_size"] or world) if s["parallel"] == "fsdp" else 1
    N = s["micro_batch_size"] * s["seq_len"]
    micro_batches = s["batch_size"] // (s["micro_batch_size"] * world)
    experts = cut_experts(model, s)
    sizes = group_sizes(model, experts)
    if experts:  # three weights a mixture
        sizes.insert(0, (sum(p.numel() for p in experts[:3]) // s["expert_size"], True))
    parts = {"weights (fp32)": 4 * P // S, "gradients (fp32)": 4 * P // S, "AdamW's moments (fp32)": 8 * P // S}
    if s["parallel"] == "fsdp":
        largest = max(size for size, _ in sizes[:-1])
        # the root stays for the step; of the others, one is used while the next arrives, and one is being reduced
        parts["weights gathered"] = 4 * sizes[-1][0] + 2 * e * largest
        r = 2 if s["reduce_dtype"] == "bfloat16" else 4
        parts["gradients on their way"] = max((e + r) * largest, 2 * 4 * sizes[-1][0])
        if s["pipeline_size"] > 1:  # the stages', all step
            parts["weights gathered"] = sum(size * (e if narrow else 4) for size, narrow in sizes)
        if micro_batches > 1 and not s["reduce_always"]:
            here = P - sum(p.numel() for p in experts) * (s["expert_size"] - 1) // s["expert_size"]
            wide = sum(size for size, narrow in sizes if not narrow)
            parts["whole gradients between micro-batches (reduce_always=False)"] = r * (here - wide) + 4 * wide
    elif e == 2:
        parts["weights in bf16 (autocast)"] = 2 * sum(size for size, narrow in sizes[1:] if narrow)
    kept, replay = activation_bytes(c, s["recompute"], block, e, [i for i, _ in model.blocks()], N)
    parts["activations kept"], parts["activations replayed"] = N * kept * held, N * replay
    if experts:  # of the layer at work: as sent, received, by expert, back; as many received as sent
        parts["tokens on their way to experts and back"] = 4 * e * N * c.num_experts_per_tok * c.n_embd
    parts["gradients of the streams"] = 3 * N * e * c.n_streams * c.n_embd
    rows = min(N, max(1, layers.LOGITS_AT_ONCE // c.vocab_size))
    if model.lm_head is not None:
        parts["logits"] = COPIES_OF_LOGITS * 4 * rows * c.vocab_size
        parts["gradient of the head, made with its logits"] = 4 * c.n_embd * c.vocab_size
        if e == 2:
            parts["the head's weight in bf16"] = 2 * c.n_embd * c.vocab_size
    return {name: int(value) for name, value in parts.items()}


def communication(model, s, world, rank=0):
    """{what: bytes that one rank sends in a step}, by ring algorithms: gather and reduce-scatter move (S-1)/S of the
    whole, all-reduce twice that. model, world: as in memory; rank: in its pipeline."""
    c, e = model.config, 2 if s["dtype"] == "bfloat16" else 4
    micro_batches = s["batch_size"] // (s["micro_batch_size"] * world)
    P = sum(p.numel() for p in model.parameters())
    if s["parallel"] == "ddp":
        times = micro_batches if s["reduce_always"] else 1
        return {"all-reduce of gradients": int(2 * (world - 1) / world * 4 * P * times)}
    if s["parallel"] == "none":
        return {}
    S = s["shard_size"] or world
    experts = cut_experts(model, s)
    *inner, (root, _) = group_sizes(model, experts)
    E, r = sum(p.numel() for p in experts), 2 if s["reduce_dtype"] == "bfloat16" else 4
    reduced = sum(size * (r if narrow else 4) for size, narrow in inner) + 4 * root
    # once for the forward and once for the backward, which has what a replay of F needs; the root stays in between
    gathered = (2 * sum(size * (e if narrow else 4) for size, narrow in inner) + 4 * root) * micro_batches
    if s["pipeline_size"] > 1:  # a stage stays whole for the step
        gathered = sum(size * (e if narrow else 4) for size, narrow in inner) + 4 * root
    share = (S - 1) / S
    moved = {
        "all-gather of weights": int(share * gathered),
        "reduce-scatter of gradients": int(share * reduced * (micro_batches if s["reduce_always"] else 1)),
    }
    if experts:  # the shares of expert_size ranks, each gathered and reduced over the ranks that hold the same
        of_rank, D = E // s["expert_size"], world // s["expert_size"]
        share = (D - 1) / D * micro_batches
        times = 1 if s["pipeline_size"] > 1 else 2 * micro_batches
        moved["all-gather of experts"] = int((D - 1) / D * times * e * of_rank)
        moved["reduce-scatter of experts"] = int((share if s["reduce_always"] else (D - 1) / D) * r * of_rank)
        tokens = s["micro_batch_size"] * s["seq_len"] * micro_batches
        ways = 6 if s["recompute"] == "full" else 4  # there and back, forward and backward; and in the replay
        one_way = tokens * c.num_experts_per_tok * c.n_embd * e * (s["expert_size"] - 1) / s["expert_size"]
        moved["all-to-all of tokens"] = int(ways * one_way * len(model.gates()))
    if s["pipeline_size"] > 1:  # streams forward and their gradient back, and the carry's
        tokens = s["micro_batch_size"] * s["seq_len"] * micro_batches
        carry = RESIDUALS[c.residual].closed_carry(c, 1, 1)
        of_token = c.n_streams * c.n_embd * e + (0 if carry is None else carry.nbytes)
        moved["streams between stages"] = (
            pipeline.sends(rank, s["pipeline_size"], s["pipeline_schedule"]) * tokens * of_token
        )
    if S < world:
        copies = world // S
        moved["all-reduce between copies"] = int(2 * (copies - 1) / copies * reduced / S)
    return moved


# -- the report -----------------------------------------------------------------------------------------------------


def report(config, s):
    """Print what the run with settings s would take. Raises ValueError, naming the rule, for one that cannot be."""
    world = s["plan_devices"] or int(os.environ.get("WORLD_SIZE", 1))
    check_layout(s["parallel"], world, s["shard_size"])
    if s["plan_device"] not in MEMORY:
        raise ValueError(f"plan_device={s['plan_device']!r}: wanted one of {', '.join(MEMORY)}")
    pipeline.check(config, s, world)
    alike = world // s["pipeline_size"]  # ranks that hold the same stages
    expert_parallel.check(config, s["expert_size"], alike, s["parallel"], s["shard_size"])
    check_batch(s["batch_size"], s["micro_batch_size"] or 1, alike)
    with torch.device("meta"):
        model = GPT(config)
    if not s["micro_batch_size"]:
        s = s | {"micro_batch_size": largest_micro_batch(model, s, alike, MEMORY[s["plan_device"]])}
        print(f"micro_batch_size={s['micro_batch_size']}, the largest that fits")
    params, flops = model.num_params(), model.flops_per_token()
    block = block_length(config, s["recompute"], s["recompute_block"])
    for name, value in params.items():
        print(f"params_{name}={value}")
    print(f"flops_per_token={flops}")
    tokens, L = s["max_steps"] * s["batch_size"] * s["seq_len"], 2 * config.n_layer
    peak = peak_flops(s["plan_device"])
    days = flops * tokens / (peak * s["plan_mfu"] * world) / 86400
    print(f"steps={s['max_steps']}  tokens={tokens}  ({tokens / 1e9:.1f}B)")
    print(f"days={days:.1f} on {world} x {s['plan_device']} at plan_mfu={s['plan_mfu']} of {peak / 1e12:.0f} TFLOP/s")
    if RESIDUALS[config.residual].has_maps:
        mhc = issubclass(RESIDUALS[config.residual], MHC)
        first = f"manifold={config.manifold!r}, maps_init={config.maps_init!r}, " if mhc else ""
        first += "single-pass, " if config.single_pass else ""
        print(
            f"maps: {first}LR of alpha and b {s['lr'] * s['maps_lr_scale']:.3g} (maps_lr_scale={s['maps_lr_scale']:g})"
        )
    best = best_block(L, config.n_streams)
    print(f"L_r*={best} of {L} sublayers (Eq 20: {block_cost(L, best, config.n_streams)} C a token); "
          f"recompute={s['recompute']!r}, segments of {block}")  # fmt: skip
    if s.get("fp8"):
        print("fp8=True: days, memory and what is sent are reckoned as in bf16")
    if s.get("head_loss", "chunked") != "chunked":
        print(f"head_loss={s['head_loss']!r}: memory is reckoned as with 'chunked'")
    copies = world // (s["shard_size"] or world) if s["parallel"] == "fsdp" else world
    shared = f", experts of a layer over {s['expert_size']}" if s["expert_size"] > 1 else ""
    print(f"layout: {world} devices, parallel={s['parallel']!r}, {copies} copies of the weights{shared}")
    print_stages(config, s)
    of_ranks = [of_rank(config, s | {"world": world}, rank) for rank in range(s["pipeline_size"])]
    most = max(
        (memory(model, s, alike, block, held) for model, held in of_ranks), key=lambda parts: sum(parts.values())
    )
    print_bytes("memory per device", most, MEMORY[s["plan_device"]])
    sent = [communication(model, s, alike, rank) for rank, (model, _) in enumerate(of_ranks)]
    most = max(sent, key=lambda parts: sum(parts.values()))
    print_bytes("sent by each rank in a step", most)
    if most:
        print(f"  most of it: {max(most, key=most.get)}")


def print_stages(config, s):
    """The blocks and the share of the FLOPs of each stage of a pipeline."""
    if s["pipeline_size"] == 1:
        return
    costs, head = pipeline.block_flops(config)
    ranges = pipeline.cut(config, s["pipeline_size"], s["pipeline_schedule"])
    flops = [sum(costs[i] for i in r) + (head if r is ranges[-1] else 0) for r in ranges]
    shares = " ".join(f"{len(r)}:{100 * f / sum(flops):.1f}%" for r, f in zip(ranges, flops, strict=True))
    print(f"{s['pipeline_schedule']}, {len(ranges)} stages, blocks:share of the FLOPs: {shares}")


def print_bytes(title, parts, limit=None):
    total = sum(parts.values())
    print(f"{title}: {total / 1e9:.2f} GB" + ("" if limit is None else
          f", {'fits in' if total <= limit else 'DOES NOT FIT in'} {limit / 1e9:.0f} GB"))  # fmt: skip
    for name, value in parts.items():
        print(f"  {value / 1e9:10.3f} GB  {name}")


def device_memory(device):
    """Bytes of a torch.device, this process's share of them on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


FILLED = 7 / 8  # of a device, by a micro_batch_size that is chosen here: the rest is for what no estimate sees


def largest_micro_batch(model, s, world, has):
    """The largest divisor of a process's share of the batch with which memory() is at most FILLED of `has` bytes; 1 if
    none is."""
    share, block = s["batch_size"] // world, block_length(model.config, s["recompute"], s["recompute_block"])
    for size in (n for n in range(share, 1, -1) if share % n == 0):
        if sum(memory(model, s | {"micro_batch_size": size}, world, block).values()) <= FILLED * has:
            return size
    return 1


REFUSED = 2  # times the memory there is: an estimate this far above it is no near miss


def check_fits(model, s, ranks):
    """Warn, before anything is allocated, of a run that seems to need more memory than the device has; raise ValueError
    for one that seems to need more than REFUSED times as much. The model may still be on the meta device."""
    has = device_memory(ranks.device)
    block = block_length(model.config, s["recompute"], s["recompute_block"])
    held = 1
    if s["pipeline_size"] > 1:
        model, held = of_rank(model.config, s | {"world": ranks.world}, ranks.rank * s["pipeline_size"] // ranks.world)
    needs = memory(model, s, ranks.world // s["pipeline_size"], block, held)
    if sum(needs.values()) <= has:
        return
    most = sorted(needs, key=needs.get, reverse=True)[:3]
    message = (
        f"the run needs about {sum(needs.values()) / 1e9:.1f} GB on each device, and it has {has / 1e9:.1f}: "
        + ", ".join(f"{name} {needs[name] / 1e9:.1f}" for name in most)
        + "; use more processes with parallel='fsdp', recompute='mhc' or 'full', or a smaller micro_batch_size"
    )
    if sum(needs.values()) > REFUSED * has:
        raise ValueError(message)
    if program.is_first():
        program.say(f"warning: {message}. This is an estimate: the run goes on")


# -- measuring ------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the memory of all tensors made while it is active: .now, and .peak, the most there was.

    Tensors that were there before are not counted, if named in `existing`. CPU only: its backward runs in this thread.
    """

    def __init__(self, existing=()):
        super().__init__()
        self.now = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in existing}
        self.existing = list(existing)  # alive, so that no new storage takes their place

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


def measured_bytes(model, idx, targets, autocast=False):
    """(bytes saved for the backward by one forward, the peak during that backward) of a model on the CPU."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), idx, targets]
    with LiveBytes(known) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(idx, targets)[1]
        saved = live.peak = live.now
        loss.backward()
    return saved, live.peak
