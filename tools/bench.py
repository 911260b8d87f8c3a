"""Timings and counts, each a subcommand:

    python tools/bench.py                                  # lists the subcommands
    python tools/bench.py cpu                              # what HC and mHC add on this CPU: to the demo, to a block
    python tools/bench.py cpu --widths=512 --rounds=15 --profile=True
    python tools/bench.py eval                             # 4-choice scoring with and without shared prefixes
    python tools/bench.py generate                         # one more token after 512: with the latent cache and without
    python tools/bench.py step                             # one training step of the demo's model, here and now
    python tools/bench.py rival                            # that of the baseline beside transformers' DeepseekV3
    python tools/bench.py neighbour                        # the same beside busy programs, by how threads wait
    python tools/bench.py pipeline                         # a pipeline step on paper: bubble, wire, micro-batches held
    python tools/bench.py roofline                         # a micro-batch on paper: launches, bytes, FLOPs, MFU
    python tools/bench.py kernels                          # what compilers make of the Triton kernels; nothing is run
    python tools/bench.py traffic                          # bytes the Triton kernels ask for, by its interpreter
    python tools/bench.py gpu                              # times of the Triton kernels; needs a GPU

Every figure printed is measured in the run that prints it. Rivals are timed in one process and in turn, so that a slow
minute of the machine hits all of them alike; the median is reported with its spread.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules in the root
import program

if __name__ == "__main__":
    program.begin()  # before torch, and before anything that takes long to import

import os
import re
import runpy
import statistics
import subprocess
import time

import torch

import pipeline
from configurator import above, at_least, between, configure, fail, one_of, read_file
from layers import MLA, LatentCache, MoE, RMSNorm, rope_angles
from model import GPT, RESIDUALS, GPTConfig
from plan import BANDWIDTH, peak_flops
from tools import kernel_report, pipeline_report, rivals, roofline

# bench.py cpu
widths = "64,512,1280"  # widths C to time: 64 (a step of the demo), 512 (a small MoE's block), 1280 (the 3B's)
tokens = 2048  # tokens in the batch of a block
seq_len = 2048  # tokens in one sequence of a block
blocks = 0  # blocks in a row, with maps of their own; 0: one, and at width 64 the demo's ten
impls = "ref,eager"  # of mHC
rounds = 9  # timed rounds; each times every variant once
threads = 0  # CPU threads, 0: what torch chooses
profile = False  # print torch.profiler's table of each variant instead of times
seed = 0
# bench.py eval
questions = 4  # of four choices each
shot_tokens = 2000  # tokens of the examples in front of every question
question_tokens = 60
choice_tokens = 25
# bench.py generate
context = 512  # tokens before the one that is timed; one of them is run, so 2 at least
# bench.py pipeline
config = "config/mhc_27b.py"  # the model
pipeline_size = 8
pipeline_schedule = "dualpipev"
micro_batches = 160  # of a step, on each rank
card = "H100"
mfu = 0.4  # the share of its peak FLOP/s that is used
memory_share = 0.8  # and of its memory's bandwidth
link = 40.0  # GB/s between two stages
# bench.py roofline: config, card, mfu (here of matrix products alone) and memory_share as above, and
launch_us = 5.0  # microseconds of the host for one operation

RULES = {
    **dict.fromkeys(("tokens", "seq_len"), at_least(1, 2**20)),
    **dict.fromkeys(("questions", "question_tokens", "choice_tokens"), at_least(1, 10**5)),
    "threads": at_least(0, 1024), "blocks": at_least(0, 100), "shot_tokens": at_least(0, 10**5),
    "rounds": at_least(2, 10**5), "context": at_least(2, 10**5), "seed": between(0, 2**63 - 1),
    "pipeline_size": at_least(2, 256), "pipeline_schedule": one_of(*pipeline.SCHEDULES),
    "micro_batches": at_least(1, 10**4), "card": one_of(*BANDWIDTH), "link": above(0, 10**5),
    "launch_us": above(0, 10**4),
    **dict.fromkeys(("mfu", "memory_share"), between(0.001, 1)),
}  # fmt: skip


def some_of(name, known):
    """A setting like '512,1280' as a list of strings; one that is not in `known` ends the program."""
    values = globals()[name].split(",")
    if unknown := [v for v in values if v not in known]:
        fail(f"{name}={globals()[name]!r}: wanted some of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    return values


def time_in_turn(functions, rounds, warmup=1):
    """{name: function without arguments} -> {name: [seconds, one a round]}; every round calls every function once."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values):
    """Half the distance between the quartiles: a spread that one bad round cannot move. Needs two values or more."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


# ----------------------------------------------------------------------------------------------------------------------
# bench.py cpu. At C = 64, a training step of the demo. Wider: one block in the middle of a model, MLA and MoE, with
# every kind of residual connection around the same two sublayers (the same weights: the kinds differ in nothing else).
# The block is timed as the middle of a deep model sees it: two boundaries, from the streams x and the output y of the
# sublayer before it to its own x and y, forward, and backward from a gradient of each.

DEMO = 64


def demo_step(**residual):
    """A function that takes one training step of the demo's model: forward, backward, AdamW. residual: settings."""
    s = runpy.run_path(str(Path(__file__).resolve().parent.parent / "config/demo.py"))
    shape = {k: v for k, v in s.items() if k in GPTConfig.__dataclass_fields__}
    shape["n_layer"] = blocks or shape["n_layer"]
    model = GPT(GPTConfig(**shape, vocab_size=2048, **residual))
    model.init_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    idx = torch.randint(2048, (s["micro_batch_size"], s["seq_len"]), generator=torch.Generator().manual_seed(seed))

    def step():
        model.zero_grad()
        model(idx, idx)[1].backward()
        optimizer.step()

    return step


def demo_variants():
    """{name: function that takes a step}, baseline first."""
    made = {"baseline": dict(residual="baseline"), "HC": dict(residual="hc")}
    made |= {f"mHC {impl}": dict(residual="mhc", impl=impl) for impl in impls.split(",")}
    made["mHC single-pass"] = dict(residual="mhc", single_pass=True)
    return {name: demo_step(**settings) for name, settings in made.items()}


SHAPES = {  # what depends on the width; 1280 is the 3B model of Table 5
    512: dict(n_head=8, n_routed_experts=16, moe_intermediate_size=352),
    1280: dict(n_head=16, n_routed_experts=64, moe_intermediate_size=896),
}
MIDDLE = 1  # the first block that is timed: the model's first and last have maps without effect


def block_config(C, **residual):
    return GPTConfig(
        vocab_size=2, seq_len=seq_len, n_layer=2 + (blocks or 1), n_embd=C, first_k_dense_replace=0,
        num_experts_per_tok=6, n_shared_experts=2, kv_lora_rank=512, **SHAPES[C], **residual,
    )  # fmt: skip


def block_parts(config, make, block=MIDDLE):
    """The parts of a block that `make()` builds, with the values the model's own initialisation gives them.

    make(): {name inside the block: module}. Nothing else of the model takes memory.
    """
    with torch.device("meta"):
        gpt = GPT(config)
    parts = make()
    for part, module in parts.items():
        for name, p in module.named_parameters():
            p.data.copy_(gpt.initial_value(f"layers.{block}.{part}.{name}", p.shape, seed))
    return list(parts.values())


def block_sublayers(C):
    """The pairs (norm, F) that all variants share: two for each block, the same two, since they cost the same."""
    config = block_config(C, residual="baseline")
    attn_norm, attn, mlp_norm, mlp = block_parts(config, lambda: {
        "input_layernorm": RMSNorm(C, config.norm_eps), "self_attn": MLA(config),
        "post_attention_layernorm": RMSNorm(C, config.norm_eps), "mlp": MoE(config),
    })  # fmt: skip
    rope = rope_angles(torch.arange(seq_len).unsqueeze(0), config.qk_rope_head_dim, config.rope_theta)
    pairs = [(attn_norm, lambda x: attn(x, rope)), (mlp_norm, mlp)]
    return pairs * (blocks or 1), [attn_norm, attn, mlp_norm, mlp]


def make_variant(C, sublayers, **residual):
    """-> (forward, leaves, modules): forward(*leaves) runs the block; the modules' gradients are computed too."""
    config = block_config(C, **residual)
    kind = RESIDUALS[config.residual]
    residuals = []
    for i in range(MIDDLE, MIDDLE + (blocks or 1)):
        make = lambda i=i: {"attn_residual": kind(config, 2 * i), "mlp_residual": kind(config, 2 * i + 1)}  # noqa: E731
        residuals += block_parts(config, make, i)
    B, n = tokens // seq_len, config.n_streams
    torch.manual_seed(seed)  # the same numbers for every variant of one shape
    leaves = [torch.randn(B, seq_len, n, C), torch.randn(B, seq_len, C)]
    with torch.no_grad():
        carry = residuals[0](leaves[0], None, None)[2] or ()  # its shapes; its values would be one kind's own
    leaves += [torch.randn(t.shape).softmax(-1) for t in carry]

    def forward(x, y, *carry):
        carry = carry or None
        for connection, (norm, f) in zip(residuals, sublayers, strict=True):
            x, x_in, carry = connection(x, y, carry)
            y = f(norm(x_in))
        return [x, y, *(carry or ())]

    return forward, leaves, residuals


def make_package_variant(C, sublayers):
    """The hyper-connections package's mHC around the same sublayers, or None when it is not installed."""
    try:
        from hyper_connections import mHC
    except ModuleNotFoundError:
        return None
    connections = [
        mHC(4, dim=C, layer_index=s, sinkhorn_iters=20) for s in range(2 * MIDDLE, 2 * MIDDLE + len(sublayers))
    ]

    def forward(x):
        for connection, (norm, f) in zip(connections, sublayers, strict=True):
            x_in, add = connection(x)
            x = add(f(norm(x_in)))
        return [x]

    return forward, [torch.randn(tokens // seq_len * 4, seq_len, C)], connections  # streams inside the batch


def forward_backward(variant, shared):
    """A function that runs a variant forward and backward once, gradients of all parameters and inputs included."""
    forward, leaves, modules = variant
    leaves = [v.requires_grad_() for v in leaves]
    parameters = [p for module in (*modules, *shared) for p in module.parameters()]
    with torch.no_grad():
        out = forward(*leaves)
    torch.manual_seed(seed + 1)
    gradients = [torch.randn_like(v) for v in out]

    def step():
        for v in (*leaves, *parameters):
            v.grad = None
        torch.autograd.backward(forward(*leaves), gradients)

    return step


def cpu_variants(C):
    """{name: forward-and-backward function}, baseline first; and {name: note printed next to its timing}."""
    sublayers, shared = block_sublayers(C)
    made = {name: make_variant(C, sublayers, residual=name.lower()) for name in ("baseline", "HC")}
    for impl in impls.split(","):
        made[f"mHC {impl}"] = make_variant(C, sublayers, residual="mhc", impl=impl)
    made["mHC single-pass"] = make_variant(C, sublayers, residual="mhc", single_pass=True)
    made["mHC hyper-connections"] = make_package_variant(C, sublayers)
    if made["mHC hyper-connections"] is None:
        print("the package hyper-connections is not installed: not timed (pip install hyper-connections)")
    variants, notes = {}, {}
    for name, variant in made.items():
        if variant is None:
            continue
        variants[name] = forward_backward(variant, shared)
        variants[name]()
        if name == "mHC ref":
            truth = own_gradients(variant)
        elif name == "mHC eager" and "mHC ref" in made:
            pairs = zip(own_gradients(variant), truth, strict=True)
            notes[name] = f"gradients within {max(((a - b).norm() / b.norm()).item() for a, b in pairs):.0e} of ref's"
    return variants, notes


def own_gradients(variant):
    """Copies of the gradients that a variant shares with no other: of its inputs and of its residual connections."""
    _, leaves, modules = variant
    return [v.grad.clone() for v in (*leaves, *(p for module in modules for p in module.parameters()))]


def added(values, base):
    """Percent added to the baseline, one a round: within a round, so that the machine's drift cancels."""
    return [100 * (v / b - 1) for v, b in zip(values, base, strict=True)]


def overhead(C, in_a_row, many, how_many_tokens):
    """What `cpu` measures, for a row of `experiments.py overhead` -> {name: number}, of variants in percent.

    in_a_row: blocks. Sets this module's settings, and the tokens of a block are those of one sequence."""
    global blocks, tokens, seq_len
    blocks, tokens, seq_len = in_a_row, how_many_tokens, how_many_tokens
    torch.manual_seed(seed)
    seconds = time_in_turn(demo_variants() if C == DEMO else cpu_variants(C)[0], many)
    base, found = seconds.pop("baseline"), {"threads": torch.get_num_threads(), "rounds": many}
    found["baseline_ms"] = round(1e3 * statistics.median(base), 2)
    for name, values in seconds.items():
        more = added(values, base)
        found |= {name: round(statistics.median(more), 2), f"{name} ±": round(spread(more), 2)}
    return found


def print_cpu_table(C, seconds, notes):
    what = f"{blocks or 1} x one block (MLA + MoE), {tokens} tokens of {seq_len}, forward + backward"
    base = seconds["baseline"]
    if C == DEMO:
        deep = f"{blocks} blocks of " if blocks else ""
        what = f"a training step of {deep}the demo, its own tokens, AdamW included"
    print(f"\nC = {C}, n = 4, fp32, {torch.get_num_threads()} threads: {what}")
    print(f"medians of {rounds} rounds in turn, +- half the quartile range")
    print(f"{'':24} {'ms':>8} {'+-':>6} {'added to baseline':>19} {'+-':>6}")
    for name, values in seconds.items():
        more = added(values, base)
        line = f"{name:24} {1e3 * statistics.median(values):8.1f} {1e3 * spread(values):6.1f}"
        if name != "baseline":
            line += f" {statistics.median(more):17.1f} % {spread(more):6.1f}"
        print(line + f"   {notes.get(name, '')}".rstrip())


def cpu():
    """What HC and mHC add on this CPU: to a training step of the demo (C = 64), and to one wider block."""
    if tokens % seq_len:
        fail(f"tokens={tokens}: wanted a multiple of seq_len={seq_len}")
    some_of("impls", ("ref", "eager"))  # those that run on a CPU
    chosen = [int(C) for C in some_of("widths", list(map(str, (DEMO, *SHAPES))))]  # only these have a shape
    if chosen == [DEMO] and (tokens, seq_len) != (2048, 2048):
        fail(f"tokens={tokens}, seq_len={seq_len}: wanted none of them with widths={DEMO}: the demo has its own")
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(seed)
    for C in chosen:
        variants, notes = (demo_variants(), {}) if C == DEMO else cpu_variants(C)
        if not profile:
            print_cpu_table(C, time_in_turn(variants, rounds), notes)
        for name, step in variants.items() if profile else ():
            print_profile(f"C = {C}, {name}", step)


def print_profile(title, step):
    """torch.profiler's table of one call of step."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        step()
    print(f"\n{title}")
    print(p.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


# ----------------------------------------------------------------------------------------------------------------------
# bench.py eval

CONTEXT = 4096  # tokens; a longer prompt would be cut on the left and share nothing


def evaluation():
    """4-choice questions behind long few-shot prompts: whole sequences, and shared prefixes (evals/score.py)."""
    from evals.score import Runner, loglikelihoods

    if threads:
        torch.set_num_threads(threads)
    longest = shot_tokens + question_tokens + choice_tokens
    if longest > CONTEXT:
        fail(f"shot_tokens + question_tokens + choice_tokens = {longest}: wanted at most {CONTEXT}, the context")
    model = GPT(GPTConfig(vocab_size=2048, seq_len=CONTEXT, n_layer=2, n_embd=128, n_head=4, kv_lora_rank=64,
                          qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, intermediate_size=384,
                          n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=96))  # fmt: skip
    model.init_weights(seed)
    gen = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(2048, (n,), generator=gen).tolist()  # noqa: E731
    shots = draw(shot_tokens)
    prompts = [shots + draw(question_tokens) for _ in range(questions)]
    items = [[(prompt, draw(choice_tokens)) for _ in range(4)] for prompt in prompts]
    runner, found = Runner(model.requires_grad_(False)), {}

    def score(name, groups, share):
        found[name] = [lp for item in loglikelihoods(runner, items, groups, share=share) for lp, _ in item]

    seconds = time_in_turn({
        "whole sequences": lambda: score("whole", None, False),
        "each question's prefix once": lambda: score("question", list(range(questions)), True),
        "the examples once, too": lambda: score("all", None, True),
    }, rounds)  # fmt: skip
    print(f"{questions} questions, 4 choices of {choice_tokens} tokens behind {shot_tokens} + {question_tokens}; "
          f"{torch.get_num_threads()} threads, median of {rounds}")  # fmt: skip
    whole = statistics.median(seconds["whole sequences"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"  {name:<28} {median:8.3f} s ± {spread(values):.3f}   {whole / median:5.1f} x")
    for name in ("question", "all"):
        apart = max(abs(a - b) for a, b in zip(found["whole"], found[name], strict=True))
        print(f"  largest difference of a log-probability from 'whole': {apart:.1e} ({name})")


# ----------------------------------------------------------------------------------------------------------------------
# bench.py generate: the next token after `context` tokens, greedily, by two ways that sample.py could go

GENERATORS = {  # the demo's model (config/demo.py), and one eight times as wide
    64: dict(n_head=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, intermediate_size=192,
             n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=48),
    512: dict(n_head=8, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
              intermediate_size=1536, n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=256),
}  # fmt: skip


def next_token(model):
    """{name: function}, each of which makes the token after the same `context` tokens; both see the same ones."""
    idx = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(seed))
    cache = LatentCache(model.config, 1, context)
    model.hidden(idx[:, :-1], cache)
    before = cache.length.clone()

    def cached():
        cache.length, cache.most = before.clone(), context - 1  # every call writes the last position anew
        return model.lm_head(model.hidden(idx[:, -1:], cache)[:, -1]).argmax(-1)

    return {"cached": cached, "whole again": lambda: model.lm_head(model.hidden(idx)[:, -1]).argmax(-1)}


@torch.inference_mode()
def generate():
    """One more token after a context: MLA's compressed cache against a whole forward, on this CPU."""
    torch.set_num_threads(threads or torch.get_num_threads())
    print(f"one token after {context}, one sequence, fp32, 12 blocks; {torch.get_num_threads()} threads, "
          f"median of {rounds} rounds in turn")  # fmt: skip
    for C, shape in GENERATORS.items():
        for residual in RESIDUALS:
            model = GPT(GPTConfig(vocab_size=2048, n_layer=12, n_embd=C, residual=residual, **shape))
            model.init_weights(seed)
            seconds = time_in_turn(next_token(model.eval()), rounds)
            (fast, slow), ways = map(statistics.median, seconds.values()), seconds.values()
            error, other = (1e3 * spread(v) for v in ways)
            print(f"  C = {C:<4} {residual:<9} cached {1e3 * fast:7.2f} ms ± {error:.2f} ({1 / fast:.0f} tokens/s)   "
                  f"whole again {1e3 * slow:7.1f} ms ± {other:.1f}   {slow / fast:5.1f} x")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# bench.py step, bench.py neighbour: what the waiting of OpenMP's threads costs (see program.py)


def step():
    """One training step of the demo's model with mHC: forward, backward, AdamW."""
    torch.set_num_threads(threads or torch.get_num_threads())
    seconds = time_in_turn({"step": demo_step()}, rounds)["step"]
    print(f"{torch.get_num_threads()} threads, median of {rounds} steps {1e3 * statistics.median(seconds):.1f} ms "
          f"± {1e3 * spread(seconds):.1f}")  # fmt: skip


def rival():
    """A training step of the baseline and of transformers' DeepseekV3 of the same weights, at two models' sizes."""
    torch.set_num_threads(threads or torch.get_num_threads())
    root = Path(__file__).resolve().parent.parent
    for name, vocab_size in (("demo", 2048), ("cpu_15min", 4096)):
        rivals.report(name, runpy.run_path(str(root / f"config/{name}.py")), vocab_size, rounds, seed)


BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    pass"  # a neighbour ends with its parent
STEP = "import sys; sys.argv = ['bench.py']; from tools import bench; bench.rounds = {}; bench.step()"
WAITS = {"unset": {}, "ours": {"GOMP_SPINCOUNT": program.SPINS}, "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}
TOO_LONG = 120  # seconds for a process with its neighbours; unset has been seen to take many minutes


def timed_step(wait):
    """Median ms of `step` in a process of its own, which alone can choose how its threads wait; inf: TOO_LONG."""
    chosen = {name for names in WAITS.values() for name in names}
    env = {k: v for k, v in os.environ.items() if k not in chosen} | WAITS[wait]
    command, root = [sys.executable, "-c", STEP.format(rounds)], Path(__file__).resolve().parent.parent
    try:
        said = subprocess.run(command, env=env, cwd=root, check=True, capture_output=True, text=True, timeout=TOO_LONG)
    except subprocess.TimeoutExpired:
        return float("inf")
    return float(re.search(r"steps ([0-9.]+) ms", said.stdout)[1])


def neighbour():
    """What busy programs on all cores cost a training step, by how threads wait: unset, our default, PASSIVE."""
    cores, found = os.cpu_count(), {}
    print(f"medians of 5 processes in turn, each the median of {rounds} steps (bench.py step); {cores} cores")
    for _ in range(5):
        for busy in (0, cores):
            neighbours = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
            try:
                for wait in WAITS:
                    if found.get((busy, wait), [0])[-1] < float("inf"):  # once is enough
                        found.setdefault((busy, wait), []).append(timed_step(wait))
            finally:
                for process in neighbours:
                    process.kill()
                    process.wait()
    print_neighbours(found, cores)


def print_neighbours(found, cores):
    """The default may cost a quiet machine 3 % over unset, and a busy one 1.4 times PASSIVE."""
    for busy, against in ((0, "unset"), (cores, "PASSIVE")):
        for wait in WAITS:
            times, rival = found[busy, wait], found[busy, against]
            if times[-1] == float("inf"):
                print(f"  {busy} busy neighbours, {wait:<8} not done in {TOO_LONG} s")
                continue
            ratios = [a / b for a, b in zip(times, rival, strict=True)]
            print(f"  {busy} busy neighbours, {wait:<8} {statistics.median(times):8.1f} ms, "
                  f"{statistics.median(ratios):.3f} ± {spread(ratios):.3f} of {against}")  # fmt: skip


def simulate_pipeline():
    """A pipeline step on paper, from assumed times: baseline, n = 4, single-pass; bubble, wire, what is held."""
    stages = pipeline_size if pipeline_schedule == "1f1b" else 2 * pipeline_size
    if pipeline_schedule == "dualpipev" and micro_batches < stages:
        fail(f"micro_batches={micro_batches}: 'dualpipev' wants at least as many as stages, {stages}")
    given = {k: v for k, v in read_file(config).items() if k in GPTConfig.__dataclass_fields__}
    assumed = {
        "tokens": tokens, "peak": peak_flops(card), "mfu": mfu, "bandwidth": BANDWIDTH[card], "share": memory_share,
        "link": link * 1e9, "bytes": 2,
    }  # fmt: skip
    pipeline_report.report(GPTConfig(**given), pipeline_size, pipeline_schedule, micro_batches, assumed)


def settings_of(path):
    """A config file's settings on top of train.py's; vocab_size must be among them."""
    import train  # for the settings that a config leaves as they are

    settings = {k: v for k, v in vars(train).items() if not k.startswith("_") and type(v) in (bool, int, float, str)}
    settings |= read_file(path)
    if not settings["vocab_size"]:
        fail(f"config={path!r}: sets no vocab_size, which is its corpus' then: wanted one that does")
    return settings


def print_roofline():
    """One micro-batch on paper: what each part launches, moves and computes, the least time for it, and the MFU."""
    roofline.report(config, settings_of(config), card, mfu, memory_share, launch_us)


def predicted(path, card):
    """Percent that each form adds to the baseline's micro-batch on a card, on paper -> {name: number}."""
    _, forms = roofline.by_form(settings_of(path), card, mfu, memory_share)
    base = sum(forms.pop("baseline").values(), roofline.Part())
    found = {"mfu": mfu, "memory_share": memory_share}
    for name, parts in forms.items():
        total = sum(parts.values(), roofline.Part())
        found[f"{name}, at the peaks"] = round(100 * (total.least / base.least - 1), 2)
        found[name] = round(100 * (total.likely / base.likely - 1), 2)
    return found


def kernels():
    """What the compilers make of the Triton kernels, for three NVIDIA chips and one of AMD."""
    kernel_report.main("compile")


def traffic():
    """Bytes the Triton kernels ask for at one boundary, forward and backward."""
    kernel_report.main("traffic")


def gpu():
    """Times of the Triton kernels, against a copy and against the twin, plain and compiled; needs a GPU."""
    kernel_report.main("gpu")


def retune():
    """Block sizes of the Triton kernels, tried and timed for the table in sinkhorn_kernel.py; needs a GPU."""
    kernel_report.main("retune")


COMMANDS = {f.__name__: f for f in (cpu, generate, step, rival, neighbour, kernels, traffic, gpu, retune)} | {
    "eval": evaluation,
    "pipeline": simulate_pipeline,
    "roofline": print_roofline,
}
SETTINGS = {  # what each reads; the others read none
    "cpu": ("widths", "tokens", "seq_len", "blocks", "impls", "rounds", "threads", "profile", "seed"),
    "eval": ("questions", "shot_tokens", "question_tokens", "choice_tokens", "rounds", "threads", "seed"),
    "generate": ("context", "rounds", "threads", "seed"),
    "step": ("rounds", "threads", "seed"),
    "rival": ("rounds", "threads", "seed"),
    "neighbour": ("rounds",),
    "pipeline": tuple("config pipeline_size pipeline_schedule micro_batches tokens card mfu memory_share link".split()),
    "roofline": ("config", "card", "mfu", "memory_share", "launch_us"),
}


def main():
    names = ", ".join(COMMANDS)
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        for name, function in COMMANDS.items():
            print(f"  python tools/bench.py {name:<10} {function.__doc__.splitlines()[0]}")
        if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
            raise SystemExit(0)
        print(f"error: {sys.argv[1]!r}: wanted one of {names} as the first argument", file=sys.stderr)
        raise SystemExit(2)
    name, defaults = sys.argv.pop(1), dict(globals())
    settings = configure(globals(), RULES)
    mine = SETTINGS.get(name, ())
    if foreign := [k for k, v in settings.items() if v != defaults[k] and k not in mine]:
        fail(f"tools/bench.py {name} does not use {', '.join(foreign)}; it reads {', '.join(mine) or 'no settings'}")
    COMMANDS[name]()


if __name__ == "__main__":
    program.run(main)
