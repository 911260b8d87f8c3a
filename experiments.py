"""The paper's claims put to the test on a CPU: grids of short runs of train.py, one row of a CSV file for each cell.

    python experiments.py                        # the experiments: what each asks, how many cells are done
    python experiments.py rates                  # run what is missing in results/rates.csv
    python experiments.py rates --jobs=2         # two cells at a time, one thread each
    python experiments.py rates --quick          # 10 steps a cell and 2 seeds, into out/experiments/quick: does it run?
    make report                                  # REPORT.md from the CSV files; nothing is trained

A cell is a dict of train.py's settings on top of a config file, and its name is these settings. A cell with a row is
skipped; one that was stopped goes on where it was, one that was killed starts anew. To redo a cell, delete its line.
A run that ends because its loss is no longer finite is a result (finite=False). Run folders are out/experiments/<name>/
<cell>; they are removed once the row is written, unless keep=True, and only if this program has made them.
"""

import program

if __name__ == "__main__":
    program.begin()  # before torch, and before anything that takes long to import

import collections
import csv
import fcntl
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

import owned
import plan
import recompute
import train
from configurator import at_least, configure, fail, read_file
from model import CHOICES, GPT, RESIDUALS, GPTConfig
from owned import whole_file, write_json
from records import METRIC, anything, each, integer, number, read_bytes, read_json, read_lines, string

jobs = 1  # cells at a time, a thread each
quick = False  # 10 steps and 2 seeds a cell, into out/experiments/quick: to see that it runs
keep = False  # keep the run folders
only = ""  # run only cells in whose names all of these words stand, separated by spaces: 'residual=hc seed=2'
eval_dir = "data/eval"  # the rows of downstream's tasks: prepare_data.py --dataset=eval
results = "results"  # folder of the CSV files
runs = "out/experiments"  # folder of the run folders

# -- the table of experiments -----------------------------------------------------------------------------------------

SEEDS = (1337, 2, 3, 4, 5)
DEMO = "config/demo.py"


def grid(**axes):
    """All combinations of the settings' values, the first setting varying slowest. -> a list of cells"""
    values = [v if isinstance(v, (list, tuple)) else [v] for v in axes.values()]
    return [dict(zip(axes, combination, strict=True)) for combination in itertools.product(*values)]


def rates():
    """The cells that decide the question first, seed by seed."""
    hc, home, paper = ({"residual": "hc"}, *({"residual": "mhc", "maps_init": init} for init in ("home", "paper")))
    baseline = [{"residual": "baseline"}]
    first, then = [(hc, 100), (home, 100)], [(hc, 1), (home, 1), (home, 30), (hc, 10), (paper, 100), (paper, 1)]
    rest = [(kind, scale) for scale in (30, 300, 10) for kind in (hc, home, paper) if (kind, scale) not in then]
    kinds = [[kind | {"maps_lr_scale": scale} for kind, scale in some] for some in (first, then[:2], then[2:], rest)]
    return [kind | {"seed": seed} for some in (baseline + kinds[0], *kinds[1:]) for seed in SEEDS for kind in some]


def demo():
    """The demo's three runs with five seeds: cells of `rates`, and rows in its file."""
    scale = read_file(DEMO).get("maps_lr_scale", 1)
    kinds = [{"residual": "hc"}, {"residual": "mhc", "maps_init": "home"}]
    return grid(residual="baseline", seed=SEEDS) + [
        k | {"maps_lr_scale": scale, "seed": s} for s in SEEDS for k in kinds
    ]


# 0.3M, 0.6M and 1M parameters, and tokens in proportion to the active ones: 123k, 215k, 328k
SMALL, MIDDLE = {"n_layer": 4, "n_embd": 32, "max_steps": 60}, {"n_layer": 6, "n_embd": 48, "max_steps": 105}
LARGE = {"n_layer": 8, "max_steps": 160}
SIZES = [SMALL, MIDDLE, LARGE]
KINDS = [
    {"residual": "baseline"},
    {"residual": "hc"},
    {"residual": "mhc"},
    {"residual": "mhc", "manifold": "identity"},
    {"residual": "mhc", "single_pass": True},
]


def rated(size, kind):
    """Cells that try the rates of a kind at a size, on one seed. Shorter runs are at their best at higher ones."""
    scales = {"baseline": [1], "hc": [1, 10, 30, 100], "mhc": [30, 100]}[kind["residual"]]
    rates = [3e-3, 6e-3, 12e-3] + [24e-3] * (size != LARGE)
    return [size | kind | rate | {"seed": 1337} for rate in grid(lr=rates, maps_lr_scale=scales)]


def tune():
    """Rates for `sizes`."""
    return [cell for size in SIZES for kind in KINDS for cell in rated(size, kind)]


def sizes():
    """Each kind at the best of its rates in `tune`, on seeds that did not choose them."""
    rows, cells = read_rows(os.path.join(results, "tune.csv")), []
    for size, kind in itertools.product(SIZES, KINDS):
        tried = rated(size, kind)
        losses = {name_of(c): float(rows[name_of(c)]["val_loss"] or "inf") for c in tried if name_of(c) in rows}
        if len(losses) == len(tried):  # else: `tune` has not been run for this kind
            best = min(tried, key=lambda c: losses[name_of(c)])
            cells += [best | {"seed": seed} for seed in (*SEEDS[1:], 6)]
    return cells


SHORT = SMALL | {"lr": 12e-3}  # a rate that suits all kinds there
HC_AND_MHC = grid(residual="hc") + grid(residual="mhc", maps_init=["home", "paper"])


def decides():
    """What decides HC against mHC, beside the rate and the start of `rates`: length, alpha (and `depth`)."""
    kinds, lengths = HC_AND_MHC[:2], [SHORT, SHORT | {"max_steps": 4 * SHORT["max_steps"]}]
    cells = [length | k | {"maps_lr_scale": scale} for length in lengths for scale in (1, 10, 100) for k in kinds]
    cells += [SHORT | alpha | k | {"maps_lr_scale": 1} for alpha in grid(alpha_init=[0.1, 1.0]) for k in kinds]
    baselines = [length | {"residual": "baseline"} for length in lengths]  # alpha is nothing to it
    return [cell | {"seed": seed} for cell in baselines + cells for seed in SEEDS]


def depth():
    """8 to 96 sublayers, at the paper's rate and one at which HC is in trouble."""
    thin = {"n_embd": 32, "batch_size": 8, "micro_batch_size": 8, "max_steps": 30}
    return [
        thin | {"n_layer": n} | k | c
        for n in (4, 12, 24, 48)
        for c in grid(maps_lr_scale=[1, 100], seed=SEEDS)
        for k in HC_AND_MHC
    ]


def ablation():
    """Table 1: a map that is not learned is fixed to 1/n, ones or I."""
    hc = grid(residual="hc", learned_maps=["res", "pre,res", "pre,post,res"])  # the paper's rows
    mhc = grid(residual="mhc", learned_maps=["post", "post,res", "pre,post", "pre,post,res"])  # without post none acts
    cells = [MIDDLE | kind | rate for rate in grid(maps_lr_scale=[1, 100], seed=SEEDS) for kind in hc + mhc]
    return [MIDDLE | cell for cell in grid(residual="baseline", seed=SEEDS)] + cells


def choices():
    """What the paper leaves open, one at a time, at the rate at which mHC is at its best in `rates`."""
    manifolds = ["sinkhorn", "identity", "permutations", "kronecker", "orthostochastic", "budget"]
    changes = grid(manifold=manifolds) + grid(single_pass=True) + grid(collapse="head")
    changes += grid(n_streams=[1, 2, 8]) + grid(sinkhorn_iters=[1, 3, 50])
    return [MIDDLE | {"residual": "mhc", "maps_lr_scale": 100} | c | {"seed": seed} for c in changes for seed in SEEDS]


def memory():
    """Table 3: recomputation in blocks of L_r sublayers, around Eq 20's L_r*, beside none and 'full'."""
    lengths = {24: (1, 2, 3, 4, 5, 6, 8, 24), 60: (1, 3, 4, 5, 6, 7, 8, 9, 12, 60)}
    cells = [grid(sublayers=L, recompute=["none", "full"]) for L in lengths]
    cells += [grid(sublayers=L, recompute="mhc", L_r=blocks) for L, blocks in lengths.items()]
    return list(itertools.chain(*cells))


def thin_model(L, C=128):
    """L sublayers of width C whose own activations are small beside the streams: real depth, thin F."""
    model = GPT(GPTConfig(vocab_size=32, seq_len=64, n_layer=L // 2, n_embd=C, n_head=1, kv_lora_rank=8,
                          qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, intermediate_size=8,
                          first_k_dense_replace=L // 2))  # fmt: skip
    model.init_weights(0)
    return model


def measure_memory(config, cell, folder):
    """-> the row of a cell of `memory`: what is kept for the backward and its peak, in units of C a token."""
    model, tokens = thin_model(cell["sublayers"]), 64
    idx = torch.randint(32, (1, tokens), generator=torch.Generator().manual_seed(0))
    L_r = recompute.apply(model, cell["recompute"], cell.get("L_r", -1))
    saved, peak = (v / (4 * model.config.n_embd * tokens) for v in plan.measured_bytes(model, idx, idx))
    cost = recompute.block_cost(cell["sublayers"], L_r, model.config.n_streams) if cell["recompute"] == "mhc" else ""
    return {"cell": name_of(cell), **cell, "commit": train.commit(), "saved": round(saved, 1), "peak": round(peak, 1),
            "table_3": cost, "best_L_r": recompute.best_block(cell["sublayers"], model.config.n_streams)}  # fmt: skip


def upcycling():
    """A trained baseline continued for as many tokens again: as it is, and with more streams."""
    kinds = grid(residual="baseline") + grid(residual="mhc", maps_lr_scale=[100, 1])
    kinds += grid(residual="hc", maps_lr_scale=[1, 10])
    return [SHORT | kind | {"seed": seed} for seed in SEEDS for kind in kinds]


parents = collections.defaultdict(threading.Lock)  # {folder: who trains it}


def continue_baseline(config, cell, folder):
    """-> the row of a cell of `upcycling`, None if it was stopped.

    All that a seed continues begin at the weights of one baseline, with a new optimizer, the same schedule from its
    start, and the same data: those of another seed than its own, so that they are not what it has just seen."""
    parent = os.path.join(os.path.dirname(folder), f"{PARENT}seed={cell['seed']}")
    with parents[parent]:
        baseline = {k: v for k, v in cell.items() if k != "maps_lr_scale"} | {"residual": "baseline"}
        if run_cell(config, baseline, parent) is None:
            return None
    claim(folder, cell)
    if not any(name.startswith("step-") for name in os.listdir(folder)):  # nothing of it yet
        first = os.path.join(os.path.dirname(folder), f"start,{os.path.basename(folder)}")
        flags = [f"--residual={cell['residual']}", f"--seed={cell['seed']}", "--overwrite=True"]
        if call(["convert.py", parent, first, *flags], cell, folder) is None:
            return None
        os.rename(os.path.join(first, START), os.path.join(folder, START))  # at once: with all of it, or not at all
        owned.remove(first, "run")
    as_converted = {"n_streams": 1} if cell["residual"] == "baseline" else {"maps_init": "paper"}
    return run_cell(config, cell, folder, seed=cell["seed"] + 1000, **as_converted)


ASKED = ("blimp", "hellaswag", "piqa")  # of evals/: what can be asked of a small model, without examples


def downstream():
    """The models of `sizes` at its largest size."""
    return [cell for cell in sizes() if LARGE.items() <= cell.items()]


def score(config, cell, folder):
    """-> the row of a cell of `downstream`, None if it was stopped: right answers in percent, of how many, by chance.

    The model is the one of `sizes` if that was run with keep=True; else it is trained here."""
    kept = os.path.join(os.path.dirname(os.path.dirname(folder)), "sizes", name_of(cell))
    trained, scores = kept if os.path.exists(os.path.join(kept, MARK)) else folder, f"{folder},scores"
    if run_cell(config, cell, trained) is None:
        return None
    claim(folder, cell)
    flags = [f"--tasks={','.join(ASKED)}", "--shots=0", "--limit=1000", f"--eval_dir={eval_dir}", f"--out_dir={scores}"]
    if call(["eval.py", trained, *flags], cell, folder) is None:
        return None
    row = {"cell": name_of(cell), **cell, "commit": train.commit()}
    for r in read_json(os.path.join(scores, "results.json"), {"records": [SCORED]})["records"]:
        row |= {r["task"]: round(100 * r["metrics"]["acc"]["value"], 2), f"{r['task']} of": r["n"],
                f"{r['task']} by chance": round(100 * r["random"]["acc"], 2)}  # fmt: skip
    owned.remove(scores, "results")
    return row


def overhead():
    """6.7 %: what HC and mHC add to the time of a few blocks on this CPU, and on paper to a micro-batch on an H100."""
    on_paper = grid(predicted="H100", config=["mhc_3b", "mhc_9b", "mhc_27b"])
    return grid(width=[64, 512], blocks=[2, 4]) + grid(width=1280, blocks=2) + on_paper


def measure_overhead(config, cell, folder):
    """-> the row of a cell of `overhead`: percent added to the baseline's time, by tools/bench.py cpu or roofline."""
    from tools import bench

    if "predicted" in cell:
        found = bench.predicted(f"config/{cell['config']}.py", cell["predicted"])
    else:
        found = bench.overhead(cell["width"], cell["blocks"], *((2, 64) if quick else (9, 1024)))
    return {"cell": name_of(cell), **cell, "commit": train.commit(), **found}


class Experiment(NamedTuple):
    question: str
    cells: Callable  # -> a list of dicts, in the order they are run
    config: str = DEMO
    file: str = ""  # of the results, where it is not the experiment's name
    row: Callable | None = None  # (config, cell, folder) -> a row, where a cell is not a run of train.py
    alone: bool = False  # one cell at a time, since it measures times


EXPERIMENTS = {
    "rates": Experiment("Which rate of alpha and b do HC and mHC need, and which do they survive?", rates),
    "demo": Experiment("What does `make demo` show over five seeds?", demo, file="rates"),
    "tune": Experiment("Which rates are best for each kind and size (for `sizes`)?", tune),
    "sizes": Experiment("Figs 5 and 6: who is ahead, each at its best rate, at three sizes?", sizes),
    "decides": Experiment("What decides HC against mHC: rate, start, length, depth, alpha?", decides),
    "depth": Experiment("Figs 2, 3, 7, 8: what do the gains do over depth, and does mHC live where HC dies?", depth),
    "ablation": Experiment("Table 1: which of the maps brings the gain?", ablation),
    "choices": Experiment("What do the choices that the paper leaves open cost or bring?", choices),
    "upcycling": Experiment(
        "Is a trained baseline better continued with more streams?", upcycling, row=continue_baseline
    ),
    "overhead": Experiment(
        "6.7 %: what do HC and mHC add to a step's time?", overhead, row=measure_overhead, alone=True
    ),
    "downstream": Experiment(
        "Table 4: who is ahead in benchmarks that a small model can be asked?", downstream, row=score
    ),
    "memory": Experiment("Table 3: what is kept, and is L_r* the best?", memory, row=measure_memory),
}
SCORED = {"task": string(), "n": integer(1), "random": {"acc": number()}, "metrics": {"acc": {"value": number()}}}
QUICK = dict(max_steps=10, warmup_steps=2, eval_interval=10, eval_sequences=8)


# -- cells ------------------------------------------------------------------------------------------------------------


def name_of(cell):
    """'residual=hc,maps_lr_scale=100,seed=2'; commas inside a value become '+'."""
    cell = {k: v.replace(",", "+") if isinstance(v, str) else v for k, v in cell.items()}
    return ",".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in cell.items())


def cells_of(experiment):
    """-> the cells that train.py has the settings for; says which it has not."""
    possible, missing, known = [], {}, CHOICES | {"residual": RESIDUALS}
    for cell in EXPERIMENTS[experiment].cells():
        lacks = [k for k, v in cell.items() if k not in vars(train) or v not in known.get(k, [v])]
        if lacks and EXPERIMENTS[experiment].row is None:
            missing.setdefault(", ".join(f"{k}={cell[k]!r}" for k in lacks), []).append(cell)
        else:
            possible.append(cell)
    for settings, cells in missing.items():
        print(f"{experiment}: {len(cells)} cells are left out: train.py does not have {settings}")
    names = [name_of(cell) for cell in possible]
    return {name: cell for name, cell in zip(names, possible, strict=True) if all(w in name for w in only.split())}


# -- results ----------------------------------------------------------------------------------------------------------

MEASURED = (
    "commit torch steps tokens params flops seconds finite skipped val_loss train_loss grad_norm_max "
    "gain_fwd_max gain_fwd_min gain_bwd_max gain_bwd_min gain_peak "
    # lists of numbers with spaces between them: over training ...
    "at_step loss_curve grad_norm_curve eval_step val_curve gain_curve "
    # ... over depth, and the composite map of the whole depth averaged over tokens, row by row; at the last evaluation
    "single_fwd_max single_bwd_max fwd_max fwd_min bwd_max bwd_min composite"
).split()
POINTS = 20  # of the curves over training


def read_rows(path):
    """{cell: row} of a CSV file; a line without all its fields or its end was not written by us whole: left out."""
    if not os.path.exists(path):
        return {}
    with open(path, newline="") as f:
        lines = [line for line in f if line.endswith("\n")]
    rows = list(csv.reader(lines))
    header = rows[0] if rows else []
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows[1:] if len(row) == len(header)}


def write_rows(path, rows):
    """Replace a CSV file as a whole: cell, the settings that vary, what was measured."""
    settings = list(dict.fromkeys(k for row in rows.values() for k in row if k not in ("cell", *MEASURED)))
    measured = MEASURED if any("val_loss" in row for row in rows.values()) else ["commit"]
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with whole_file(path, lambda path: read_bytes(path)[:5] == b"cell,") as f:
        writer = csv.DictWriter(f, ["cell", *settings, *measured], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


def numbers(values):
    """A list in a field of a CSV file, four digits of each."""
    return " ".join("nan" if v is None else f"{v:.4g}" for v in values)


def records_of(folder):
    """The records of steps and of evaluations in a run folder."""
    found = list(read_lines(os.path.join(folder, "metrics.jsonl"), METRIC, going_on=True))
    return [r for r in found if "loss" in r], [r for r in found if "val_loss" in r]


def nan_for_null(values):
    return np.array([math.nan if v is None else v for v in values], dtype=float)


def measure(cell, folder):
    """The row of a run that has ended: all steps taken, or no longer finite."""
    steps, evals = records_of(folder)
    origin = read_json(os.path.join(folder, "config.json"), {"settings": each(anything), "commit": anything})
    settings, last = origin["settings"], evals[-1]
    loss, norm = (nan_for_null(r[k] for r in steps) for k in ("loss", "grad_norm"))
    bins = [b for b in np.array_split(np.arange(len(steps)), POINTS) if len(b)]
    done = last["step"] == settings["max_steps"]  # ten steps in a row that are not finite end a run before that
    row = {"cell": name_of(cell), **cell} | {
        "commit": origin["commit"],
        "torch": torch.__version__,
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["step"] * settings["batch_size"] * settings["seq_len"],
        "params": last["params"],
        "flops": f"{flops_per_token(settings) * steps[-1]['step'] * settings['batch_size'] * settings['seq_len']:.4g}",
        "seconds": round(sum(r["step_ms"] for r in steps) / 1e3, 1),
        "finite": done and steps[-1]["skipped"] == 0 and bool(np.isfinite(loss).all()),
        "skipped": steps[-1]["skipped"],
        "val_loss": round(last["val_loss"], 4) if done and last["val_loss"] is not None else "",
        "train_loss": round(float(loss[bins[-1]].mean()), 4),
        "grad_norm_max": f"{np.nanmax(norm, initial=0):.4g}",
        "at_step": numbers(steps[b[-1]]["step"] for b in bins),
        "loss_curve": numbers(loss[b].mean() for b in bins),
        "grad_norm_curve": numbers(norm[b].max() for b in bins),
        "eval_step": numbers(r["step"] for r in evals),
        "val_curve": numbers(r["val_loss"] for r in evals),
    }
    if "composite_fwd_max" not in last:
        return row
    return row | gains_of(evals, folder) | ({} if done else {"gain_peak": "inf"})  # the last gain seen was the start's


def flops_per_token(settings):
    with torch.device("meta"):
        return GPT(
            GPTConfig(**{k: v for k, v in settings.items() if k in GPTConfig.__dataclass_fields__})
        ).flops_per_token()


def gains_of(evals, folder):
    """What a row holds of the gains: over depth at the last evaluation, and their peak over training."""
    last, row = evals[-1], {}
    for way in ("fwd", "bwd"):
        high, low = (nan_for_null(last[f"composite_{way}_{m}"]) for m in ("max", "min"))
        row |= {f"gain_{way}_max": f"{high.max():.4g}", f"gain_{way}_min": f"{low.min():.4g}"}
        row |= {f"{way}_max": numbers(high), f"{way}_min": numbers(low)}
        row |= {f"single_{way}_max": numbers(nan_for_null(last[f"single_{way}_max"]))}
    peaks = [max(nan_for_null(r[f"composite_{way}_max"]).max() for way in ("fwd", "bwd")) for r in evals]
    row |= {"gain_peak": f"{max(peaks):.4g}", "gain_curve": numbers(peaks)}
    maps = np.load(os.path.join(folder, "maps.npz"))
    return row | {"composite": numbers(maps[f"sublayers 1-{len(high)}"].flatten())}


# -- running ----------------------------------------------------------------------------------------------------------

MARK = "made-by-experiments.json"  # in a run folder: ours, and so ours to remove
START = "step-00000000"  # what convert.py leaves in a run folder
PARENT = "parent,"  # begins the name of a run folder that several cells share
running, stopping = set(), threading.Event()


def stop(number, frame):
    """SIGTERM and Ctrl-C: train.py finishes its step, saves and ends; the same command goes on from there."""
    stopping.set()
    for process in list(running):
        process.send_signal(signal.SIGTERM)


def claim(folder, cell):
    """Make the run folder, or find it ours; another's is refused."""
    mark = os.path.join(folder, MARK)
    if os.path.isdir(folder) and os.listdir(folder) and not os.path.exists(mark):
        raise RuntimeError(f"{folder} was not made by experiments.py; move it away, or choose another --runs=FOLDER")
    owned.make(folder, "run", recognise=lambda folder: True)  # it has our mark or is empty
    write_json(mark, cell)


def call(command, cell, folder):
    """One of our programs, told in log.txt. -> its last line, None if it was stopped.

    Raises RuntimeError with the way out if it failed; a loss that is no longer finite is no failure."""
    here, log = os.path.dirname(os.path.abspath(__file__)), os.path.join(folder, "log.txt")
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with open(log, "a") as out:
        command = [sys.executable, os.path.join(here, command[0]), *command[1:]]
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
        running.add(process)
        if stopping.is_set():
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        running.discard(process)
    with open(log) as f:
        last = (f.read().strip().splitlines() or [""])[-1]
    if "were not finite" in last:
        return last
    if code and stopping.is_set():
        return None  # asked to stop when it was not in its loop yet, or no more
    if code:
        name = os.path.basename(command[1])
        raise RuntimeError(f"{name_of(cell)}: {name} ended with {code}: {last} ({log}); mend it and run this again")
    return None if "stopped by a signal" in last else last


def run_cell(config, cell, folder, **also):
    """train.py on one cell, and settings beside it. -> its row, None if it was stopped. Raises RuntimeError."""
    claim(folder, cell)
    flags = [f"--{k}={v}" for k, v in (cell | also | (QUICK if quick else {})).items()]
    command = ["train.py", config, f"--out_dir={folder}", *flags, "--checkpoint_interval=1000000000"]
    return None if call(command, cell, folder) is None else measure(cell, folder)


def is_quick(cell):
    """Whether --quick takes a cell: two seeds, and of what is no run of train.py the small ones."""
    small = cell.get("sublayers", 0) < 60 and cell.get("width", 0) < 1280 and cell.get("config") in (None, "mhc_3b")
    return small and cell.get("seed") in (None, *SEEDS[:2])


def run(experiment):
    """Run the cells without a row. -> how many have failed."""
    config, file = EXPERIMENTS[experiment].config, EXPERIMENTS[experiment].file or experiment
    cells, place = cells_of(experiment), "quick" if quick else ""
    path = os.path.join(os.path.join(runs, place) if quick else results, f"{file}.csv")
    if quick:
        cells = {n: c for n, c in cells.items() if is_quick(c)}
    rows = read_rows(path)
    todo = {n: c for n, c in cells.items() if n not in rows}
    print(f"{experiment}: {len(cells)} cells, {len(cells) - len(todo)} done -> {path}")
    lock, failed = threading.Lock(), []

    def work(name, cell):
        if stopping.is_set():
            return
        folder = os.path.join(runs, place, file, name)
        try:
            row = (EXPERIMENTS[experiment].row or run_cell)(config, cell, folder)
        except RuntimeError as e:
            failed.append(name)
            print(f"FAILED {e}", flush=True)
            return
        if row is None:
            return
        with lock:
            rows[name] = row
            write_rows(path, {n: rows[n] for n in (*cells, *rows) if n in rows})  # in the table's order
        if not keep and os.path.isdir(folder):
            owned.remove(folder, "run")  # but for what somebody else has put there
        said = [f"{k} {row[k] or '-'}" for k in ("val_loss", "gain_peak", "peak") if k in row]
        print(f"{name}: {'  '.join(said)}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, todo, todo.values()))
    if not keep and all(name in rows for name in cells):
        remove_parents(os.path.join(runs, place, file))
    return len(failed)


def remove_parents(place):
    """The runs that cells have shared, once all of them have rows."""
    for name in os.listdir(place) if os.path.isdir(place) else ():
        folder = os.path.join(place, name)
        if name.startswith(PARENT) and os.path.exists(os.path.join(folder, MARK)):
            owned.remove(folder, "run")


def hold(experiment):
    """One process for an experiment: two would train the same cells. -> the open file that is the lock"""
    os.makedirs(runs, exist_ok=True)
    owned.check_file(path := os.path.join(runs, f"{experiment}.lock"))
    f = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(f"{experiment} is being run by another process (it holds {path}); wait for it, or stop it")
    return f


def overview():
    for name, experiment in EXPERIMENTS.items():
        cells, rows = cells_of(name), read_rows(os.path.join(results, f"{experiment.file or name}.csv"))
        print(f"{name:<10} {sum(n in rows for n in cells):>4} of {len(cells):>4} cells done   {experiment.question}")


def main():
    argv = ["--quick=True" if a == "--quick" else a for a in sys.argv[1:]]
    names = [a for a in argv if not a.startswith("-") and not a.endswith(".py")]
    configure(globals(), {"jobs": at_least(1, 1024)}, [a for a in argv if a not in names])
    for name in names:
        if name not in EXPERIMENTS:
            fail(f"{name!r}: wanted one of {', '.join(EXPERIMENTS)}")
        if EXPERIMENTS[name].alone and jobs > 1:
            fail(f"jobs={jobs}: {name} measures times, on a machine that does nothing else: wanted --jobs=1")
    if not names:
        return overview()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    failed = 0
    for name in names:
        with hold(EXPERIMENTS[name].file or name):
            failed += run(name)
    if stopping.is_set():
        print("stopped; the same command goes on from there")
    if failed:
        sys.exit(f"error: {failed} cells failed: see above")


if __name__ == "__main__":
    program.run(main, owned.NotOurs)
