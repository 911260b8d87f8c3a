"""One task on one checkpoint: what is asked, and the record of what came out.

    given = read("piqa", s, settings, model.config, encoding)          # rows and prompts, before any model runs
    record = measure(runner, encoding, "piqa", given, s)

s: {style, shots, limit, eval_dir, data_dir, batch_tokens, max_length, save_predictions, save_prompts}, see eval.py.
"""

import math
import os

import torch.distributed as dist

from data import Corpus, DataError
from evals import score
from evals.generate import generate
from evals.prompts import prompts
from evals.rows import TaskError, first_rows, read_task
from evals.stats import summary
from evals.tasks import TASKS


def read(name, s, settings, config, encoding):
    """What is to be scored: {'corpus'} for the loss, else {'rows', 'prompts', 'groups'}; and its {'files'}.

    Raises TaskError.
    """
    if name == "loss":
        try:
            corpus = Corpus(s["data_dir"] or settings["data_dir"], "val", s["max_length"] or config.seq_len)
            corpus.verify()
        except DataError as e:
            raise TaskError(f"loss: {e}") from e
        return {"corpus": corpus, "files": {"val": {"sequences": corpus.n_sequences, "sha256": corpus.fingerprint}}}
    task, longest = TASKS[name], s["max_length"] or config.seq_len
    style = task.style(s["style"])
    rows, examples, files = read_task(s["eval_dir"], name, style, s["shots"])
    wanted = first_rows(rows, task.group, s["limit"])

    def room(row):
        if not style.choices:
            return longest - answer_budget(style, longest)
        return longest + 1 - max(len(encoding.encode_ordinary(style.glue + text)) for text in style.choices(row))

    where = f"{os.path.join(s['eval_dir'], name)} ({', '.join(files)})"
    made = prompts(task, style, rows, wanted, examples, s["shots"], room, encoding, where)
    rows = [rows[i] for i in wanted]
    groups = [(row[task.group] if task.group else "", p.shots) for row, p in zip(rows, made, strict=True)]
    return {"rows": rows, "prompts": made, "groups": groups, "files": files}


def answer_budget(style, longest):
    """Tokens that may be generated: at most half of the context, as evals/generate.py has it."""
    return min(style.max_new_tokens, longest // 2)


def measure(runner, encoding, name, given, s):
    """Score a task -> what results.json keeps of it, but for the checkpoint and the settings.

    The scores are there on the first process; on others they may be empty lists. Raises TaskError, FloatingPointError.
    """
    record = loss_record(runner, given, s) if name == "loss" else task_record(runner, encoding, name, given, s)
    if is_main():
        record["metrics"] = {metric: summary(metric, scores) for metric, scores in record["scores"].items()}
    return record


def task_record(runner, encoding, name, given, s):
    task = TASKS[name]
    style, rows, asked = task.style(s["style"]), given["rows"], given["prompts"]
    score_rows = score_choices if style.choices else score_texts
    scores, predictions, counts = score_rows(runner, encoding, task, style, given, s)
    chance = sum(p.chance for p in asked) / len(asked)
    record = {
        "n": len(rows), "official": task.sizes[0], "partial": len(rows) not in task.sizes,
        "shown": sum(p.shots for p in asked) / len(asked), **counts,
        "random": {m: chance for m in style.metrics if style.choices and m != "perplexity" or m == style.metrics[0]},
        "scores": scores,
    }  # fmt: skip
    if task.group and is_main():
        record["groups"] = by_group([row[task.group] for row in rows], scores)
    if s["save_predictions"]:
        record["predictions"] = predictions
    if s["save_prompts"]:
        record["prompts"] = [
            {"prompt": p.text} | ({"choices": [style.glue + c for c in style.choices(row)]} if style.choices else {})
            for p, row in zip(asked, rows, strict=True)
        ]
    return record


def by_group(groups, scores):
    """The mean of every metric in every group (a subject, a subtask), and its number of rows."""
    found = {}
    for i, group in enumerate(groups):
        found.setdefault(group, []).append(i)
    return {g: {"n": len(mine)} | {m: sum(each[i] for i in mine) / len(mine) for m, each in scores.items()}
            for g, mine in found.items()}  # fmt: skip


def score_choices(runner, encoding, task, style, given, s):
    """-> {metric: [per item]}, the choices' log-probabilities, and how many items did not fit. Raises TaskError."""
    choices = [style.choices(row) for row in given["rows"]]
    try:
        items = [
            [score.encode_pair(encoding, prompt.text, style.glue + choice) for choice in texts]
            for prompt, texts in zip(given["prompts"], choices, strict=True)
        ]
    except ValueError as e:
        raise TaskError(f"{task.title}: {e}; it cannot be scored with this tokenizer") from e
    scored = score.loglikelihoods(runner, items, given["groups"], s["batch_tokens"], title=task.title)
    golds = [task.gold(row) for row in given["rows"]]
    each = [style.rate(item, texts, gold) for item, texts, gold in zip(scored, choices, golds, strict=True)]
    longest = runner.max_length + 1
    counts = {
        "truncated": sum(any(len(c) + len(t) > longest for c, t in item) for item in items),
        "clipped": sum(any(len(t) >= longest for _, t in item) for item in items),  # not even the choice fits
    }
    return {m: [e[m] for e in each] for m in style.metrics}, [[lp for lp, _ in item] for item in scored], counts


def score_texts(runner, encoding, task, style, given, s):
    """-> {metric: [per item]} (on the first process; empty lists on others), the texts, and how many did not fit."""
    asked = [p.text for p in given["prompts"]]
    texts = generate(
        runner, encoding, asked, given["groups"], style.stops, style.max_new_tokens, s["batch_tokens"], task.title
    )
    each = [style.score(text, row) for text, row in zip(texts, given["rows"], strict=True)] if is_main() else []
    budget = answer_budget(style, runner.max_length)
    cut = sum(len(encoding.encode_ordinary(p)) > runner.max_length - budget for p in asked)
    return {m: [e[m] for e in each] for m in style.metrics}, texts, {"truncated": cut, "max_new_tokens": budget}


def loss_record(runner, given, s):
    """The loss on the validation split of a corpus, as task_record."""
    corpus = given["corpus"]
    losses = score.sequence_losses(runner, corpus, s["limit"], s["batch_tokens"], "validation loss")
    per_byte = 1 / math.log(2) / corpus.bytes_per_token
    uniform = math.log(runner.config.vocab_size)
    return {
        "n": len(losses), "official": corpus.n_sequences, "partial": len(losses) < corpus.n_sequences, "shown": 0,
        "random": {"loss": uniform, "bits_per_byte": uniform * per_byte}, "seq_len": corpus.seq_len,
        "scores": {"loss": losses, "bits_per_byte": [loss * per_byte for loss in losses]},
    }  # fmt: skip


def is_main():
    return not dist.is_initialized() or dist.get_rank() == 0
