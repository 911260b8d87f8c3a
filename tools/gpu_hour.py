"""Everything that a GPU has to prove here, in nine minutes: `make gpu`.

    python3 tools/gpu_hour.py                             # all stages; the numbers go to gpu.json
    python3 tools/gpu_hour.py --stages=versions,kernels --out=other.json
    python figures.py gpu.json --figure=roofline          # draws them

Runs under the machine's own python3: torch, Triton and numpy are all it imports, beside what lies in this repository;
the training also needs safetensors, for its checkpoint, and `tests` a pytest, which the forms of the boundary do not.

A stage is a process of its own with some seconds to spend, forked before anything has touched the GPU: one that fails,
hangs or breaks its context costs its own numbers and no other's. It prints as it goes, and what it said is kept, also
of one that was ended. The numbers are written after every stage. The exit code is 1 if any stage failed or ran out of
its seconds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules in the root
import program

if __name__ == "__main__":
    program.begin()  # before torch

import gc
import hashlib
import importlib.util
import json
import math
import os
import platform
import select
import signal
import statistics
import subprocess
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from multiprocessing import get_context

import numpy as np
import torch

import mhc
import mhc_gpu
import mhc_ref
import owned
from configurator import above, configure, fail, read_file, some
from data import ends_sha256, shard_header
from model import GPT, GPTConfig
from records import GPU_REPORT, METRIC, RecordError, read_json, read_lines
from tools import kernel_report
from tools.kernel_report import example, one_hot

out = "gpu.json"  # where the numbers go
stages = ""  # some of the stages, with commas between; empty: all
seconds = 515.0  # for all of them; importing torch comes before
RULES = {"out": some("a file"), "seconds": above(0, 86400)}

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda"
SIZES = {  # a test makes them small
    "C": 2560, "n": 4, "tokens": 8192, "ladder": (4096, 8192, 16384, 32768), "copy": 2**30, "gemm": 8192,
    "heads": ((192, 128, 16, 4096), (96, 64, 12, 1024)),  # of a query, of a value, how many, tokens
    "blocks_3b": 3, "vocab_3b": 8192, "micro_batch": 0, "steps": 5, "train": (32, 30),
    "jobs": min(16, os.cpu_count() or 1),  # processes that compile: each has a context on the GPU
}  # fmt: skip
FORMS = {
    "baseline": {"residual": "baseline"}, "HC": {"residual": "hc"}, "mHC": {"residual": "mhc"},
    "single-pass": {"residual": "mhc", "single_pass": True},
}  # fmt: skip


# -- what a stage says, and its clock ---------------------------------------------------------------------------------

heard = {"made_by": "mhc", "what": "gpu", "stages": {}}  # gpu.json; a stage sees what those before it said
line = None  # a stage's own end of the pipe to the process that started it


def say(**record):
    """Print a record, and have it kept; a number that is none is kept as null, which JSON has a word for."""
    print("  " + "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()))
    kept = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    if line is not None:
        print(json.dumps(kept), file=line, flush=True)


def said(stage, **having):
    """The records of an earlier stage that have these values."""
    records = heard["stages"].get(stage, {}).get("records", [])
    return [r for r in records if all(r.get(k) == v for k, v in having.items())]


def synchronise():
    torch.cuda.synchronize()


def eager_ms(function, rounds=10):
    """Median wall-clock ms of a call, the host's time with it."""
    times = []
    for _ in range(rounds + 2):
        synchronise()
        start = time.perf_counter()
        function()
        synchronise()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def graph_ms(function, budget=150.0):
    """Median ms of a call replayed from a CUDA graph: the GPU's time alone."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    synchronise()
    with torch.cuda.graph(graph, stream=stream):
        function()
    once = max(eager_ms(graph.replay, 1), 1e-3)
    times, start, end = [], *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(max(5, min(50, int(budget / once)))):
        start.record()
        graph.replay()
        end.record()
        synchronise()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_GB(function):
    """The most memory that tensors had during a call."""
    torch.cuda.reset_peak_memory_stats()
    function()
    synchronise()
    return torch.cuda.max_memory_allocated() / 1e9


def attempt(what, function, failures):
    """One of several things of a stage: its error is said, and the others go on."""
    try:
        return function()
    except Exception as e:
        failures.append(f"{what}: {type(e).__name__}: {' '.join(str(e).split())[:300]}")
        say(what=what, error=failures[-1])


def end_with(failures):
    if failures:
        raise RuntimeError(f"{len(failures)} failed; the first: {failures[0]}")


# -- the stages -------------------------------------------------------------------------------------------------------


def command(*args):
    """What a command prints, or why it did not."""
    try:
        done = subprocess.run(args, capture_output=True, text=True, timeout=10, cwd=ROOT)
        return done.stdout.strip() or done.stderr.strip()[:200]
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"unknown ({type(e).__name__})"


def versions():
    """The machine and its software."""
    triton = sys.modules.get("triton")
    say(python=platform.python_version(), torch=torch.__version__, triton=getattr(triton, "__version__", "none"),
        numpy=np.__version__, cuda=str(torch.version.cuda), hip=str(torch.version.hip),
        commit=command("git", "rev-parse", "--short", "HEAD"))  # fmt: skip
    say(driver=command("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"))
    say(**card())


def card():
    p = torch.cuda.get_device_properties(0)
    return {"card": p.name, "processors": p.multi_processor_count, "memory_GB": p.total_memory / 1e9,
            "capability": f"{p.major}.{p.minor}", "cudnn": str(torch.backends.cudnn.version())}  # fmt: skip


def ceilings():
    """What copies and matrix products reach here: the roofs of the picture."""
    x = torch.empty(SIZES["copy"] // 2, dtype=torch.bfloat16, device=DEVICE).normal_()
    y = torch.empty_like(x)
    say(what="copy", GB_s=2 * SIZES["copy"] / graph_ms(lambda: y.copy_(x)) / 1e6)
    g = SIZES["gemm"]
    for M, N, K in ((g, g, g), (2 * g, g // 2, g // 8), (2 * g, g // 16, g // 4)):
        a, b = (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for shape in ((M, K), (K, N)))
        say(what="GEMM", shape=f"{M}x{N}x{K}", TFLOP_s=2 * M * N * K / graph_ms(lambda a=a, b=b: a @ b) / 1e9)


# every form of the boundary: what is called, its twin, and the tensors


def hc_tensors(C, n, T, form):
    x, y, H_post, H_res, *_ = example(C, n, T, device=DEVICE, form=form)
    theta, alpha, b = (torch.randn(*s, device=DEVICE) for s in ((C, n + 2), (3,), (n * n + 2 * n,)))
    return [x, y, H_post, H_res, theta / C**0.5, alpha, b]


def boundary_forms(C, n, T):
    """{form: (kernels, twin, tensors)}; both are called with the tensors."""
    tensors = {form: list(example(C, n, T, device=DEVICE, form=form)) for form in ("first", "middle", "last")}
    single = {form: [*tensors[form], torch.randn(T, n, device=DEVICE)] for form in ("first", "middle")}
    both = mhc_gpu.mhc_step, mhc_ref.mhc_step_ref
    steps = [lambda *t, f=f: f(*t[:7], H_pre=t[7] if len(t) > 7 else None) for f in both]
    hc = [lambda *t: mhc.hc_step(*t, impl="triton"), mhc_ref.hc_step_ref]
    last = [lambda *t, f=f: f(*t[:4]) for f in (mhc_gpu.mhc_post_res, mhc_ref.mhc_post_res_ref)]
    forms = {f"mHC {form}": (*steps, tensors[form]) for form in ("first", "middle")} | {
        "last": (*last, tensors["last"])
    }
    forms |= {f"single-pass {form}": (*steps, single[form]) for form in single}
    return forms | {f"HC {form}": (*hc, hc_tensors(C, n, T, form)) for form in ("first", "middle")}


def outputs_and_grads(f, tensors, dtype=None):
    """f's outputs, and the gradients of a random linear loss over them."""
    tensors = [None if t is None else t.to(dtype or t.dtype).detach().requires_grad_() for t in tensors]
    outs = f(*tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    gen = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=gen).to(torch.bfloat16).to(o) for o in outs]  # exact in every dtype
    leaves = [t for t in tensors if t is not None]
    grads = torch.autograd.grad(outs, leaves, weights)
    return [t.detach() for t in (*outs, *grads)]


def worst(got, want):
    """Largest error, in units of the largest value wanted; infinite where a number is none."""
    if want.numel() == 0:
        return 0.0
    error = ((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
    return math.inf if math.isnan(error) else error


def check_form(form, step, twin, tensors):
    """Values and gradients against fp64: at most twice the error of the twin in the same precision, + 1e-6."""
    runs = (step, None), (twin, None), (twin, torch.float64)
    got, same, exact = (outputs_and_grads(f, tensors, dtype) for f, dtype in runs)
    errors = [(worst(g, e), worst(s, e)) for g, s, e in zip(got, same, exact, strict=True)]
    finite = all(bool(g.isfinite().all()) for g in got)
    good = finite and all(mine <= 2 * its + 1e-6 for mine, its in errors)
    mine, its = max(errors, key=lambda e: e[0] / (2 * min(e[1], 1e9) + 1e-6))
    say(what=form, error=mine, of_twin=its, tensors=len(errors), good=good)
    if not good:
        raise RuntimeError(f"error {mine:.2e}, the twin's {its:.2e}, finite: {finite}")


FORM_NAMES = ("mHC first", "mHC middle", "last", "single-pass first", "single-pass middle", "HC first", "HC middle")


def compile_form(form):
    """Run a form for a few tokens, which leaves its kernels in Triton's cache: they do not depend on their number."""
    step, _, tensors = boundary_forms(SIZES["C"], SIZES["n"], 64)[form]
    outputs_and_grads(step, tensors)


def boundary():
    """Every form of the boundary, values and gradients, against float64."""
    with ProcessPoolExecutor(
        min(8, SIZES["jobs"]), mp_context=get_context("fork")
    ) as pool:  # before this one has a GPU
        attempt("compiling beforehand", lambda: list(pool.map(compile_form, FORM_NAMES)), [])
    failures = []
    forms = boundary_forms(SIZES["C"], SIZES["n"], SIZES["tokens"])
    for form, (step, twin, tensors) in forms.items():
        attempt(form, lambda form=form, how=(step, twin, tensors): check_form(form, *how), failures)
        gc.collect()
    end_with(failures)


def attention():
    """Which backend takes MLA's heads of unequal widths, and what each takes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for D, V, H, T in SIZES["heads"]:
        q, k, v = (torch.randn(4, H, T, w, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) for w in (D, D, V))
        call = lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
        taken = SDPBackend(torch._fused_sdp_choice(q, k, v, None, 0.0, True)).name
        say(what="taken", heads=f"{D}/{V}", backend=taken)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            flops = 4 * H * T * T * (D + V + 3 * D + 2 * V)  # 4 sequences, the causal half
            both = lambda call=call, q=q, k=k, v=v: torch.autograd.grad(call().sum(), (q, k, v))  # noqa: E731
            try:
                with sdpa_kernel([backend]):
                    ms = graph_ms(both)
                say(heads=f"{D}/{V}", backend=backend.name, forward_backward_ms=ms, TFLOP_s=flops / ms / 1e9)
            except RuntimeError as e:
                say(heads=f"{D}/{V}", backend=backend.name, refused=str(e).splitlines()[0][:100])


UNITS = {"single-pass": (10, 19)}  # elements of C a token, forward and backward; of all others mHC's
MHC_UNITS = (14, 24)


def flops_per_token(C, n):
    """Of a boundary forward: mixing, H_post y, reading, the norm, the product with phi. A backward: twice."""
    return C * (2 * n * n + 2 * n + 2 * n + 2 * n + 2 * n * (n * n + 2 * n))


def ours(tensors, hc):
    """{name: (function, its tensors)} of one boundary."""
    return {
        "mHC": (lambda *t: mhc_gpu.mhc_step(*t, 20, 1e-20), tensors),
        "single-pass": (lambda *t: mhc_gpu.mhc_step(*t[:7], 20, 1e-20, t[7]), [*tensors, one_hot(tensors[0])]),
        "HC": (lambda *t: mhc.hc_step(*t, impl="triton"), hc),
    }


def rivals(tensors):
    """Of others. The twin is compiled for one number of tokens, which takes half a minute: not for each."""
    found = {"Liger": (kernel_report.liger_step, tensors)} if kernel_report.has_liger() else {}
    if len(tensors[0]) == SIZES["ladder"][1]:
        twin = torch.compile(mhc_ref.mhc_step_ref, dynamic=False)
        found["twin compiled"] = (lambda *t: twin(*t, 20, 1e-20), tensors)
    return found


def time_boundary(name, step, tensors, T):
    """Forward, and both passes, from CUDA graphs; and the share of the measured bandwidth."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    ones = [torch.ones_like(o) for o in step(*leaves)]
    C, n = SIZES["C"], SIZES["n"]
    forward, backward = UNITS.get(name, MHC_UNITS)
    copy = said("ceilings", what="copy")
    for way, f, units, times in (
        ("forward", lambda: step(*leaves), forward, 1),
        ("forward + backward", lambda: torch.autograd.grad(step(*leaves), leaves, ones), forward + backward, 3),
    ):
        ms, moved = graph_ms(f), units * 2 * C * T
        record = {"what": name, "way": way, "tokens": T, "ms": ms, "GB_s": moved / ms / 1e6}
        record |= {"share": record["GB_s"] / copy[0]["GB_s"]} if copy else {}
        say(**record, TFLOP_s=times * T * flops_per_token(C, n) / ms / 1e9, bytes=moved)


def kernels():
    """Times of one boundary by tokens, then of each kernel, then beside Liger and the twin compiled, as a share of the
    copy's bandwidth. Bytes are what our kernels ask for: of a rival, what it would have moved had it been ours."""
    if not kernel_report.has_liger():
        say(what="Liger", note="is not installed: not timed")
    C, n, failures = SIZES["C"], SIZES["n"], []

    def time_all(chosen):
        for T in SIZES["ladder"]:
            for name, (step, tensors) in chosen(T).items():
                attempt(name, lambda T=T, how=(name, step, tensors): time_boundary(*how, T), failures)
            gc.collect()

    time_all(lambda T: ours(example(C, n, T, device=DEVICE), hc_tensors(C, n, T, "middle")))
    attempt("each kernel", each_kernel, failures)
    time_all(lambda T: rivals(example(C, n, T, device=DEVICE)))
    end_with(failures)


def each_kernel():
    T, C = SIZES["ladder"][-1], SIZES["C"]
    for kernel, ms in kernel_report.kernel_times(example(C, SIZES["n"], T, device=DEVICE)).items():
        say(what=kernel, tokens=T, ms=ms, GB_s=kernel_report.UNITS[kernel] * 2 * C * T / ms / 1e6)


def settings_of(path):
    """A config file's model and its micro-batch, in sequences."""
    given = read_file(str(ROOT / path))
    known = {f.name for f in fields(GPTConfig)}
    return GPTConfig(**{k: v for k, v in given.items() if k in known}), given["micro_batch_size"]


def model_cases():
    """{name: (config, sequences)}: gpt_124m whole, and a stack of the 3B model's blocks under a small vocabulary."""
    small, sequences = settings_of("config/gpt_124m.py")
    large, _ = settings_of("config/mhc_3b.py")
    large = replace(large, n_layer=SIZES["blocks_3b"], vocab_size=SIZES["vocab_3b"])
    return {"gpt_124m": (small, SIZES["micro_batch"] or sequences), "3B blocks": (large, SIZES["micro_batch"] or 4)}


def make_model(config):
    """A GPT on the device: large matrices drawn there, which is what takes long on a host."""
    with torch.device(DEVICE):
        model = GPT(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            large = p.numel() > 10**5 and "residual" not in name
            p.normal_(0, config.init_std) if large else p.copy_(model.initial_value(name, p.shape, 0))
        for gate in model.gates():
            gate.e_score_correction_bias.zero_()
            gate.load.zero_()
    return model


def time_model(case, form, config, sequences, compiled):
    """A step; forward and backward from a CUDA graph; the peak. compiled: the sublayers, as train.py has them."""
    torch.manual_seed(0)
    model = make_model(config)
    if compiled:
        model.compile_sublayers()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    idx = torch.randint(config.vocab_size, (sequences, config.seq_len), device=DEVICE)

    def forward_backward():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(idx, idx)[1]
        loss.backward()

    def step():
        forward_backward()
        adam.step()
        adam.zero_grad()

    step()  # from here on AdamW has its moments
    record = {"what": case, "form": form, "sublayers": "compiled" if compiled else "not compiled"}
    say(**record, tokens=idx.numel(), peak_GB=peak_GB(step), step_ms=eager_ms(step, SIZES["steps"]))
    ms = graph_ms(forward_backward)  # last: one that cannot be captured leaves the rest
    TFLOP_s = model.flops_per_token() * idx.numel() / ms / 1e9
    say(**record, graph_ms=ms, TFLOP_s=TFLOP_s, added=added((case, compiled), form, ms))


BASE = {}  # ms of the baselines


def added(case, form, ms):
    """What a residual connection adds to the baseline, as a fraction; the paper's is .067 for mHC."""
    if form == "baseline":
        BASE[case] = ms
    return ms / BASE[case] - 1 if case in BASE else None


def steps():
    """Step time and peak memory of baseline, HC, mHC and single-pass; gpt_124m last with its sublayers compiled."""
    failures, cases = [], model_cases()
    for case, compiled in [*((case, False) for case in cases), ("gpt_124m", True)]:
        config, sequences = cases[case]
        for form, changes in FORMS.items():
            made = replace(config, **({"n_streams": 4, "single_pass": False} | changes))
            how = case, form, made, sequences, compiled
            attempt(f"{case} {form}", lambda how=how: time_model(*how), failures)
            gc.collect()
    end_with(failures)


def write_corpus(folder, vocab_size, tokens):
    """A corpus of random tokens by Zipf's law: there is something to learn, the frequencies, and no network is used."""
    rng, splits = np.random.default_rng(0), {}
    p = 1 / np.arange(1, vocab_size + 1)
    for split, n in (("train", tokens), ("val", tokens // 8)):
        drawn, path = rng.choice(vocab_size, n, p=p / p.sum()).astype("<u2"), folder / f"{split}_000000.bin"
        path.write_bytes(shard_header(n, drawn.dtype).tobytes() + drawn.tobytes())
        file = {"name": path.name, "tokens": n, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        splits[split] = {"tokens": n, "bytes_per_token": 1.0, "files": [file | {"ends_sha256": ends_sha256(str(path))}]}
    meta = {"format": 1, "vocab_size": vocab_size, "eot": 0, "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta))
    return -(p / p.sum() * np.log(p / p.sum())).sum()


def training():
    """train.py itself on gpt_124m, some steps on random tokens."""
    batch, n = SIZES["train"]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        folder = Path(folder)
        (folder / "data").mkdir()
        entropy = write_corpus(folder / "data", 50257, (batch * n + 64) * 1024)
        run = [sys.executable, "train.py", "config/gpt_124m.py", f"--data_dir={folder}/data", f"--out_dir={folder}/run"]
        run += [f"--batch_size={batch}", f"--max_steps={n}", "--warmup_steps=10", f"--eval_interval={n}"]
        run += [f"--device={DEVICE}"]  # 'auto' would train on a CPU where the GPU cannot be had
        how = ended([*run, "--eval_sequences=16", *TRAIN_FLAGS], STAGES[training] - 8)
        metrics = folder / "run/metrics.jsonl"
        steps = list(read_lines(str(metrics), METRIC, going_on=True)) if metrics.exists() else []
    steps = [r for r in steps if "loss" in r]
    losses, ms = [r["loss"] for r in steps], statistics.median([r["step_ms"] for r in steps] or [0.0])
    say(what="gpt_124m", steps=len(steps), first_loss=(losses or [None])[0], last_loss=(losses or [None])[-1],
        least_loss=float(entropy), step_ms=float(ms), tokens=batch * 1024, train_py=how)  # fmt: skip
    if how != "done" or None in losses or not losses[-1] < losses[0]:
        raise RuntimeError(f"train.py: {how}; losses {losses}: wanted them finite, and the last below the first")


def ended(command, budget):
    """Run a command for so many seconds at most -> how it ended."""
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=budget).returncode
        return "done" if code == 0 else f"ended with exit code {code}"
    except subprocess.TimeoutExpired:
        return f"its {budget} seconds were over"


TRAIN_FLAGS = []  # a test makes the model small


def tests():
    """The rest of `pytest -m gpu`, where there is a pytest."""
    if importlib.util.find_spec("pytest") is None:
        say(what="pytest -m gpu", note="pytest is not installed here: NOT RUN")
        return
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *(TESTS or gpu_tests())]
    k, failed = min(8, SIZES["jobs"]), []  # processes with a share of the tests each: most of the time is compiling
    shares = [subprocess.Popen(run, cwd=ROOT, env=env | {"SHARE_OF_TESTS": f"{i}/{k}"}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(k)]  # fmt: skip
    for i, process in enumerate(shares):
        rows = [row for row in process.communicate()[0].splitlines() if row.strip()]
        print(*("  " + row for row in rows), sep="\n")
        say(what=f"pytest -m gpu, share {i} of {k}", summary=rows[-1] if rows else "")
        failed += [i] if process.returncode not in (0, NO_TESTS) else []
    if failed:
        raise RuntimeError(f"pytest -m gpu failed in shares {failed}")


NO_TESTS = 5  # pytest's exit code where a share is empty
TESTS = []  # a test has its own


def gpu_tests():
    """The files that have tests for a GPU; others import what may not be installed here."""
    return sorted(str(path) for path in (ROOT / "tests").glob("test_*.py") if "DEVICES" in path.read_text())


def retune():
    """The fastest rows of the block table. Compiled by all cores beforehand, spillers dropped, printed by kernel."""
    C, n, T = SIZES["C"], SIZES["n"], SIZES["ladder"][-2]
    pool = ProcessPoolExecutor(SIZES["jobs"], mp_context=get_context("fork"))  # before this process touches the GPU
    try:
        compiled = kernel_report.compile_ahead_of_tuning(pool, C, n, T)
        kernel_report.retune(example(C, n, T, device=DEVICE), graph_ms, compiled, say_tuned)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def say_tuned(kernel, times, dropped):
    now, best = next(iter(times)), min(times, key=times.get)
    say(what=kernel, best=str(best), ms=times[best], now=str(now), now_ms=times[now], tried=len(times), dropped=dropped)


STAGES = {  # and the seconds that each may spend
    versions: 25, ceilings: 25, boundary: 110, attention: 25, kernels: 100, steps: 130, training: 110, tests: 90,
    retune: 150,
}  # fmt: skip


# -- running them -----------------------------------------------------------------------------------------------------


def work(stage, fd):
    """In the child: run a stage, and say how it ended."""
    global line
    signal.set_wakeup_fd(-1)
    line, error = os.fdopen(fd, "w"), None
    try:
        stage()
    except BaseException as e:
        traceback.print_exc()
        error = f"{type(e).__name__}: {' '.join(str(e).split())[:500]}"
    sys.stdout.flush()
    sys.stderr.flush()
    print(json.dumps({"ended": error}), file=line, flush=True)


def listen(fd, until):
    """The records that a child sends until it says how it ended -> (records, its error, or what became of it)."""
    data, start = b"", time.monotonic()
    while select.select([fd], [], [], max(0.0, until - time.monotonic()))[0]:
        more = os.read(fd, 1 << 16)
        data += more
        *records, last = [json.loads(row) for row in data.decode().splitlines(True) if row.endswith("\n")] or [{}]
        if "ended" in last:
            return records, last["ended"]
        if not more:
            return [*records, last], "it was killed, or crashed"
    records = [json.loads(row) for row in data.decode().splitlines(True) if row.endswith("\n")]
    return records, f"its {until - start:.0f} seconds were over"


def run_stage(stage, budget):
    """Run a stage in a process of its own -> its entry in gpu.json."""
    sys.stdout.flush()
    start, (here, there) = time.monotonic(), os.pipe()
    if (pid := os.fork()) == 0:
        os.setpgid(0, 0)  # with all that it starts
        os.close(here)
        work(stage, there)
        os._exit(0)
    os.close(there)
    try:
        records, error = listen(here, start + budget)
    finally:
        end_group(pid)
        os.waitpid(pid, 0)
        os.close(here)
    status = "failed" if error else "done"
    return {"status": status, "seconds": time.monotonic() - start, "error": error, "records": records}


def end_group(pid):
    """End a child that is still there, and what it started."""
    for kill in (lambda: os.killpg(pid, signal.SIGKILL), lambda: os.kill(pid, signal.SIGKILL)):
        try:
            kill()
            return
        except ProcessLookupError:  # no group yet, or nothing left of it
            continue


def is_ours(path):
    try:
        read_json(path, GPU_REPORT)
        return True
    except RecordError:
        return False


def need_gpu():
    """Asked by another process: this one must not have touched the GPU when it forks."""
    asks = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 7)"
    if DEVICE == "cuda" and subprocess.run([sys.executable, "-c", asks], stderr=subprocess.DEVNULL).returncode == 7:
        fail(
            f"wanted a GPU: torch {torch.__version__} of {sys.executable} finds none (nvidia-smi shows what the driver "
            "finds; a torch built for CPUs alone finds nothing; make gpu PYTHON=... takes another python3)"
        )


def main():
    global scratch
    configure(globals(), RULES)
    known = {f.__name__: f for f in STAGES}
    wanted = stages.split(",") if stages else list(known)
    if unknown := [name for name in wanted if name not in known]:
        fail(f"stages={stages!r}: wanted some of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    owned.check_place(out)
    owned.check_file(out, is_ours)
    need_gpu()
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="mhc_gpu_") as scratch:
        for name in wanted:
            left = end - time.monotonic()
            print(f"{name}: {known[name].__doc__.splitlines()[0]}  [{left:.0f} s left]")
            none = {"status": "skipped", "seconds": 0.0, "error": "no time was left", "records": []}
            entry = run_stage(known[name], min(STAGES[known[name]], left)) if left > 1 else none
            heard["stages"][name] = entry
            print(f"{name}: {entry['status']} in {entry['seconds']:.1f} s {entry['error'] or ''}")
            owned.write_json(out, heard, is_ours)
    print(f"written: {out}")
    if bad := [name for name, entry in heard["stages"].items() if entry["status"] != "done"]:
        program.end(f"error: not done: {', '.join(bad)}", 1)


if __name__ == "__main__":
    program.run(main, owned.NotOurs, RecordError)
