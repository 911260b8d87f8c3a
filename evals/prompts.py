"""Prompts: which examples belong to a row, how many of them fit, and the text that the model continues.

A prompt that does not fit loses whole examples, the last ones first, rather than its beginning: what is left is what a
reader would call a 3-shot prompt, and the number is kept. Only a question too long by itself is cut on the left.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from evals.rows import TaskError

OPTION = re.compile(r"^\([A-Z]\)", re.M)


@dataclass
class Prompt:
    text: str
    shots: int  # whole examples in it
    chance: float  # the score, 0 to 1, that guessing at random would have on average


def prompts(task, style, rows, wanted, examples, shots, room, encoding, where):
    """The prompts of the rows numbered `wanted`.

    room(row): tokens that a prompt of this row may have. Raises TaskError, saying `where` rows and examples are from,
    for a row whose right answer, or whose score by guessing, cannot be told.
    """
    find = examples_of(task, style, rows, examples)
    count = lru_cache(maxsize=1 << 16)(lambda text: len(encoding.encode_ordinary(text)))
    made = []
    for i in wanted:
        row, mine = rows[i], find(i)[:shots]
        if len(mine) < shots and not style.beside:
            which = f" of {task.group} {row[task.group]!r}" if task.group else ""
            raise TaskError(f"{task.title}: wanted {shots} examples{which}, got {len(mine)}; set --shots={len(mine)}")
        try:
            check_gold(task, style, row)
            k = whole_examples(style, row, mine, room(row), count)
            made.append(Prompt(context(style, row, mine, k), k, guess(style, row)))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
            what = f"no {e}" if isinstance(e, KeyError) else e
            raise TaskError(f"{where}: a row or its examples cannot be used: {what}; the row: {str(row)[:200]}") from e
    return made


def examples_of(task, style, rows, examples):
    """-> a function: the number of a row -> the examples that belong to it, in order."""
    if style.beside:
        same = {}
        for i, row in enumerate(rows):
            same.setdefault(row[style.beside], []).append(i)
        return lambda i: [rows[j] for j in same[rows[i][style.beside]] if j != i]
    if not task.group:
        return lambda i: examples
    by_group = {}
    for e in examples:
        by_group.setdefault(e[task.group], []).append(e)
    return lambda i: by_group.get(rows[i][task.group], [])


def context(style, row, examples, k=None):
    """The whole prompt of a row with its first k examples (None: all): everything up to where the model answers."""
    shown = "".join(example_text(style, e) for e in examples[:k])
    return style.description(row, examples) + shown + style.question(row)


def example_text(style, example):
    return style.question(example) + style.glue + style.target(example) + style.separator


def whole_examples(style, row, examples, room, count):
    """How many examples, from the first on, fit into `room` tokens. count: text -> its tokens."""
    used = count(style.description(row, examples) + style.question(row)) if examples else 0
    for k, example in enumerate(examples):
        used += count(example_text(style, example))  # in pieces: within a token of the whole
        if used > room:
            return k
    return len(examples)


def check_gold(task, style, row):
    gold = task.gold(row)
    if style.choices and gold not in range(len(style.choices(row))):
        raise ValueError(f"wanted the number of one of {len(style.choices(row))} choices, got {gold!r}")


def guess(style, row):
    """The score (0 to 1) that guessing at random among a row's possible answers has on average; 0 for free answers."""
    if style.choices:
        n = len(style.choices(row))
        return 1 / n if n > 1 else 0.0
    return bbh_guess(row["input"], row["target"]) if "target" in row else 0.0


def bbh_guess(question, target):
    """Lettered options, or one of a pair of words."""
    options = len(OPTION.findall(question))
    pair = target.lower() in ("yes", "no", "true", "false", "valid", "invalid")
    return 1 / options if options else 0.5 if pair else 0.0
