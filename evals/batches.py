"""Which rows run together: batches with little padding, planned before anything runs and shared out to processes.

A unit is what cannot be torn apart: rows that continue one question, or one row alone. Units whose rows begin with the
same prefix (few-shot examples) form a pool; a batch is some units of one pool. It runs the question of each unit once,
padded to the longest, and then every row's tail behind it, padded to the longest. Plans do not depend on the number of
processes: process r of R takes every R-th batch, and the results are the same bits.
"""

from dataclasses import dataclass, field
from itertools import accumulate

import torch.distributed as dist
from tqdm import tqdm

WORTH_SHARING = 16  # tokens; a shorter common beginning is cheaper to run again than to copy
CALL = 32  # tokens of padding that cost about as much as one more call of a small model on a CPU


@dataclass
class Unit:
    """rows: distinct lists of tokens, the first `question` tokens behind the prefix being the same in all."""

    rows: list
    question: int = 0
    tail: int = 0  # tokens of the longest row behind prefix and question
    asked: list = field(default_factory=list)  # what the caller wants to know of it


@dataclass
class Batch:
    prefix: list  # tokens that all rows of all units begin with, at least WORTH_SHARING of them or none
    units: list


def common_prefix(sequences):
    """Number of tokens that all sequences begin with."""
    first, last = min(sequences), max(sequences)  # lexicographic: all others lie between these two
    for i, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return i
    return min(len(first), len(last))


def shared_prefix(beginnings):
    """The tokens that all `beginnings` have in common, if they are worth a cache of their own; else []."""
    n = common_prefix(beginnings) if len(beginnings) > 1 else 0
    return list(beginnings[0][:n]) if n >= WORTH_SHARING else []


def plan(pools, batch_tokens, room=0):
    """pools: (prefix, units) each -> all batches, a pool's one after the other, its largest first.

    A batch has at most batch_tokens tokens, padding and copies of the prefix counted and `room` more for each row, and
    at least one unit. It is cut until its padding is cheaper than further calls: one call a stage, and one a token of
    `room`, which generation fills.
    """
    batches = []
    for prefix, units in pools:
        whole, cut = [units], []
        while whole:
            units = whole.pop()
            size, saved = tokens_of(units, len(prefix) + room), padding(units)
            calls = 1 + room + any(u.question for u in units)
            if len(units) > 1 and (size > batch_tokens or sum(saved) > CALL * calls):
                whole += cut_in_two(units, by_question=saved[0] > saved[1])
            else:
                cut.append((size, units))
        batches += [Batch(prefix, units) for _, units in sorted(cut, key=lambda c: -c[0])]
    return batches


def tokens_of(units, besides):
    """Tokens that a batch of units holds: every row as long as the longest, and `besides` for each."""
    rows = sum(len(u.rows) for u in units)
    return rows * (max(u.question for u in units) + max(u.tail for u in units) + besides)


def padding(units):
    """Tokens of padding that a batch runs and its units alone would not: of questions, of tails."""
    questions = len(units) * max(u.question for u in units) - sum(u.question for u in units)
    tails = sum(len(u.rows) for u in units) * max(u.tail for u in units) - sum(len(u.rows) * u.tail for u in units)
    return questions, tails


def cut_in_two(units, by_question):
    """The longer ones and the shorter ones, cut where that saves most padding; equally long ones in the middle."""
    length, weight = (lambda u: u.question, lambda u: 1) if by_question else (lambda u: u.tail, lambda u: len(u.rows))
    units = sorted(units, key=lambda u: -length(u))  # stable
    heavier = list(accumulate(map(weight, units)))  # rows (or questions) up to each
    longest = length(units[0])

    def run(k):  # tokens if the first k go alone
        return heavier[k - 1] * longest + (heavier[-1] - heavier[k - 1]) * length(units[k])

    k = min(range(1, len(units)), key=lambda k: (run(k), abs(2 * k - len(units))))
    return units[:k], units[k:]


# ----------------------------------------------------------------------------------------------------------------------
# Processes


def my_share(batches):
    """Every R-th batch in a run of R processes, all of them in a run of one."""
    return batches[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else batches


def gather(results):
    """Merge the dicts {item: result} of all processes; every process gets the whole."""
    if not dist.is_initialized():
        return results
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, results)
    return {key: value for part in parts for key, value in part.items()}


def progress(total, title, unit="row"):
    """A bar with the time left; on the first process only, and none without a title."""
    quiet = not title or (dist.is_initialized() and dist.get_rank() > 0)
    return tqdm(total=total, desc=title, disable=quiet, unit=unit, smoothing=0.05)
