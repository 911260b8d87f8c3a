"""What one micro-batch launches, moves and computes, part by part, and the time that each part needs at least.

    python tools/bench.py roofline --config=config/gpt_124m.py --card=H100

A reckoning, not a measurement: no device is needed. The model itself runs forward and backward on tensors without
values, and `Count` sees every operation, so that whoever changes the model changes the reckoning. An operation needs

    max(bytes / bandwidth, FLOPs / peak)     bytes: what it reads and writes, each once; FLOPs: of matrix products

and the operations follow each other. What runs elsewhere on a GPU stands here for itself: the Triton kernels (their
arguments say what they move), attention (a fused kernel, its causal half), RMSNorm, the head's products in fp32. Not
counted are the wire, the copies around FSDP's collectives, and all that a real kernel wastes. An operation is a launch,
where some (a sort) are several.

Two times are printed. `at least` is at the card's peaks. `likely` takes products at a share `mfu` of the peak, and
memory at a share `memory_share` of the bandwidth: both assumed, and printed.
"""

import bisect
import contextlib
import inspect
import math
import warnings
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import layers
import mhc
import recompute
import sinkhorn_kernel
from layers import MLA, MLP, Experts, Gate, MoE, RMSNorm
from mhc_gpu import STREAMS
from model import GPT, GPTConfig, Residual
from parallel import groups, parameters
from plan import BANDWIDTH, peak_flops

WIDE_FLOPS = {"B200": 75e12, "H200": 67e12, "H100": 67e12, "A100": 19.5e12, "MI300X": 163e12}  # fp32, from the makers

GEMM, ATTENTION, HEAD, MOE = "GEMMs", "attention", "head and loss", "MoE: gate, permute"
CASTS, BOUNDARY, NORM, OPTIMIZER = "casts, accumulation", "residual connection", "norm, RoPE, SwiGLU", "optimizer"
REST = "embedding, the streams' ends"
PARTS = (GEMM, ATTENTION, HEAD, MOE, CASTS, BOUNDARY, NORM, REST, OPTIMIZER)
MODULES = {Residual: BOUNDARY, RMSNorm: NORM, MLA: NORM, MLP: NORM, Experts: NORM, MoE: MOE, Gate: MOE}

PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::_grouped_mm")
BY_ROWS = ("aten::index_select", "aten::gather", "aten::embedding", "aten::index")  # read as much as they write
OVERWRITE = ("aten::copy_", "aten::zero_", "aten::fill_")
FREE = ("empty", "aten::_unsafe_view", "aten::lift_fresh", "aten::detach", "aten::set_", "aten::is_same_size")


@dataclass
class Card:
    """What a card can do: bf16 and fp32 FLOP/s, bytes/s; and the shares of them that are taken."""

    flops: float
    wide_flops: float
    bandwidth: float

    @classmethod
    def named(cls, name, mfu=1.0, memory_share=1.0):
        return cls(peak_flops(name) * mfu, WIDE_FLOPS[name] * mfu, BANDWIDTH[name] * memory_share)

    def seconds(self, work):
        return max(work.bytes / self.bandwidth, work.flops / self.flops + work.wide_flops / self.wide_flops)


@dataclass
class Work:
    """Of one operation: bytes moved, FLOPs of bf16 products and of fp32 ones."""

    bytes: float = 0
    flops: float = 0
    wide_flops: float = 0


@dataclass
class Part:
    """The sum over a part's operations; seconds at the peaks, and at the shares."""

    launches: float = 0
    bytes: float = 0
    flops: float = 0
    least: float = 0
    likely: float = 0

    def __add__(self, other):
        return Part(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Part)))


# -- one operation ----------------------------------------------------------------------------------------------------


def tensors_in(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def size_of(t):
    """Bytes of a tensor's own elements; an expanded dimension is one element."""
    return t.itemsize * math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)


def distinct(tensors):
    return {(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in tensors}.values()


def bytes_of(name, func, args, kwargs, out):
    """What an operation reads and writes, each tensor once."""
    inputs, outputs = distinct(tensors_in((args, kwargs))), tensors_in(out)
    written = [a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write]
    written = list(distinct([*outputs, *tensors_in(written)]))
    if name in BY_ROWS:
        return 2 * sum(map(size_of, outputs)) + sum(map(size_of, tensors_in((args[1:], kwargs))))
    if name in ("aten::scatter_add_", "aten::index_add_"):  # touches what it adds to, and no more
        return 3 * size_of(args[3]) + size_of(args[2])
    if name in OVERWRITE:
        return size_of(args[0]) + sum(map(size_of, tensors_in(args[1:])))
    return sum(map(size_of, inputs)) + sum(map(size_of, written))


def work_of(func, args, kwargs, out):
    name = func.name().partition(".")[0]
    work = Work(bytes_of(name, func, args, kwargs, out))
    if name in PRODUCTS:
        a, b = args[1:3] if name == "aten::addmm" else args[:2]
        flops = 2 * a.numel() * b.shape[-1]
        work.flops, work.wide_flops = (0, flops) if a.dtype == torch.float32 else (flops, 0)
    return work


def is_free(func, out):
    """A view, memory without values, a question about a tensor: nothing is launched."""
    return func.is_view or any(name in func.name() for name in FREE) or not tensors_in(out)


class Count(TorchDispatchMode):
    """Adds up the work of all operations while it is active, by part: .parts, {name: Part}.

    A part is known by the module that is running. An operation of the backward belongs to the part of the operation
    whose node runs: nodes are numbered in order, and `since` says from which number on which part was running.
    """

    def __init__(self, cards, weights=()):
        super().__init__()
        self.cards, self.parts = cards, defaultdict(Part)
        self.weights = {shape for w in weights for shape in (w.shape, w.shape[::-1])}
        self.running, self.since = [REST], [(-1, REST)]

    @contextlib.contextmanager
    def part(self, name):
        """What runs in here is of this part."""
        self.change(lambda: self.running.append(name))
        try:
            yield
        finally:
            self.change(self.running.pop)

    def change(self, change):
        change()
        self.since.append((torch._C._autograd._get_sequence_nr(), self.running[-1]))

    def now(self):
        """The part that is running."""
        node = torch._C._current_autograd_node()
        if node is None or len(self.running) > 1:  # in a replay the modules run again
            return self.running[-1]
        if "AccumulateGrad" in node.name():
            return CASTS
        return self.since[bisect.bisect_right(self.since, node._sequence_nr(), key=lambda s: s[0]) - 1][1]

    def part_of(self, func, args):
        part, name = self.now(), func.name().partition(".")[0]
        if part == NORM and name in PRODUCTS:
            return GEMM
        if part == NORM and name == "aten::_to_copy" and args[0].shape in self.weights:
            return CASTS
        return part

    def add(self, part, work, launches=1):
        least, likely = (card.seconds(work) for card in self.cards)
        self.parts[part] += Part(launches, work.bytes, work.flops + work.wide_flops, least, likely)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not is_free(func, out):
            self.add(self.part_of(func, args), work_of(func, args, kwargs or {}, out))
        return out


# -- what stands for itself -------------------------------------------------------------------------------------------


class Attention(torch.autograd.Function):
    """Causal attention as one kernel: q, k (B, H, T, D), v (B, H, T, V). Two products forward, five backward, half of
    each; nothing of T x T is written. The backward is two launches: dout * out, and the rest."""

    @staticmethod
    def forward(ctx, q, k, v, count):
        ctx.save_for_backward(q, k, v)
        ctx.count, ctx.half = count, q.numel() * k.shape[2]  # FLOPs of one causal product, divided by 1 and D
        out = v.new_empty(*q.shape[:3], v.shape[-1])
        moved = sum(map(size_of, (q, k, v, out))) + 4 * math.prod(q.shape[:3])  # and a sum a row
        count.add(ATTENTION, Work(moved, ctx.half * (1 + v.shape[-1] / q.shape[-1])))
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        rows = 4 * math.prod(q.shape[:3])
        ctx.count.add(ATTENTION, Work(2 * size_of(g) + rows))
        moved = 2 * sum(map(size_of, (q, k, v, g))) + 2 * rows
        ctx.count.add(ATTENTION, Work(moved, ctx.half * (3 + 2 * v.shape[-1] / q.shape[-1])))
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def attention(count, q, k, v, scale):
    return Attention.apply(q, k, v, count)


def wide_mm(count, a, b):
    """layers.wide_mm on a GPU: bf16 in, fp32 out, one product."""
    out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    flops = 2 * a.numel() * b.shape[1]
    wide = a.dtype == torch.float32
    count.add(count.now(), Work(sum(map(size_of, (a, b, out))), 0 if wide else flops, flops if wide else 0))
    return out


class Norm(torch.autograd.Function):
    """RMSNorm, which a GPU does in one kernel: x and weight in, y and a number a row out. Backward: one for x, from dy
    and x, and one for the weight, from the same."""

    @staticmethod
    def forward(ctx, x, weight, count):
        ctx.save_for_backward(x, weight)
        ctx.count, ctx.rows = count, x.itemsize * x.shape[:-1].numel()
        count.add(count.now(), Work(2 * size_of(x) + size_of(weight) + ctx.rows))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        for written in (x, weight):
            ctx.count.add(ctx.count.now(), Work(sum(map(size_of, (g, x, weight, written))) + ctx.rows))
        return torch.empty_like(x), torch.empty_like(weight), None


def rms_norm(count, x, shape, weight, eps):
    return Norm.apply(x, weight, count)


class Kernel:
    """In a Triton kernel's place: counts what its arguments say that it moves, and the product with phi."""

    def __init__(self, kernel, count):
        self.count, self.names = count, getattr(kernel, "arg_names", None) or list(inspect.signature(kernel).parameters)

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **options):
        named = dict(zip(self.names, args, strict=False)) | options
        given = [t for t in named.values() if isinstance(t, torch.Tensor)]
        x = next((named[name] for name in ("x_ptr", "x_next_ptr") if name in named), None)
        phi = next((t for name in ("phi_ptr", "d_phi_ptr") if (t := named.get(name)) is not None), None)
        flops = 0 if x is None or phi is None else 2 * x.numel() * phi.shape[-1]
        self.count.add(self.count.now(), Work(sum(map(size_of, given)), flops))


@contextlib.contextmanager
def replaced(*what):
    """Put something in the place of an attribute for a while: (object, name, value) each."""
    before = [(where, name, getattr(where, name)) for where, name, _ in what]
    try:
        for where, name, value in what:
            setattr(where, name, value)
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)


def stand_ins(count):
    """What a GPU runs and a tensor without values cannot."""
    kernels = [(n, k) for n, k in vars(sinkhorn_kernel).items() if n.endswith("_kernel")]
    return replaced(
        (layers, "causal_attention", partial(attention, count)),
        (F, "rms_norm", partial(rms_norm, count)),
        (layers, "wide_mm", partial(wide_mm, count)),
        (mhc, "why_no_triton", lambda device: None),
        *((sinkhorn_kernel, name, Kernel(kernel, count)) for name, kernel in kernels),
    )


# -- one micro-batch --------------------------------------------------------------------------------------------------


def without_values(model, narrow):
    """The parameters and buffers of a model from the meta device as fakes; those in `narrow` in bf16."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            dtype = torch.bfloat16 if p in narrow else p.dtype
            setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, dtype=dtype)))
        for name, t in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(t.shape, dtype=t.dtype))
    return model


def labelled(model, count):
    """Every module of the model runs as its part."""
    for module in model.modules():
        part = next((part for kind, part in MODULES.items() if isinstance(module, kind)), None)
        for name in ("forward", "close") if part else ():
            if hasattr(module, name):
                setattr(module, name, count.part(part)(getattr(module, name)))
    model.loss = count.part(HEAD)(model.loss)


def gathered(model, s):
    """The parameters that FSDP hands to the model in bf16; none without FSDP."""
    if s["parallel"] != "fsdp" or s["dtype"] != "bfloat16":
        return set()
    return parameters(groups(model)) - parameters(model.gates())


def micro_batch(config, s, cards):
    """{part: Part} of one micro-batch of a run with these settings, forward and backward, on one device.

    Gradients are there already and are added to, as in every micro-batch but a step's first; with FSDP they leave."""
    with torch.device("meta"):
        model = GPT(replace(config, impl="triton" if config.residual != "baseline" else "auto"))
    narrow = gathered(model, s)
    with FakeTensorMode():
        model = without_values(model, narrow)
        recompute.apply(model, s["recompute"], s["recompute_block"])
        idx = torch.empty(s["micro_batch_size"], s["seq_len"], dtype=torch.long)
        count = Count(cards, [p for p in model.parameters() if p.ndim > 1])
        labelled(model, count)
        for p in model.parameters() if s["parallel"] != "fsdp" else ():
            p.grad = torch.empty_like(p)
        with stand_ins(count), count, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer")  # recompute.py asks: all lie at 0 here
            with torch.autocast("cpu", torch.bfloat16, enabled=s["dtype"] == "bfloat16"):
                loss = model(idx, idx)[1]
            loss.backward()
    return dict(count.parts)


def optimizer_work(model, s, world):
    """The optimizer's Part of a micro-batch's share: clipping reads the gradients, scales them, and AdamW reads four
    fp32 numbers a parameter and writes three; of the shard that this device holds, once for all micro-batches."""
    shards = (s["shard_size"] or world) if s["parallel"] == "fsdp" else 1
    micro_batches = s["batch_size"] // (s["micro_batch_size"] * world)
    moved = [4 * p.numel() / shards * times for times in (1, 2, 7) for p in model.parameters()]
    return Work(sum(moved) / micro_batches), 3 / micro_batches


def reckon(config, s, cards, world=1):
    """{part: Part} of one micro-batch, the optimizer's share among them, in the order of PARTS."""
    if config.residual != "baseline" and config.n_streams not in STREAMS:
        raise ValueError(f"n_streams={config.n_streams}: the kernels take {', '.join(map(str, STREAMS))}")
    parts = micro_batch(config, s, cards)
    with torch.device("meta"):
        model = GPT(config)
    work, launches = optimizer_work(model, s, world)
    parts[OPTIMIZER] = Part(launches, work.bytes, 0, *(card.seconds(work) for card in cards))
    return {name: parts[name] for name in PARTS if name in parts}


# -- the report -------------------------------------------------------------------------------------------------------

FORMS = {
    "baseline": {"residual": "baseline", "single_pass": False},
    "HC": {"residual": "hc", "single_pass": False},
    "mHC": {"residual": "mhc", "single_pass": False},
    "single-pass": {"residual": "mhc", "single_pass": True},
}


def form_of(config):
    return next((n for n, f in FORMS.items() if all(getattr(config, k) == v for k, v in f.items())), config.residual)


def by_form(settings, card, mfu, memory_share):
    """-> the run's GPTConfig, and {form: {part: Part}} of one micro-batch with each kind of residual connection."""
    known = {f.name for f in fields(GPTConfig)}
    config = GPTConfig(**{k: v for k, v in settings.items() if k in known})
    cards = Card.named(card), Card.named(card, mfu, memory_share)
    world = settings["plan_devices"] if settings["parallel"] == "fsdp" and settings["plan_devices"] else 1
    forms = {form_of(config): config}
    forms |= {n: replace(config, n_streams=settings["n_streams"], **f) for n, f in FORMS.items() if n not in forms}
    return config, {name: reckon(config, settings, cards, world) for name, config in forms.items()}


def report(path, settings, card, mfu, memory_share, launch_us):
    """Print the parts of one micro-batch of a run, and what the residual connections add to each other.

    settings: the run's, all of train.py's. card: of plan.BANDWIDTH. launch_us: the host's time for an operation."""
    cards = Card.named(card), Card.named(card, mfu, memory_share)
    config, parts = by_form(settings, card, mfu, memory_share)
    tokens = settings["micro_batch_size"] * settings["seq_len"]
    print(f"a reckoning, nothing was run: {path}, one micro-batch of {tokens} tokens on one {card}, "
          f"{settings['dtype']}, recompute={settings['recompute']!r}, not compiled\n"
          f"at least: {cards[0].flops / 1e12:.0f} TFLOP/s, {cards[0].bandwidth / 1e12:.2f} TB/s; likely: "
          f"{mfu:.0%} and {memory_share:.0%} of them (assumed); the wire is left out")  # fmt: skip
    for name, as_with in (("head_loss", "chunked"), ("fp8", False)):
        if settings.get(name, as_with) != as_with:
            print(f"{name}={settings[name]!r}: reckoned as with {as_with!r}")
    mine, totals = form_of(config), {name: sum(p.values(), Part()) for name, p in parts.items()}
    print_parts(parts[mine], totals[mine], mine)
    with torch.device("meta"):
        flops = GPT(config).flops_per_token() * tokens
    print_mfu(totals[mine], flops / cards[0].flops, launch_us)
    print_forms(totals)


def print_mfu(total, at_peak, launch_us):
    """at_peak: the seconds of the model's FLOPs at the card's peak."""
    host = total.launches * launch_us / 1e6
    print(f"MFU that follows: at most {at_peak / total.least:.1%}, likely {at_peak / total.likely:.1%}; the host takes "
          f"{1e3 * host:.1f} ms at {launch_us:g} us a launch (assumed), "
          f"with which {at_peak / max(host, total.likely):.1%}")  # fmt: skip


def print_parts(parts, total, form):
    print(f"{form:30} {'launches':>9} {'GB':>8} {'TFLOP':>8} {'ms at least':>12} {'ms likely':>10}")
    for name, part in (parts | {"all": total}).items():
        print(f"{name:30} {part.launches:9.0f} {part.bytes / 1e9:8.2f} {part.flops / 1e12:8.3f} "
              f"{1e3 * part.least:12.2f} {1e3 * part.likely:10.2f}")  # fmt: skip


def print_forms(totals):
    base = totals["baseline"]
    print(f"{'all':30} {'launches':>9} {'ms at least':>12} {'added':>8} {'ms likely':>10} {'added':>8}")
    for name, t in totals.items():
        print(f"{name:30} {t.launches:9.0f} {1e3 * t.least:12.2f} {100 * (t.least / base.least - 1):+7.1f}% "
              f"{1e3 * t.likely:10.2f} {100 * (t.likely / base.likely - 1):+7.1f}%")  # fmt: skip
    print("the paper adds 6.7 % with n = 4 (27B, its overlap included)")
