"""What a model makes of tokens: log-probabilities of continuations, losses of sequences. No task is known here.

    logprobs = loglikelihoods(runner, items, groups)       # items: lists of (context, continuation), as many as choices
    losses = sequence_losses(runner, corpus)

What is shared is computed once, in up to three stages that continue one another through the latent KV cache:

    1. the beginning that all prompts of a group have in common (few-shot examples)      one row, kept for the group
    2. what the choices of a question have in common (the question)                      one row per question
    3. the rest (the choices)                                                            one row per choice

Rows within a stage differ in length and are padded on the right; the cache's row lengths are then set to the true ones.
`groups` names each item's group; only within one is a beginning shared. evals/batches.py says which rows run together.
"""

import math
from contextlib import nullcontext
from itertools import accumulate

import torch

from evals.batches import Unit, common_prefix, gather, my_share, plan, progress, shared_prefix
from layers import LatentCache

MAX_LOGITS = 2**26  # at once: 256 MB in fp32
NOT_NUMBERS = "the model's output is not a number; take a checkpoint from before it diverged"
SHARED = 0.25  # of its tokens that a question must save by running once, to be worth a stage of its own


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def encode_pair(encoding, context, continuation):
    """-> context tokens, continuation tokens, as lm-evaluation-harness splits them.

    The continuation is what encoding the whole text has beyond the context's own number of tokens; spaces at the end of
    the context go to the continuation; an empty context is one <|endoftext|>.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    whole, head = encoding.encode_ordinary(bare + continuation), encoding.encode_ordinary(bare)
    if len(whole) <= len(head):
        raise ValueError(f"the continuation {continuation!r} has no tokens of its own behind {bare[-40:]!r}")
    return head or [encoding.eot_token], whole[len(head) :]


# ----------------------------------------------------------------------------------------------------------------------
# Running the model


class Runner:
    """A model with what every call needs: its device, cache dtype, and for dtype='bfloat16' autocast and copies of the
    matrices in it, which autocast would otherwise make anew for every token."""

    def __init__(self, model, dtype="float32", max_length=None):
        self.model, self.config = model.eval(), model.config
        self.device = next(model.parameters()).device
        self.dtype = getattr(torch, dtype)
        self.max_length, self.copies = max_length or model.config.seq_len, None
        if dtype == "bfloat16":
            self.copies = [module._parameters[name].detach().bfloat16() for module, name in model.matrices()]
            self.head = [model.lm_head.weight.detach().bfloat16()]

    def hidden(self, rows, cache=None):
        """rows: lists of tokens, padded here on the right; continues `cache` and sets its true lengths. -> (R, T, C)"""
        width = max(map(len, rows))
        idx = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)  # (R, T)
        before = None if cache is None else cache.length.clone()
        h = self.forward(idx, cache)
        if cache is not None:
            cache.length = before + torch.tensor([len(row) for row in rows], device=self.device)
        return h

    def forward(self, idx, cache=None):
        """idx (R, T) -> (R, T, C); continues `cache`, all T tokens of each row."""
        copies = self.model.with_matrices(self.copies) if self.copies else nullcontext()
        with copies, torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model.hidden(idx, cache)

    def extend(self, cache, index, rows, room=0):
        """Run lists of tokens behind copies of the rows `index` of cache (None: an empty one) -> (R, T, C), new cache.

        The new cache has room for `room` tokens more.
        """
        width = max(map(len, rows)) + room
        if cache is None:
            cache = LatentCache(self.config, len(rows), width, self.device, self.dtype)
        else:
            cache = cache.rows(torch.tensor(index, device=self.device), cache.most + width)
        return self.hidden(rows, cache), cache

    def logits(self, h):
        """h (M, C) -> (M, vocab) in fp32."""
        head = [(self.model.lm_head, "weight")]
        narrow = self.model.with_matrices(self.head, head) if self.copies else nullcontext()
        with narrow, torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model.lm_head(h).float()


class Shared:
    """Keeps the cache of the last group's common beginning: batches of one group come one after the other."""

    def __init__(self, runner):
        self.runner, self.tokens, self.cache = runner, (), None

    def get(self, tokens):
        if tokens != self.tokens:
            self.tokens, self.cache = tokens, None  # the old one is freed before the new one is made
            self.cache = self.runner.extend(None, None, [tokens])[1] if tokens else None
        return self.cache


# ----------------------------------------------------------------------------------------------------------------------
# Log-likelihoods


class Scored:
    """One (context, continuation) as the model sees it: truncated from the left to max_length inputs.

    A continuation longer than max_length is scored on its last max_length tokens alone.
    """

    def __init__(self, context, continuation, max_length):
        whole = context + continuation
        self.inputs = whole[-(max_length + 1) :][:-1]
        self.targets = continuation[-len(self.inputs) :]
        self.truncated = len(whole) > max_length + 1
        self.free = len(self.inputs) - len(self.targets)  # inputs whose predictions nobody asks for


@torch.inference_mode()
def loglikelihoods(runner, items, groups=None, batch_tokens=16384, share=True, title=""):
    """items: each a list of (context tokens, continuation tokens) -> per item its list of (log-probability, greedy).

    The log-probability (nats) is summed over the continuation; greedy: each of its tokens was the likeliest.
    share=False scores every sequence whole, as a check and for timing. FloatingPointError where the model's output is
    not a number.
    """
    items = [[Scored(*pair, runner.max_length) for pair in item] for item in items]
    batches = my_share(plan(pools(items, groups or [0] * len(items), share), batch_tokens))
    results, shared = {}, Shared(runner)
    with progress(sum(len(u.asked) for b in batches for u in b.units), title) as bar:
        for batch in batches:
            found = score_batch(runner, batch.units, shared.get(batch.prefix))
            results |= found
            bar.update(len(found))
    results = all_numbers(gather(results), lambda score: score[0])
    return [[results[i, k] for k in range(len(item))] for i, item in enumerate(items)]


def pools(items, groups, share):
    """Units of all items, as evals/batches.py plans them: by prefix, those with a question apart from those without."""
    members, found = {}, {}
    for i, (item, group) in enumerate(zip(items, groups, strict=True)):
        # rows cut on the left begin anywhere: they share nothing and must not spoil what the others of the group share
        members.setdefault((group, any(s.truncated for s in item)), []).append(i)
    for mine in members.values():
        beginnings = [items[i][0].inputs[: common_prefix([s.inputs[: s.free] for s in items[i]])] for i in mine]
        prefix = shared_prefix(beginnings) if share else []
        for i, beginning in zip(mine, beginnings, strict=True):
            for unit in units_of(i, items[i], len(prefix), len(beginning) - len(prefix) if share else 0):
                found.setdefault((tuple(prefix), unit.question > 0), []).append(unit)
    return [(list(prefix), units) for (prefix, _), units in found.items()]


def units_of(i, item, done, question):
    """Item number i, behind `done` tokens of prefix, as one unit if it is worth running its question once, or as rows.

    Equal inputs are one row: choices of one token each (MMLU's letters) are all read from the same prediction.
    """
    rows = {}
    for k, scored in enumerate(item):
        rows.setdefault(tuple(scored.inputs), []).append(((i, k), scored))
    if (len(rows) - 1) * question >= SHARED * sum(len(row) - done for row in rows) and len(rows) > 1:
        asked = [(key, n, scored) for n, mine in enumerate(rows.values()) for key, scored in mine]
        return [Unit(list(rows), question, max(map(len, rows)) - done - question, asked)]
    return [Unit([row], 0, len(row) - done, [(key, 0, s) for key, s in mine]) for row, mine in rows.items()]


def score_batch(runner, units, cache):
    """Stages 2 and 3 of units -> {key: (log-probability, greedy)}. `cache` holds the shared prefix, or is None."""
    done = 0 if cache is None else cache.most  # of one row
    owners = [n for n, u in enumerate(units) for _ in u.rows]
    if units[0].question:
        questions = [u.rows[0][done : done + u.question] for u in units]
        _, cache = runner.extend(cache, [0] * len(units), questions)
    else:
        owners = [0] * len(owners)  # every row continues the prefix itself
    starts = [done + u.question for u in units for _ in u.rows]
    tails = [row[start:] for row, start in zip((row for u in units for row in u.rows), starts, strict=True)]
    h = runner.hidden(tails) if cache is None else runner.extend(cache, owners, tails)[0]  # (rows, T, C)
    firsts = accumulate((len(u.rows) for u in units), initial=0)  # the row of h that each unit begins with
    asked = [(key, first + n, scored) for first, u in zip(firsts, units, strict=False) for key, n, scored in u.asked]
    scores = read(runner, h, [(scored, row) for _, row, scored in asked], starts)
    return {key: score for (key, _, _), score in zip(asked, scores, strict=True)}


def all_numbers(results, number=lambda result: result):
    """results, if all of them are finite numbers. The same on every process: a model may break on one batch alone."""
    if not all(math.isfinite(number(result)) for result in results.values()):
        raise FloatingPointError(NOT_NUMBERS)
    return results


def read(runner, h, wanted, starts):
    """wanted: (scored, its row of h); h (rows, T, C), column 0 of row r being input number starts[r].

    -> (log-probability, greedy) of each."""
    at = [(row, s.free - starts[row] + k) for s, row in wanted for k in range(len(s.targets))]
    targets = torch.tensor([t for s, _ in wanted for t in s.targets], device=runner.device)
    at_rows, at_columns = torch.tensor(at, device=runner.device).unbind(1)
    h, picked, likeliest = h[at_rows, at_columns], [], []  # (M, C)
    chunk = max(1, MAX_LOGITS // runner.config.vocab_size)
    for h_c, targets_c in zip(h.split(chunk), targets.split(chunk), strict=True):
        logits = runner.logits(h_c)  # (chunk, vocab)
        picked.append(logits.log_softmax(-1).gather(1, targets_c.unsqueeze(1)).squeeze(1).double())
        likeliest.append(logits.argmax(-1) == targets_c)
    counts = [len(s.targets) for s, _ in wanted]
    both = zip(torch.cat(picked).split(counts), torch.cat(likeliest).split(counts), strict=True)
    return [(float(p.sum()), bool(hit.all())) for p, hit in both]


# ----------------------------------------------------------------------------------------------------------------------
# Loss on a prepared corpus


@torch.inference_mode()
def sequence_losses(runner, corpus, limit=0, batch_tokens=16384, title=""):
    """The mean loss in nats of each of the first `limit` (0: all) sequences of a data.Corpus, as a list."""
    ids = range(min(limit or corpus.n_sequences, corpus.n_sequences))
    rows = max(1, batch_tokens // corpus.seq_len)
    batches = my_share([list(ids[i : i + rows]) for i in range(0, len(ids), rows)])
    results = {}
    with progress(sum(map(len, batches)), title) as bar:
        for batch in batches:
            x, y = corpus.sequences(batch)  # (rows, T) each
            h, y = runner.hidden(x.tolist()).flatten(0, 1), y.to(runner.device).flatten()
            chunk = max(1, MAX_LOGITS // runner.config.vocab_size)
            losses = [
                torch.nn.functional.cross_entropy(runner.logits(h_c), y_c, reduction="none")
                for h_c, y_c in zip(h.split(chunk), y.split(chunk), strict=True)
            ]
            means = torch.cat(losses).double().view(len(batch), -1).mean(1)
            results.update(zip(batch, means.tolist(), strict=True))
            bar.update(len(batch))
    results = all_numbers(gather(results))
    return [results[i] for i in ids]
