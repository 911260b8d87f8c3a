"""Score checkpoints on the eight tasks of the paper's Table 4, and on the validation split of a prepared corpus.

    python prepare_data.py --dataset=eval                                 # the tasks' official files, once
    python eval.py out/demo/mhc                                           # all tasks, the run's newest checkpoint
    python eval.py out/demo/baseline out/demo/mhc --tasks=loss,piqa       # two runs, compared item by item
    python eval.py out/demo/mhc/step-* --tasks=hellaswag --limit=500      # with a picture of score against step
    torchrun --nproc_per_node=8 eval.py out/mhc_27b --dtype=bfloat16      # the same results on 8 GPUs
    python eval.py out/demo/mhc --lm_eval=arc_easy,winogrande             # any other task, if lm-eval is installed

Results go to <run>/eval/results.json after every task (a run that was cut off goes on where it stopped; --fresh=True
scores again) and to the terminal, beside the paper's 27B models and the score of random guessing. The tasks and their
prompts are in evals/tasks.py, what counts as right in evals/metrics.py, the model's side in evals/score.py, the table
and the comparisons in evals/report.py.
"""

import program

if __name__ == "__main__":
    program.begin()  # before torch, and before anything that takes long to import

import datetime
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from checkpoint import CheckpointError, find, load_model, step_of
from configurator import at_least, configure, fail, one_of, some
from data import Corpus, DataError
from download import read_record
from evals import report, score
from evals.metrics import choice_scores
from evals.tasks import TASKS, TaskError, ask, guess, read_task
from owned import NotOurs, write_json
from parallel import resolve_device
from tokenizer import open_encoding

tasks = "all"  # or a list: loss,bbh,drop,gsm8k,hellaswag,math,mmlu,piqa,triviaqa
eval_dir = "data/eval"  # <task>/<split>.jsonl, made by prepare_data.py --dataset=eval
data_dir = ""  # the prepared corpus for `loss` and the tokenizer; '': the one the checkpoint was trained on
style = "harness"  # prompts of lm-evaluation-harness, or 'deepseek': of DeepSeek's base models
shots = -1  # examples in a prompt; -1: each task's own number
limit = 0  # score only so many rows of each task, taken evenly from its subjects; 0: all
batch_tokens = 16384  # tokens in a batch at most, padding and shared prefixes counted
max_length = 0  # context in tokens; 0: what the model was trained on
device = "auto"  # 'cpu' | 'cuda' | 'mps'
dtype = "float32"  # or 'bfloat16': autocast outside the mappings
out_dir = ""  # where results.json goes; '': eval/ in the first checkpoint's run folder
save_predictions = False  # keep every item's prediction in results.json too
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
    **dict.fromkeys(("tasks", "eval_dir"), some("a name")),
}
UNUSED = ("tasks", "style", "eval_dir", "save_predictions", "fresh", "resamples", "seed")  # with --lm_eval=
SAME = ("checkpoint", "weights", "task", "style", "shots", "limit", "max_length", "dtype", "files")  # of two records
NEEDED = (*SAME, "run", "step", "n", "official", "partial", "random", "scores", "metrics")  # of one to be kept


# ----------------------------------------------------------------------------------------------------------------------
# One task


def read(name, s, settings, config):
    """What is to be scored, before any model runs: rows, prompts and groups of a task, or the corpus; and its files.

    Raises TaskError.
    """
    if name == "loss":
        try:
            corpus = Corpus(s["data_dir"] or settings["data_dir"], "val", s["max_length"] or config.seq_len)
            corpus.verify()
        except DataError as e:
            raise TaskError(f"loss: {e}") from e
        return {"corpus": corpus, "files": {"val": {"sequences": corpus.n_sequences, "sha256": corpus.fingerprint}}}
    task = TASKS[name]
    rows, examples, files = read_task(s["eval_dir"], name, s["shots"])
    rows = first_rows(rows, task.group, s["limit"])
    style, where = getattr(task, s["style"]), f"{os.path.join(s['eval_dir'], name)} ({', '.join(files)})"
    prompts = [ask(task, style, row, examples, s["shots"], where) for row in rows]
    return {"rows": rows, "prompts": prompts, "groups": [row[task.group] if task.group else "" for row in rows],
            "files": files}  # fmt: skip


def first_rows(rows, group, limit):
    """The first `limit` rows (0: all); of a task with subjects the first ones of each, in turn."""
    if not limit or not group:
        return rows[: limit or None]
    seen, ranks = {}, []
    for row in rows:
        ranks.append(seen.setdefault(row[group], 0))
        seen[row[group]] += 1
    taken = sorted(range(len(rows)), key=lambda i: ranks[i])[:limit]  # stable: subjects stay in order
    return [rows[i] for i in sorted(taken)]


def score_choices(runner, encoding, task, style, given, s):
    """-> {metric: [per item]}, the choices' log-probabilities, and how many items did not fit. Raises TaskError."""
    choices = [style.choices(row) for row in given["rows"]]
    try:
        items = [
            [score.encode_pair(encoding, prompt, style.glue + choice) for choice in texts]
            for prompt, texts in zip(given["prompts"], choices, strict=True)
        ]
    except ValueError as e:
        raise TaskError(f"{task.title}: {e}; it cannot be scored with this tokenizer") from e
    scored = score.loglikelihoods(runner, items, given["groups"], s["batch_tokens"], title=task.title)
    logprobs = [[lp for lp, _ in item] for item in scored]
    golds = [task.gold(row) for row in given["rows"]]
    each = [choice_scores(lp, c, gold) for lp, c, gold in zip(logprobs, choices, golds, strict=True)]
    longest = runner.max_length + 1
    counts = {
        "truncated": sum(any(len(c) + len(t) > longest for c, t in item) for item in items),
        "clipped": sum(any(len(t) >= longest for _, t in item) for item in items),  # not even the choice fits
    }
    return {m: [e[m] for e in each] for m in style.metrics}, logprobs, counts


def score_texts(runner, encoding, task, style, given, s):
    """-> {metric: [per item]} (on the first process; empty lists on others), the texts, and how many did not fit."""
    texts = score.generate(
        runner, encoding, given["prompts"], given["groups"], style.stops, style.max_new_tokens, s["batch_tokens"],
        task.title,
    )  # fmt: skip
    each = [style.score(text, row) for text, row in zip(texts, given["rows"], strict=True)] if is_main() else []
    budget = min(style.max_new_tokens, runner.max_length // 2)
    cut = sum(len(encoding.encode_ordinary(p)) > runner.max_length - budget for p in given["prompts"])
    return {m: [e[m] for e in each] for m in style.metrics}, texts, {"truncated": cut, "max_new_tokens": budget}


def task_record(runner, encoding, name, given, s):
    """Score one of TASKS -> what results.json keeps of it, but for the checkpoint and the settings."""
    task = TASKS[name]
    style, rows = getattr(task, s["style"]), given["rows"]
    score = score_choices if style.choices else score_texts
    scores, predictions, counts = score(runner, encoding, task, style, given, s)
    chance = sum(guess(task, row) for row in rows) / len(rows)
    record = {
        "n": len(rows), "official": task.sizes[0], "partial": len(rows) not in task.sizes, **counts,
        "random": {m: chance for m in scores if style.choices or m == style.metrics[0]}, "scores": scores,
    }  # fmt: skip
    return record | ({"predictions": predictions} if s["save_predictions"] else {})


def loss_record(runner, given, s):
    """Score the validation split of a corpus -> as task_record."""
    corpus = given["corpus"]
    losses = score.sequence_losses(runner, corpus, s["limit"], s["batch_tokens"], "validation loss")
    per_byte = 1 / math.log(2) / corpus.bytes_per_token
    uniform = math.log(runner.config.vocab_size)
    return {
        "n": len(losses), "official": corpus.n_sequences, "partial": len(losses) < corpus.n_sequences,
        "random": {"loss": uniform, "bits_per_byte": uniform * per_byte}, "seq_len": corpus.seq_len,
        "scores": {"loss": losses, "bits_per_byte": [loss * per_byte for loss in losses]},
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
    """The records of an earlier results.json that this version can go on with; what it cannot is scored again."""
    found = read_record(path)
    records = found.get("records") if isinstance(found, dict) else None
    records = records if isinstance(records, list) else []
    whole = [r for r in records if isinstance(r, dict) and all(k in r for k in NEEDED)]
    if os.path.exists(path) and (not records or len(whole) < len(records)):
        say(f"{path}: is damaged or from another version; what it lacks is scored again")
    return whole


def keep(path, results, record):
    """Put a record into results.json in place of an older one of the same checkpoint and settings."""
    same = [k for k in SAME if k not in ("weights", "files")]
    results["records"] = [r for r in results["records"] if any(r[k] != record[k] for k in same)] + [record]
    write_json(path, results)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def is_main():
    return not dist.is_initialized() or dist.get_rank() == 0


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


def wanted_tasks():
    names = ["loss", *TASKS] if tasks == "all" else [name.strip() for name in tasks.split(",")]
    for name in names:
        if name != "loss" and name not in TASKS:
            fail(f"tasks: unknown task {name!r}: wanted all, or a list out of loss, {', '.join(TASKS)}")
    return list(dict.fromkeys(names))


def evaluate(checkpoint, names, path, results, config, where):
    """Score one checkpoint on the tasks of these names -> its records, why others are missing.

    Of the records, those already in `results` are kept; every new one is written to `path` at once.
    """
    model, settings = load_model(checkpoint, where)
    encoding = open_encoding(config, settings, model.config)
    runner = score.Runner(model, dtype, max_length)
    about = {"checkpoint": checkpoint, "run": run_of(checkpoint), "step": step_of(checkpoint),
             "residual": model.config.residual, "weights": weights_hash(model)}  # fmt: skip
    records, missing = [], []
    for name in names:
        s = config | {"shots": 0 if name == "loss" else TASKS[name].shots if shots < 0 else shots}
        try:
            given = read(name, s, settings, model.config)
        except TaskError as e:
            missing.append(str(e))
            continue
        about |= {"task": name, "style": style if name in TASKS else "-", "shots": s["shots"], "limit": limit,
                  "max_length": runner.max_length, "dtype": dtype, "files": given["files"]}  # fmt: skip
        old = [r for r in results["records"] if all(about[k] == r[k] for k in SAME)]
        if old and not fresh and (not save_predictions or "predictions" in old[0] or name == "loss"):
            say(f"{checkpoint}: {report.title(name)}: kept from {path}")
            records += old
            continue
        start = time.perf_counter()
        try:
            new = loss_record(runner, given, s) if name == "loss" else task_record(runner, encoding, name, given, s)
        except TaskError as e:
            missing.append(str(e))
            continue
        if is_main():
            metrics = {m: report.mean_and_error(v) for m, v in new["scores"].items()}
            new["metrics"] = {m: {"value": value, "se": se} for m, (value, se) in metrics.items()}
            records.append(about | {"seconds": time.perf_counter() - start} | new)
            keep(path, results, records[-1])
    return records, missing


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
    where = start_processes(device)
    try:
        checkpoints = list(dict.fromkeys(os.path.relpath(find(c)) for c in checkpoints))
    except CheckpointError as e:
        fail(str(e))
    folder = out_dir or os.path.join(run_of(checkpoints[0]), "eval")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        fail(f"{folder}: the folder for results cannot be made ({e.strerror}); --out_dir= names another")
    if lm_eval:
        from evals import harness  # here, because lm-eval is no dependency

        return harness.run(checkpoints, lm_eval.split(","), config | {"device": where}, folder, is_main())
    names, path = wanted_tasks(), os.path.join(folder, "results.json")
    results = {"versions": versions(), "command": " ".join(sys.argv)}
    results["records"] = read_results(path)
    records, missing = [], []
    for checkpoint in checkpoints:
        new, lacking = evaluate(checkpoint, names, path, results, config, where)
        records += new
        missing += lacking
    if is_main():
        conclude(records, missing, path, results)
        if not records:
            fail("nothing could be scored")
    if dist.is_initialized():
        dist.destroy_process_group()


def conclude(records, missing, path, results):
    """Print the table, the comparisons and what is missing; draw the picture."""
    names = {r["checkpoint"]: f"{os.path.basename(r['run'])} {r['step']}" for r in records}
    if records:
        print(f"\nprompts: {style}; per cent ± standard error; the paper's are 27B models after 262B tokens\n")
        print(*report.table(records, names), sep="\n")
        pairs, unlike = report.comparisons(records, seed, resamples) if len(names) > 1 else ([], [])
        results["comparisons"] = pairs
        write_json(path, results)
        print("", *report.comparison_lines(pairs, names), *unlike, sep="\n")
        if len({r["step"] for r in records}) > 1:
            drawn = os.path.join(os.path.dirname(path), "score_vs_step.png")
            report.picture(records, drawn)
            print(f"picture: {drawn}")
        for key, what in (("truncated", "prompts cut on the left"), ("clipped", "choices alone too long, cut too,")):
            if cut := [f"{names[r['checkpoint']]}: {report.title(r['task'])} {r[key]} of {r['n']}"
                       for r in records if r.get(key)]:  # fmt: skip
                longest = report.joined(str(r["max_length"]) for r in records)
                print(f"{what} to fit {longest} tokens: {'; '.join(cut)}")
        print(f"results: {path}")
    for why in dict.fromkeys(missing):
        print(f"missing: {why}")


if __name__ == "__main__":
    program.run(main, CheckpointError, NotOurs)
