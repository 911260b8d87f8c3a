"""Train a GPT with any of the three residual connections, on one process or many.

    python train.py config/demo.py --residual=hc --out_dir=out/demo/hc
    python train.py config/mhc_27b.py --dry_run=True           # what it would take; nothing is allocated
    torchrun --nproc_per_node=8 train.py config/mhc_27b.py

out_dir receives config.json (settings, command line, commit), metrics.jsonl (one line a step, one an evaluation),
maps.npz (heat maps of H_res at the last evaluation) and checkpoints. figures.py draws them, while a run goes on too.

SIGTERM and Ctrl-C finish the step, save and exit 0. The same command again goes on from the newest whole checkpoint in
out_dir, as if there had been no break; a kill or a power failure loses the steps since then and nothing else.
"""

import program
import run_folder

if __name__ == "__main__":
    program.begin()  # before torch, and before anything that takes long to import

import importlib.util
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields

import numpy as np
import torch

import checkpoint
import expert_parallel
import fp8 as eight_bits
import owned
import pipeline
import plan
import recompute as recomputation
from configurator import above, at_least, between, configure, fail, one_of, some
from data import Corpus, DataError, order
from gains import alarms, gains, heat_maps, res_gradients, stream_spread
from layers import HEAD_LOSSES, check_head_loss
from mhc import STREAMS, resolve_impl
from model import GPT, RESIDUALS, GPTConfig
from names import ELSEWHERE
from parallel import PARALLEL, by_mesh, check_batch, check_layout, only_rank_0_prints, resolve_device, start
from records import check as check_record
from records import integer, null_or, number

# -- the run --------------------------------------------------------------------------------------------------------
out_dir = "out/run"
data_dir = "data/python_bpe2048"  # a corpus made by prepare_data.py
seed = 1337  # of the weights and of the order of the data
device = "auto"  # 'cpu' | 'cuda' | 'mps'; 'auto': the best there is, and it is printed
dtype = "float32"  # 'bfloat16': autocast outside the mappings; the streams are bf16 then (Eq 11)
compile = "auto"  # torch.compile the sublayers: True | False; 'auto': on CUDA alone, and it is printed
head_loss = "chunked"  # of the head: 'chunked' (ours) | 'torch' | 'liger' (a library's fused one), see layers.py
fp8 = False  # the products of attention, FFNs and experts with operands of 8 bits, through torchao: see fp8.py
dry_run = False  # print what the run would take, and stop
init_from = "resume"  # go on with the unfinished run in out_dir, if any; 'scratch': move it to <out_dir>.old first
# -- the model: see GPTConfig ---------------------------------------------------------------------------------------
vocab_size = 0  # 0: the corpus's own; more pads the embedding and the head
seq_len = 1024
n_layer = 12  # blocks; a block is two sublayers
n_embd = 768  # C, the width of one stream
n_head = 12
q_lora_rank = 0  # 0: queries straight from x
kv_lora_rank = 512
qk_nope_head_dim = 128
qk_rope_head_dim = 64
v_head_dim = 128
rope_theta = 10000.0
first_k_dense_replace = 1  # leading blocks with a dense FFN
intermediate_size = 2048  # of the dense FFN
n_routed_experts = 16
num_experts_per_tok = 4
n_shared_experts = 1
moe_intermediate_size = 512  # of one expert
route_scale = 2.5  # the weights of a token's experts sum to this
residual = "mhc"  # 'baseline' | 'hc' | 'mhc', or one of your own: README, 'Add your own'
n_streams = 4  # n, the expansion rate
manifold = "sinkhorn"  # that mHC's H_res is on: see manifolds.py
sinkhorn_iters = 20  # t_max
alpha_init = 0.01
maps_init = "home"  # first values of mHC's maps: 'home' | 'paper' (appendix A.6), see GPT.initial_value
learned_maps = "pre,post,res"  # of HC and mHC; the others are fixed to 1/n, 1 and I (Table 1)
single_pass = False  # mHC: a sublayer is read through the H_pre made one boundary before it
collapse = "sum"  # 'sum' | 'head': how the streams become one again; single-pass: neither, by the last H_pre
impl = "auto"  # of mhc_step: 'auto' | 'ref' | 'eager' | 'triton'
norm_eps = 1e-20
init_std = 0.02
# -- the optimizer --------------------------------------------------------------------------------------------------
batch_size = 64  # sequences per optimizer step, over all processes
micro_batch_size = 8  # sequences per forward of one process; divides batch_size. 0: the most that plan.py finds to fit
max_steps = 1000  # optimizer steps
lr = 6e-4  # at its peak
maps_lr_scale = 1.0  # a factor on the LR of alpha and b of HC's and mHC's maps; 1: the paper's
warmup_steps = 100
lr_schedule = "step"  # 'step' (the paper's) | 'cosine' | 'constant'
decay_at = "0.8,0.9"  # step: fractions of the run ...
decay_rates = "0.316,0.1"  # ... from which the LR is this fraction of its peak
min_lr_ratio = 0.1  # cosine: the LR at the end, as a fraction of its peak
beta1 = 0.9
beta2 = 0.95
adam_eps = 1e-20
weight_decay = 0.1  # of matrices; norms, alpha and b take none
grad_clip = 1.0  # largest norm of the gradient; 0: off
bias_update_speed = 0.001  # gamma: how far an expert's selection bias moves in a step
# -- many processes, and memory: see parallel.py and recompute.py -----------------------------------------------------
parallel = "none"  # 'ddp' | 'fsdp': started by torchrun
pipeline_size = 1  # fsdp: processes over which the depth is cut: see pipeline.py
pipeline_schedule = "dualpipev"  # 'dualpipev' | 'zbv' | '1f1b'
pipeline_overlap = False  # dualpipev: while one micro-batch's tokens are on their way, another computes: see overlap.py
expert_size = 1  # fsdp: processes that share the routed experts, as a rule those of one node: see expert_parallel.py
shard_size = 0  # fsdp: processes that share one copy of the weights; 0: all. As a rule those of one node
reduce_always = False  # reduce gradients after every micro-batch, not the last alone: fsdp then keeps only shards
reduce_dtype = "float32"  # fsdp: of gradients on their way; 'bfloat16': half the bytes, mappings, gates, norms aside
rank_timeout = 600.0  # seconds after which a process that does not answer ends the run
recompute = "none"  # 'mhc': replay the mappings in the backward (Table 3) | 'full': the sublayers too
recompute_block = -1  # sublayers between two kept x; -1: L_r* of Eq 20
plan_devices = 0  # with dry_run: devices to plan for; 0: as many as torchrun started, else 1
plan_device = "H100"  # with dry_run: their kind, see plan.py
plan_mfu = 0.4  # with dry_run: the share of their peak FLOP/s that is used
# -- watching -------------------------------------------------------------------------------------------------------
eval_interval = 100  # steps between evaluations
eval_sequences = 64  # of the validation split, always the first ones
checkpoint_interval = 500  # steps between checkpoints; there is always one at the end
keep_checkpoints = 2  # the last ones kept, at least 2; and the one with the best validation loss of its own step
log = "none"  # 'tensorboard' | 'wandb', beside metrics.jsonl
profile = False  # write one trace of ten steps to out_dir/trace.json

RULES = {  # of the model's settings: GPTConfig's
    "out_dir": some("a folder"),
    "data_dir": some("a folder"),
    "seed": between(0, 2**63 - 1),
    "device": one_of("auto", "cpu", "cuda", "mps"),
    "dtype": one_of("float32", "bfloat16"),
    "compile": (lambda v: v == "auto" or v.lower() in ("true", "false"), "'auto', True or False"),
    "head_loss": one_of(*HEAD_LOSSES),
    "init_from": one_of("resume", "scratch"),
    "batch_size": at_least(1, 10**6),
    "micro_batch_size": at_least(0, 10**6),
    **dict.fromkeys(("max_steps", "eval_interval", "eval_sequences", "checkpoint_interval"), at_least(1)),
    "keep_checkpoints": at_least(2),
    "lr": above(0, 10),
    "maps_lr_scale": above(0, 10**4),
    "warmup_steps": at_least(0),
    "lr_schedule": one_of("step", "cosine", "constant"),
    "min_lr_ratio": between(0, 1),
    "beta1": between(0, 0.9999),
    "beta2": between(0, 0.99999),
    **dict.fromkeys(("adam_eps", "bias_update_speed"), between(0, 1)),
    "weight_decay": between(0, 100),
    "grad_clip": at_least(0),
    "parallel": one_of(*PARALLEL),
    **dict.fromkeys(("shard_size", "plan_devices"), at_least(0, 10**6)),
    **dict.fromkeys(("expert_size", "pipeline_size"), at_least(1, 10**6)),
    "pipeline_schedule": one_of(*pipeline.SCHEDULES),
    "reduce_dtype": one_of("float32", "bfloat16"),
    "rank_timeout": above(0, 10**6),
    "recompute": one_of(*recomputation.RECOMPUTE),
    "plan_device": one_of(*plan.MEMORY),
    "plan_mfu": between(0.001, 1),
    "log": one_of("none", "tensorboard", "wandb"),
}
STATE = {  # what checkpoints carry beside the tensors
    "evaluated": null_or(integer(0)), "val_loss": null_or(number()), "best_loss": null_or(number()),
    "skipped": integer(0), "skipped_in_a_row": integer(0),
}  # fmt: skip
SKIPPED_IN_A_ROW = 10  # non-finite steps that end a run
SLOW = 10  # times the median: a step that gets a line of its own


def model_config(settings):
    """The GPTConfig among a run's settings. Raises ValueError."""
    return GPTConfig(**{f.name: settings[f.name] for f in fields(GPTConfig)})


def check(settings):
    """What no rule about a single setting can see, before anything is opened or allocated. Raises ValueError."""
    config = model_config(settings | {"vocab_size": vocab_size or 1})  # 0: the corpus's, which is not known yet
    recomputation.block_length(config, recompute, recompute_block)
    check_schedule()
    if dry_run:  # it is for plan_devices of plan_device: plan.report checks those
        return
    world, on = int(os.environ.get("WORLD_SIZE", 1)), resolve_device(device)
    check_layout(parallel, world, shard_size)
    pipeline.check(config, settings, world)
    node = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    expert_parallel.check(config, expert_size, world // pipeline_size, parallel, shard_size, node)
    check_batch(batch_size, micro_batch_size or 1, world // pipeline_size)
    if reduce_dtype != "float32" and parallel != "fsdp":
        raise ValueError(f"reduce_dtype={reduce_dtype!r}: only parallel='fsdp' reduces in it; wanted 'float32'")
    if parallel == "ddp" and "RANK" not in os.environ:
        raise ValueError("parallel='ddp': wanted several processes: torchrun --nproc_per_node=2 train.py ...")
    resolve_impl(impl, on)
    if impl == "triton" and config.n_streams not in STREAMS:
        raise ValueError(
            f"n_streams={n_streams}: impl='triton' takes {', '.join(map(str, STREAMS))}; wanted impl='auto'"
        )
    check_head_loss(head_loss, on)
    if fp8:
        eight_bits.check(on, dtype, config.has_moe)
    if compiles(on) and on == "cpu":
        check_compiler()
    if log != "none" and not importlib.util.find_spec(log):
        raise ValueError(f"log={log!r}: wanted the package of that name, which is not installed: pip install {log}")


def compiles(device):
    """Whether the sublayers are compiled on 'cuda', 'cpu' or 'mps': where launches cost more than compiling, or as the
    setting says."""
    return device == "cuda" if compile == "auto" else compile.lower() == "true"


def check_compiler():
    """torch.compile turns to a C++ compiler on a CPU; without one it fails in the first step, at length."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        raise ValueError(f"compile=True: torch needs a C++ compiler here and {compiler!r} is not found: install it, "
                         "name another in the environment's CXX, or leave compile=False")  # fmt: skip


def learning_rate(step):
    """The LR of optimizer step `step` = 0, 1, ...: linear warmup, then the schedule."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if lr_schedule == "cosine":
        progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        return lr * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
    factor = 1.0
    if lr_schedule == "step":
        for at, rate in zip(numbers("decay_at"), numbers("decay_rates"), strict=True):
            factor = rate if step >= at * max_steps else factor
    return lr * factor


def numbers(name):
    """A setting like '0.8,0.9' as floats."""
    try:
        return [float(v) for v in globals()[name].split(",") if v]
    except ValueError:
        raise ValueError(
            f"{name}={globals()[name]!r}: wanted numbers with commas between them, like '0.8,0.9'"
        ) from None


def check_schedule():
    """decay_at and decay_rates belong together."""
    at, rates = numbers("decay_at"), numbers("decay_rates")
    if len(at) != len(rates) or at != sorted(at) or not all(0 <= v <= 1 for v in at + rates):
        raise ValueError(
            f"decay_at={decay_at!r}, decay_rates={decay_rates!r}: wanted as many of one as of the other, all from 0 "
            "to 1, the first in rising order"
        )


def make_optimizer(model):
    """AdamW with decay on matrices only: mHC's and HC's alpha and b (the static terms) take none, phi and theta do.

    The static terms have a rate of their own, maps_lr_scale times the others'. In a short run it decides what the maps
    can do: Adam moves b by about lr * steps, and a logit behind a sigmoid or Sinkhorn has to move by several units. Not
    the collapse head's: it is no map between sublayers, and nothing is multiplied over depth there.
    """
    maps = [p for r in model.residuals() for p in r.parameters() if p.ndim < 2]
    static = {id(p) for p in maps}
    rest = [p for p in model.parameters() if id(p) not in static]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": maps, "weight_decay": 0.0, "lr_scale": maps_lr_scale},
    ]
    # the baseline has no maps; under expert_size the experts lie on a device mesh of their own
    groups = [group | {"params": ps} for group in groups for ps in by_mesh(group["params"])]
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=adam_eps, fused=fused)


def autocast(device):
    """bf16 autocast if dtype says so; the mappings switch it off for themselves."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def narrow_weights(model):
    """A context for one step: the matrices of every F in bf16, cast once; autocast would cast them in each micro-batch.

    Each gradient still goes through the cast by itself, so micro-batches add up in fp32, in the parameters. FSDP has
    bf16 copies of its own."""
    if dtype != "bfloat16" or parallel == "fsdp":
        return nullcontext()
    return model.with_matrices([module._parameters[name].to(torch.bfloat16) for module, name in model.matrices()])


# -- one optimizer step ---------------------------------------------------------------------------------------------


class Batches:
    """This process's share of the batch of each step, which is a function of seed and step alone: read, and put into
    pinned memory for a GPU, while the step before it runs, and brought to the device in one copy."""

    def __init__(self, corpus, ranks):
        self.corpus, self.ranks, self.ahead = corpus, ranks, {}
        self.pool = ThreadPoolExecutor(1)

    def read(self, step):
        """(2, A * k, T) on the host: inputs and targets of A micro-batches of k sequences."""
        ids = order(seed, step * batch_size, batch_size, self.corpus.n_sequences)
        both = torch.stack(self.corpus.sequences(self.ranks.share(ids, micro_batch_size).ravel()))
        if self.ranks.device.type != "cuda":
            return both
        torch.cuda.set_device(self.ranks.device)  # of this thread: pinning would wake up the first GPU
        return both.pin_memory()

    def of(self, step):
        """Inputs and targets of a step, (A * k, T) each, on the device: A micro-batches of k sequences in a row."""
        both = self.ahead.pop(step).result() if step in self.ahead else self.read(step)
        if step + 1 < max_steps:
            self.ahead[step + 1] = self.pool.submit(self.read, step + 1)
        return both.to(self.ranks.device, non_blocking=True)


def forward_backward(net, batches, step, ranks):
    """Add up the gradients of the batch of `step`. -> mean loss

    net: the model as ranks.wrap() gave it. Each process takes its share of the batch, a micro-batch at a time."""
    idx, targets = batches.of(step)
    micro_batches = list(zip(idx.split(micro_batch_size), targets.split(micro_batch_size), strict=True))
    net.zero_grad()
    model = getattr(net, "module", net)  # DDP's
    if ranks.pipeline:  # its schedule has all micro-batches of the step under way at once
        with model.one_head():
            return ranks.all_sum(ranks.pipeline.step(idx, targets, len(micro_batches))).item() / ranks.parts
    total = torch.zeros((), device=ranks.device)
    with model.one_head(), narrow_weights(model):
        for i, (idx, targets) in enumerate(micro_batches):
            ranks.synchronise(net, last=i == len(micro_batches) - 1, every=reduce_always)
            with autocast(ranks.device):
                _, loss = net(idx, targets)
            loss = loss / len(micro_batches)
            loss.backward()
            total += loss.detach()
    return ranks.all_sum(total).item() / ranks.parts


def optimizer_step(model, optimizer, step, loss, ranks):
    """Clip, step, move the experts' biases. -> gradient norm, load (see uneven). Skips a step that is not finite.

    The gradients stay until the next forward_backward: an evaluation in between looks at them."""
    norm = ranks.clip_grad_norm(model, grad_clip)
    load = ranks.all_sum(model.expert_load())
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step) * group["lr_scale"]
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        optimizer.step()
    model.update_expert_bias(bias_update_speed if finite else 0.0, load)
    parts = {"expert_load": load.shape[1]} | ({"rank_load": expert_size} if expert_size > 1 else {})
    return norm, {name: ranks.all_most(uneven(load, n)) for name, n in parts.items()}


def uneven(load, parts):
    """load (MoE blocks, E) tokens an expert -> how uneven the worst block is over `parts` equal runs of experts, as
    most / mean; None without MoE. Over E parts: the experts; over expert_size: the ranks that hold them."""
    if not len(load):
        return None
    load = load.float().unflatten(1, (parts, -1)).sum(2)
    return (load.amax(1) / load.mean(1)).max().item()


# -- evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def validation_loss(model, corpus, ranks):
    """Mean loss in nats a token over the first eval_sequences of the validation split."""
    model.eval()
    n = min(eval_sequences, corpus.n_sequences)
    total = torch.zeros((), device=ranks.device)
    with model.one_head(), narrow_weights(model):
        for done in range(0, n, micro_batch_size * ranks.parts):
            first = done + micro_batch_size * ranks.part
            rows = np.arange(first, min(first + micro_batch_size, n))
            # a process with nothing left runs along and counts for nothing: FSDP gathers the weights from all of them
            idx, targets = (t.to(ranks.device) for t in corpus.sequences(rows if len(rows) else [0]))
            with autocast(ranks.device):
                total += model(idx, targets)[1] * len(rows)
    model.train()
    return ranks.all_sum(total).item() / n


def look_at_maps(model, corpus, ranks):
    """Gains on one fixed sequence, and alarms for dead mappings. Leaves maps.npz, the heat maps figures.py draws."""
    if not RESIDUALS[residual].has_maps:
        return {}, []
    idx = corpus.sequences([0])[0].to(ranks.device)
    with autocast(ranks.device):
        seen = model.look(idx, lambda residual, x: (residual.maps(x)[2], stream_spread(x)))
    H_res, spreads = [H for H, _ in seen], [spread for _, spread in seen]
    if ranks.is_main:
        with owned.whole_file(os.path.join(out_dir, "maps.npz"), binary=True) as f:
            np.savez(f, **heat_maps(H_res))
    gradients = ranks.in_depth_order(res_gradients(model.residuals()))
    return gains(H_res), alarms(RESIDUALS[residual], gradients, spreads, H_res)


def peak_megabytes(device):
    """The most memory this process has held so far: on the GPU, or else resident, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (1e6 if sys.platform == "darwin" else 1e3)  # macOS reports bytes


# -- records --------------------------------------------------------------------------------------------------------


def null_for_nan(value):
    """value, with null for what is not finite: NaN is not JSON."""
    if isinstance(value, list):
        return [null_for_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Log:
    """metrics.jsonl, one flushed line a record, and TensorBoard or wandb if asked for: process 0's alone."""

    def __init__(self, settings, is_main):
        self.file, self.others = None, []
        if not is_main:
            return
        self.path = os.path.join(out_dir, "metrics.jsonl")
        owned.check_file(self.path)
        self.file = open(self.path, "ab", buffering=0)
        if log == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out_dir)
            self.others.append(lambda k, v, step: self.board.add_scalar(k, v, step))
        elif log == "wandb":
            import wandb

            wandb.init(project="mhc", name=out_dir, config=settings)
            self.others.append(lambda k, v, step: wandb.log({k: v}, step=step))

    def sync(self):
        """Durable, so that no checkpoint is ahead of its records."""
        if self.file:
            with program.naming(self.path):
                os.fsync(self.file.fileno())

    def write(self, record):
        if not self.file:
            return
        line = json.dumps({name: null_for_nan(value) for name, value in record.items()}, allow_nan=False) + "\n"
        with program.naming(self.path):
            owned.append(self.file, line.encode())
        for send in self.others:
            for name, value in record.items():
                if name != "step" and isinstance(value, (int, float)):
                    send(name, value, record["step"])


def commit():
    """What `git describe` says of this code, '-dirty' if Python was changed since; None without git.

    No other file counts: experiments.py itself adds to results/ while it runs.
    """
    here = os.path.dirname(os.path.abspath(__file__))

    def git(*command):
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=here).stdout.strip()

    try:
        name, changed = git("describe", "--always"), git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    except OSError:  # no git on this machine
        return None
    return name + "-dirty" * bool(changed) if name else None


def provenance(settings, train_data, val_data):
    """Settings, command line, commit and data hashes, so that a result can be traced to what made it."""
    data = {"train": train_data.fingerprint, "val": val_data.fingerprint}
    data |= {"tokenizer": train_data.tokenizer_sha256} if train_data.tokenizer_sha256 else {}
    return {"settings": settings, "command": [sys.executable, *sys.argv], "commit": commit(), "data": data}


def start_profiler(is_main):
    """With profile=True, a profiler that waits five steps and then traces ten into out_dir/trace.json."""
    if not (profile and is_main):
        return nullcontext()
    owned.check_file(os.path.join(out_dir, "trace.json"))
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=5, warmup=0, active=10, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(os.path.join(out_dir, "trace.json")),
    )


# -- beginning, saving, telling ----------------------------------------------------------------------------------------


def open_corpora():
    try:
        return Corpus(data_dir, "train", seq_len), Corpus(data_dir, "val", seq_len)
    except DataError as e:
        fail(str(e))


def design_model(settings, vocab, ranks):
    """The model without memory or values yet: with FSDP no process ever holds the whole. Refuses what cannot be."""
    global vocab_size, micro_batch_size
    vocab_size = settings["vocab_size"] = vocab_size or vocab
    if vocab_size < vocab:
        fail(f"vocab_size={vocab_size}: the corpus in {data_dir} has {vocab} tokens")
    with torch.device("meta"):
        model = GPT(model_config(settings))
    model.head_loss = head_loss
    recomputation.apply(model, recompute, recompute_block)
    if not micro_batch_size:
        has = plan.device_memory(ranks.device)
        micro_batch_size = settings["micro_batch_size"] = plan.largest_micro_batch(model, settings, ranks.parts, has)
        print(f"micro_batch_size = {micro_batch_size}, the largest that plan.py finds to fit in {has / 1e9:.0f} GB")
    try:
        if fp8:
            eight_bits.apply(model, ranks.device.type, gather=parallel == "fsdp" and ranks.device.type == "cuda")
        plan.check_fits(model, settings, ranks)
    except ValueError as e:
        fail(str(e))
    if compiles(ranks.device.type):
        model.compile_sublayers()
    return model


def resume_folder():
    """The checkpoint to go on from, or None; with init_from='scratch' what was in out_dir is moved aside first."""
    if init_from == "scratch" and (aside := checkpoint.on_rank_0(lambda: run_folder.move_aside(out_dir))):
        print(f"the run that was in {out_dir} is now in {aside}")
    return run_folder.resume_point(out_dir)


def begin(folder, model, optimizer, changed, origin):
    """Load the checkpoint in `folder`, if there is one. -> steps done, and what checkpoints carry beside the tensors.

    changed: settings that differ from its own, and the commit if that does. origin: provenance() of this start; it
    is left in config.json, and with every checkpoint."""
    step, state = 0, {"evaluated": None, "val_loss": None, "best_loss": None, "skipped": 0, "skipped_in_a_row": 0}
    if folder:
        step, state = checkpoint.step_of(folder), state | checkpoint.load(folder, model, optimizer)
        checkpoint.on_every_rank(lambda: check_record(state, STATE, f"{folder}/state.json", "state"))
        print(f"going on from {folder}" + "".join(f"\n  {k}: {a!r} -> {b!r}" for k, (a, b) in changed.items()))
    metrics, config = (os.path.join(out_dir, name) for name in ("metrics.jsonl", "config.json"))
    evaluated = state["evaluated"] == step
    dropped = checkpoint.on_rank_0(lambda: run_folder.trim_records(metrics, step if folder else -1, evaluated))
    if dropped and not folder:  # a run that ended before its first save
        print(f"{out_dir} has no checkpoint: from the start; its {dropped} records are now in metrics-dropped.jsonl")
    checkpoint.on_rank_0(lambda: owned.write_json(config, origin))
    return step, state | {"origin": {k: v for k, v in origin.items() if k != "settings"}}


def save(step, model, optimizer, settings, state, records):
    """A checkpoint of `step`: the best one if its own validation loss is below that of any before it."""
    records.sync()
    best_so_far = math.inf if state["best_loss"] is None else state["best_loss"]
    loss = math.nan if state["val_loss"] is None else state["val_loss"]
    best = state["evaluated"] == step and loss < best_so_far
    if best:
        state["best_loss"] = loss
    kept = {name: null_for_nan(value) for name, value in state.items()}
    checkpoint.save(out_dir, step, model, optimizer, kept, settings, keep_checkpoints, best)


def tokens_at_peak(model, ranks):
    """Tokens a second if all devices ran at their peak FLOP/s: a rate's share of it is the MFU. None if not known."""
    known = ranks.device.type == "cuda" and dtype == "bfloat16"  # the peaks are those of bf16
    peak = plan.peak_flops(torch.cuda.get_device_name()) if known else None
    return peak * ranks.world / model.flops_per_token() if peak else None


def evaluate(model, step, corpus, ranks, step_times, records):
    """One evaluation: validation loss, gains, alarms; printed and recorded. -> validation loss"""
    loss = validation_loss(model, corpus, ranks)
    found, alarm = look_at_maps(model, corpus, ranks)
    record = {
        "step": step,
        "val_loss": loss,
        "bits_per_byte": loss / math.log(2) / corpus.bytes_per_token,
        "params": model.num_params()["total"],
        "step_ms": statistics.median(step_times) * 1e3 if step_times else None,
        "peak_MB": peak_megabytes(ranks.device),
        **found,
    }
    records.write(record)
    gain = ""
    if found:  # of the whole depth
        gain = f"  gain fwd {found['composite_fwd_max'][-1]:.3g} bwd {found['composite_bwd_max'][0]:.3g}"
    print(f"step {step}: val_loss {loss:.4f}  bits/byte {record['bits_per_byte']:.4f}" + gain)
    for line in alarm if step else []:  # before the first step no map has had a chance to move
        print(line)
    return loss


def report_step(step, loss, norm, load, step_times, peak_rate, records, state):
    """The line of one optimizer step, printed and recorded. `step` counts the steps done; peak_rate: tokens_at_peak."""
    rate, usual = batch_size * seq_len / step_times[-1], statistics.median(step_times[-20:])
    left = (max_steps - step) * usual / 60
    lr_now = learning_rate(step - 1)
    print(
        f"step {step}/{max_steps}  loss {loss:.4f}  lr {lr_now:.2e}  grad_norm {norm:.3f}  {rate:,.0f} tokens/s"
        + (f"  mfu {rate / peak_rate:.1%}" if peak_rate else "")
        + f"  {left:.1f} min left"
        + (f"  NOT FINITE: skipped, {state['skipped']} so far" if state["skipped_in_a_row"] else "")
    )
    if step_times[-1] > SLOW * usual:
        print(f"slow: step {step} took {step_times[-1]:.1f} s, {step_times[-1] / usual:.0f} times the median; "
              "is another program busy on this machine, or is it short of memory?")  # fmt: skip
    records.write(
        {
            "step": step,
            "loss": loss,
            "lr": lr_now,
            "maps_lr": lr_now * maps_lr_scale if RESIDUALS[residual].has_maps else None,
            "grad_norm": norm,
            **load,
            "skipped": state["skipped"],
            "step_ms": step_times[-1] * 1e3,
        }
    )


# -- the run --------------------------------------------------------------------------------------------------------


def main():
    """Settings, then the run on this process among however many there are."""
    only_rank_0_prints()
    settings = configure(globals(), RULES, elsewhere=ELSEWHERE, check=check)
    if dry_run:
        settings["vocab_size"] = vocab_size or open_corpora()[0].vocab_size
        try:
            return plan.report(model_config(settings), settings)
        except ValueError as e:
            fail(str(e))
    train_data, val_data = open_corpora()
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on every machine
        train_data.check_in_background()
        val_data.check_in_background()
    try:
        ranks = start(parallel, resolve_device(device), shard_size, rank_timeout, expert_size, pipeline_size)
    except ValueError as e:
        fail(str(e))
    try:
        with ranks:
            train(settings, train_data, val_data, ranks)
    except Exception as e:
        if not type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        if run_folder.Stop.heard:  # the terminal's Ctrl-C goes to the C++ compiler too
            raise program.Stopped(run_folder.Stop.heard) from None
        sys.exit(f"error: compile={compile}: torch could not compile the sublayers: {str(e).splitlines()[0]}; set "
                 "compile=False, or find out more with TORCHDYNAMO_VERBOSE=1 and a small model")  # fmt: skip


def train(settings, train_data, val_data, ranks):
    """The run, from top to bottom."""
    model = design_model(settings, train_data.vocab_size, ranks)
    # whose run is in out_dir, before a byte of it is touched or memory is taken
    origin, folder = provenance(settings, train_data, val_data), resume_folder()
    changed = run_folder.same_run(out_dir, folder, origin)
    ranks.build_pipeline(model, pipeline_schedule, lambda: autocast(ranks.device), pipeline_overlap)
    ranks.shard(model, dtype, reduce_dtype, recompute)
    ranks.initialise(model, None if folder else seed)  # a checkpoint brings all values
    net, optimizer = ranks.wrap(model), make_optimizer(model)
    first, state = begin(folder, model, optimizer, changed, origin)
    # from here on Ctrl-C and SIGTERM are wishes, granted between two steps
    records, profiler, stop = Log(settings, ranks.is_main), start_profiler(ranks.is_main), run_folder.Stop(ranks.device)
    how = f" (impl {resolve_impl(impl, ranks.device, n_streams)})" if RESIDUALS[residual].has_maps else ""
    size = f"{model.num_params()['total']:,} parameters"
    head = f", head's loss by {head_loss}" if head_loss != "chunked" else ""
    products = (", products in FP8" + (", emulated" if ranks.device.type == "cpu" else "")) if fp8 else ""
    compiled = "compiled" if compiles(ranks.device.type) else "not compiled"
    how = f"{dtype}{products}{head}, sublayers {compiled}, residual {residual}{how}"
    print(f"{ranks.device.type}, {how}, {size} -> {out_dir}")
    peak_rate = tokens_at_peak(model, ranks)

    batches, step_times = Batches(train_data, ranks), []
    with profiler:
        for step in range(first, max_steps + 1):  # `step` steps are done; the last turn evaluates and saves
            stopping, last = stop(), step == max_steps
            # evaluate before the step: step 0 shows the untrained model, and the gradients of the step before are still
            # there for the alarms. A resumed run does not do again what its checkpoint says is done
            if (step % eval_interval == 0 or last) and state["evaluated"] != step and not stopping:
                state["val_loss"] = evaluate(model, step, val_data, ranks, step_times, records)
                state["evaluated"] = step
            # save after it: the checkpoint then knows its validation loss, and so whether it is the best. Nothing new
            # is there at `first`, which is untrained, or was just loaded
            if (step % checkpoint_interval == 0 or last or stopping) and step > first:
                save(step, model, optimizer, settings, state, records)
            if last or stopping:
                break

            # one step, timed as a whole: the .item() of loss and norm inside wait for the device
            began = time.perf_counter()
            loss = forward_backward(net, batches, step, ranks)
            norm, load = optimizer_step(model, optimizer, step, loss, ranks)
            step_times.append(time.perf_counter() - began)

            # every process sees the same loss and norm, so all skip together, and all give up together
            finite = math.isfinite(loss) and math.isfinite(norm)
            state["skipped"] += not finite
            state["skipped_in_a_row"] = 0 if finite else state["skipped_in_a_row"] + 1
            report_step(step + 1, loss, norm, load, step_times, peak_rate, records, state)
            if state["skipped_in_a_row"] == SKIPPED_IN_A_ROW:
                sys.exit(f"error: {SKIPPED_IN_A_ROW} steps in a row were not finite; lower lr, or set grad_clip")
            if profile and ranks.is_main:
                profiler.step()
    for corpus in (train_data, val_data):
        if corpus.bytes_checked < corpus.bytes:
            print(
                f"{corpus.data_dir}: of split {corpus.split!r} {corpus.bytes_checked / 1e9:.1f} of "
                f"{corpus.bytes / 1e9:.1f} GB were compared with meta.json's sha256 by now"
            )
    if first >= max_steps:
        print(f"nothing to do: {out_dir} has {first} of {max_steps} steps; raise max_steps, or --init_from=scratch")
    elif stopping:
        print(f"stopped by a signal after step {step}; the same command goes on from there")


if __name__ == "__main__":
    program.run(main, checkpoint.CheckpointError, DataError, owned.NotOurs)
