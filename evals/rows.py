"""The rows of a task, from <eval_dir>/<task>/<split>.jsonl; each is checked as it is read (records.py).

rows, examples, files = read_task(eval_dir, "gsm8k", style, shots=8)
"""

import hashlib
import os
from itertools import islice

from evals.tasks import TASKS
from records import RecordError, open_file, read_lines

PREPARE = "python prepare_data.py --dataset=eval"


class TaskError(Exception):
    """A task that cannot be scored: files missing or damaged, too few examples. The message says what to do."""

    on_every_rank = True  # program.py: rank 0 speaks for all


def read_task(eval_dir, name, style, shots):
    """-> test rows, examples (none if shots is 0), {file: {'rows', 'sha256'}}. Raises TaskError."""
    task = TASKS[name]
    try:
        task.needs()
    except ImportError as e:
        raise TaskError(str(e)) from e
    if shots and not task.examples:
        raise TaskError(f"{task.title}: has no examples to show: wanted --shots=0, got {shots}")
    test = find_split(eval_dir, name, task.tests)
    rows, files, examples = list(read_rows(test, task.fields)), [test], []
    if shots and not style.beside:
        files.append(find_split(eval_dir, name, task.examples, task.fetched))
        lines = read_rows(files[-1], task.example_fields or task.fields)
        examples = list(lines if task.group else islice(lines, shots))  # some files of examples are large
        try:
            examples = [e for line in examples for e in task.unfold(line)] if task.unfold else examples
        except (ValueError, AttributeError) as e:
            raise TaskError(f"{files[-1]}: not in the official form ({e}); fetch it again: {PREPARE}") from e
    return rows, examples, {os.path.basename(path): describe(path) for path in files}


def find_split(eval_dir, name, splits, fetched=True):
    """Path of the first of `splits` that exists. TaskError otherwise; fetched: whether prepare_data.py makes it."""
    paths = [os.path.join(eval_dir, name, f"{split}.jsonl") for split in splits]
    for path in paths:
        if os.path.lexists(path):
            return path
    what = (
        f"to fetch it: {PREPARE} --tasks={name} --eval_dir={eval_dir}"
        if fetched
        else "prepare_data.py does not fetch it: put it there, or set --shots=0"
    )
    raise TaskError(f"{name}: no {' or '.join(paths)}; {what}")


def read_rows(path, fields):
    """Yield the rows of a file. TaskError naming file, line and field for what is not as it should be."""
    row = None
    try:
        for row in read_lines(path, fields):
            yield row
    except RecordError as e:
        raise TaskError(f"{e}; fetch it again: {PREPARE}") from e
    if row is None:
        raise TaskError(f"{path}: has no rows; fetch it again: {PREPARE}")


def describe(path):
    """Which file it was: its rows and its sha256."""
    digest, rows = hashlib.sha256(), 0
    with open_file(path) as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
            rows += chunk.count(b"\n")
            last = chunk
    return {"rows": rows + (not last.endswith(b"\n")), "sha256": digest.hexdigest()}


def first_rows(rows, group, limit):
    """The numbers of the first `limit` rows (0: all); of a task with subjects, the first ones of each in turn."""
    if not limit or not group:
        return range(len(rows))[: limit or None]
    seen, ranks = {}, []
    for row in rows:
        ranks.append(seen.setdefault(row[group], 0))
        seen[row[group]] += 1
    return sorted(sorted(range(len(rows)), key=lambda i: ranks[i])[:limit])  # stable: subjects stay in order
