"""Score checkpoints: on the eight tasks of the paper's Table 4, on tasks for small models, on a prepared corpus.

    python prepare_data.py --dataset=eval --tasks=small                   # the tasks' official files, once
    python eval.py out/demo/mhc                                           # the run's newest checkpoint
    python eval.py out/demo/baseline out/demo/mhc --tasks=loss,piqa       # two runs, compared item by item
    python eval.py out/demo/mhc/step-* --tasks=hellaswag --limit=500      # with a picture of score against step
    torchrun --nproc_per_node=8 eval.py out/mhc_27b --dtype=bfloat16      # the same results on 8 GPUs
    python eval.py out/demo/mhc --lm_eval=arc_easy,winogrande             # any other task, if lm-eval is installed

--tasks=small: loss, hellaswag (0 shots), piqa, blimp, lambada, arc_easy; what a model under 1B active parameters is
asked if nothing else is said. --tasks=all: loss and the paper's eight, at which such a model is no better than chance.

Results go to <run>/eval/results.json after every task (a run that was cut off goes on where it stopped; --fresh=True
scores again) and to the terminal, beside the paper's 27B models and the score of random guessing. A task that could not
be scored is named last, and makes the exit code 1. The inside is evals/: tasks.py (what is asked), rows.py, prompts.py
(how), metrics.py (what counts as right), score.py, generate.py (the model), measure.py (a task's record), report.py.
"""

import program

if __name__ == "__main__":
    program.begin()  # before torch, and before anything that takes long to import

import datetime
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import time

import torch
import torch.distributed as dist

import owned
from checkpoint import CheckpointError, find, load_model, step_of
from configurator import at_least, configure, fail, one_of, some
from evals import report, score
from evals.measure import is_main, measure, read
from evals.rows import TaskError
from evals.tasks import GROUPS, TASKS
from owned import NotOurs, write_json
from parallel import resolve_device
from records import Missing, RecordError, anything, boolean, check, each, integer, null_or, number, read_json, string
from tokenizer import open_encoding

tasks = ""  # small, all, or a list such as loss,mmlu; "": small for models under 1B active parameters, all from there
eval_dir = "data/eval"  # <task>/<split>.jsonl, made by prepare_data.py --dataset=eval
data_dir = ""  # the prepared corpus for `loss` and the tokenizer; '': the one the checkpoint was trained on
style = "harness"  # prompts of lm-evaluation-harness, or 'deepseek': of DeepSeek's base models, where they differ
shots = -1  # examples in a prompt, as many as fit whole; -1: each task's own number
limit = 0  # score only so many rows of each task, taken evenly from its subjects; 0: all
batch_tokens = 16384  # tokens in a batch at most, padding and shared prefixes counted
max_length = 0  # context in tokens; 0: what the model was trained on
device = "auto"  # 'cpu' | 'cuda' | 'mps'
dtype = "float32"  # or 'bfloat16': autocast outside the mappings
out_dir = ""  # where results.json goes; '': eval/ in the first checkpoint's run folder
save_predictions = False  # keep every item's prediction in results.json too
save_prompts = False  # keep every item's prompt (and choices) in results.json too
fresh = False  # score again what results.json has already
resamples = 10000  # of the bootstrap in paired comparisons
seed = 0  # of the bootstrap; nothing else is random
lm_eval = ""  # tasks for lm-evaluation-harness itself to run on the checkpoints, instead of `tasks`

RULES = {
    "style": one_of("harness", "deepseek"),
    "dtype": one_of("float32", "bfloat16"),
    "device": one_of("auto", "cpu", "cuda", "mps"),
    "shots": at_least(-1, 1000),
    **dict.fromkeys(("limit", "seed"), at_least(0)),
    "max_length": at_least(0, 2**24),
    "batch_tokens": at_least(1),
    "resamples": at_least(1, 10**6),
    "eval_dir": some("a name"),
}
UNUSED = (  # with --lm_eval=
    "tasks", "style", "eval_dir", "save_predictions", "save_prompts", "fresh", "resamples", "seed",
)  # fmt: skip
SAME = ("checkpoint", "weights", "task", "style", "shots", "limit", "max_length", "dtype", "files")  # of two records
NEEDED = {  # of one that an earlier run has left
    **dict.fromkeys(("checkpoint", "run", "weights", "task", "style", "dtype"), string()),
    **dict.fromkeys(("step", "shots", "limit", "official"), integer(0)), "shown": number(0),
    **dict.fromkeys(("max_length", "n"), integer(1)), "partial": boolean,
    "files": each(anything), "made_with": each(anything), "random": each(null_or(number())),
    "scores": each([number()]),
    "metrics": each({"value": number(), "low": null_or(number()), "high": null_or(number())}),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints and results


def run_of(checkpoint):
    """The run folder that a step folder lies in."""
    return os.path.dirname(checkpoint) or "."


def weights_hash(model):
    """sha256 over every tensor of a model: which weights a score belongs to, wherever the file has been moved."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def versions():
    """What the numbers may depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "tiktoken", "sympy", "antlr4-python3-runtime"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return found | {"commit": None}
    return found | {"commit": git.stdout.strip() or None}


def read_results(path):
    """The records of an earlier results.json. A file that is not one ends the program: nothing is written over."""
    try:
        records = read_json(path, {"records": [anything]})["records"]
        return [check(record, NEEDED, path, f"records[{i}]") for i, record in enumerate(records)]
    except Missing:
        return []
    except RecordError as e:
        fail(f"{e}; it is damaged, from another version or not ours: move it away, or choose another --out_dir=")


def keep(path, results, record):
    """Put a record into results.json in place of an older one of the same checkpoint and settings."""
    same = [k for k in SAME if k not in ("weights", "files")]
    results["records"] = [r for r in results["records"] if any(r[k] != record[k] for k in same)] + [record]
    write_json(path, results)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def say(*words):
    if is_main():
        print(*words, flush=True)


def start_processes(device):
    """Join the other processes of torchrun, if there are any; returns this process's device."""
    device = resolve_device(device)
    if "RANK" not in os.environ:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # the first process alone scores texts (MATH's sympy is slow) while the others wait
    dist.init_process_group("nccl" if "cuda" in device else "gloo", timeout=datetime.timedelta(hours=12))
    return device


def wanted_tasks(model=None):
    """{task: shots, None for its own}. tasks='' depends on the model's size; without a model names are checked only."""
    small = model is None or model.num_params()["active"] < 10**9
    wanted = {}
    for name in (tasks or ("small" if small else "all")).split(","):
        name = name.strip()
        if name not in (*GROUPS, "loss", *TASKS):
            fail(f"tasks: unknown task {name!r}: wanted {', '.join(GROUPS)}, or a list out of loss, {', '.join(TASKS)}")
        wanted |= GROUPS.get(name, {name: None})
    return wanted


def evaluate(checkpoint, path, results, config, where):
    """Score one checkpoint on the tasks wanted -> its records, {what is missing: why}.

    Of the records, those already in `results` are kept; every new one is written to `path` at once.
    """
    model, settings = load_model(checkpoint, where)
    encoding = open_encoding(config, settings, model.config)
    runner = score.Runner(model, dtype, max_length)
    about = {"checkpoint": checkpoint, "run": run_of(checkpoint), "step": step_of(checkpoint),
             "residual": model.config.residual, "weights": weights_hash(model)}  # fmt: skip
    made_with, records, missing = versions(), [], {}
    for name, own_shots in wanted_tasks(model).items():
        s = config | {"shots": shots if shots >= 0 else own_shots}
        if name == "loss":
            s["shots"] = 0
        elif s["shots"] is None:
            s["shots"] = TASKS[name].shots
        try:
            given = read(name, s, settings, model.config, encoding)
            about |= {"task": name, "style": style_of(name), "shots": s["shots"], "limit": limit,
                      "max_length": runner.max_length, "dtype": dtype, "files": given["files"]}  # fmt: skip
            if old := already(results["records"], about):
                say(f"{checkpoint}: {report.title(name)}: kept from {path}")
                records.append(old)
                continue
            start = time.perf_counter()
            new = measure(runner, encoding, name, given, s)
        except TaskError as e:
            missing[name] = str(e)
            continue
        except FloatingPointError as e:
            return records, missing | {checkpoint: f"{checkpoint}: {report.title(name)}: {e}"}
        if is_main():
            records.append(about | {"seconds": time.perf_counter() - start, "made_with": made_with} | new)
            keep(path, results, records[-1])
    return records, missing


def style_of(name):
    """The prompts that a task is asked with: 'harness' too where DeepSeek has none of its own; '-' for the loss."""
    return "-" if name == "loss" else "deepseek" if style == "deepseek" and TASKS[name].deepseek else "harness"


def already(records, about):
    """The record of the same weights, task and settings, if there is one that holds what is wanted; else None."""
    wanted = {"predictions": save_predictions, "prompts": save_prompts}
    for r in records if not fresh else ():
        if all(about[k] == r[k] for k in SAME) and (
            about["task"] == "loss" or all(k in r for k, asked in wanted.items() if asked)
        ):
            return r
    return None


def main():
    checkpoints = [a for a in sys.argv[1:] if not a.startswith("-") and not a.endswith(".py")]
    defaults = dict(globals())
    config = configure(globals(), RULES, [a for a in sys.argv[1:] if a not in checkpoints])
    if not checkpoints:
        fail("no checkpoint given: wanted one or more run folders or step folders, like python eval.py out/demo/mhc")
    if unused := [k for k in UNUSED if lm_eval and config[k] != defaults[k]]:
        fail(f"--lm_eval= does not use {', '.join(unused)}: lm-evaluation-harness has tasks and prompts of its own")
    if lm_eval and not importlib.util.find_spec("lm_eval"):
        fail("--lm_eval= needs lm-evaluation-harness: pip install lm-eval==0.4.13")
    wanted_tasks()
    where = start_processes(device)
    try:
        checkpoints = list(dict.fromkeys(os.path.relpath(find(c)) for c in checkpoints))
    except CheckpointError as e:
        fail(str(e))
    folder = out_dir or os.path.join(run_of(checkpoints[0]), "eval")
    try:
        if is_main():  # results from before there were marks are known by what is in them; lm_eval.json's writer asks
            owned.make(folder, "results", lambda f: lm_eval or bool(read_results(os.path.join(f, "results.json"))))
    except OSError as e:
        fail(f"{folder}: the folder for results cannot be made ({e.strerror}); --out_dir= names another")
    if lm_eval:
        from evals import harness  # here, because lm-eval is no dependency

        return harness.run(checkpoints, lm_eval.split(","), config | {"device": where}, folder, is_main())
    path = os.path.join(folder, "results.json")
    results = {"command": " ".join(sys.argv), "records": read_results(path)}
    records, missing = [], {}
    for checkpoint in checkpoints:
        try:
            new, lacking = evaluate(checkpoint, path, results, config, where)
        except CheckpointError as e:
            if len(checkpoints) == 1:
                raise
            new, lacking = [], {checkpoint: str(e)}
        records += new
        missing |= lacking
    if is_main():
        conclude(records, path, results)
        for why in missing.values():
            print(f"missing: {why}")
    if dist.is_initialized():
        dist.destroy_process_group()
    if missing:
        raise TaskError(f"not scored: {', '.join(missing)} (see above)")


def conclude(records, path, results):
    """Print the table, what is to be said of it, and the comparisons; draw the picture."""
    if not records:
        return
    names = report.checkpoint_names(records)
    print("", *report.table(records, names), "", *report.notes(records, names), sep="\n")
    pairs, unlike = report.comparisons(records, seed, resamples) if len(names) > 1 else ([], [])
    results["comparisons"] = pairs
    write_json(path, results)
    if pairs or unlike:
        print("", *report.comparison_lines(pairs, names), *unlike, sep="\n")
    if len({r["step"] for r in records}) > 1:
        drawn = os.path.join(os.path.dirname(path), "score_vs_step.png")
        report.picture(records, drawn)
        print(f"picture: {drawn}")
    print(f"results: {path}")


if __name__ == "__main__":
    program.run(main, CheckpointError, TaskError, NotOurs)
