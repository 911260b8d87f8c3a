"""Log-likelihoods and greedy generation for eval.py: token lists in, numbers and texts out. No task is known here.

    logprobs = loglikelihoods(model, items, groups)       # items: lists of (context, continuation), as many as choices
    texts = generate(model, encoding, prompts, groups, stops, max_new_tokens)

What is shared is computed once, in up to three stages that continue one another through the latent KV cache:

    1. the beginning that all prompts of a group have in common (few-shot examples)      one row, kept for the group
    2. what the choices of a question have in common (the question)                      one row per question
    3. the rest (the choices), or the tokens that generation adds                        one row per choice, per prompt

Prompts within a stage differ in length and are padded on the right; the cache's row lengths are then set to the true
ones. Batches are planned before anything runs and do not depend on the number of processes: process r of R takes every
R-th batch, and the results are the same bits. `groups` names each item's group; only within one is a prefix shared.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from model import LatentCache

WORTH_SHARING = 16  # tokens; a shorter common beginning is cheaper to run again than to copy
MAX_LOGITS = 2**26  # at once: 256 MB in fp32


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


def common_prefix(sequences):
    """Number of tokens that all sequences begin with."""
    first, last = min(sequences), max(sequences)  # lexicographic: all others lie between these two
    for i, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return i
    return min(len(first), len(last))


# ----------------------------------------------------------------------------------------------------------------------
# Running the model


class Runner:
    """A model with what every call needs: its device, cache dtype, and autocast for dtype='bfloat16'."""

    def __init__(self, model, dtype="float32", max_length=None):
        self.model, self.config = model.eval(), model.config
        self.device = next(model.parameters()).device
        self.dtype = getattr(torch, dtype)
        self.max_length = max_length or model.config.seq_len

    def hidden(self, rows, cache=None):
        """rows: lists of tokens, padded here on the right; continues `cache` and sets its true lengths. -> (R, T, C)"""
        width = max(map(len, rows))
        idx = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)  # (R, T)
        before = None if cache is None else cache.length.clone()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            h = self.model.hidden(idx, cache)
        if cache is not None:
            cache.length = before + torch.tensor([len(row) for row in rows], device=self.device)
        return h

    def extend(self, cache, index, rows, room=0):
        """Run lists of tokens behind copies of the rows `index` of cache (None: an empty one) -> (R, T, C), new cache.

        The new cache has room for `room` tokens more.
        """
        width = max(map(len, rows)) + room
        if cache is None:
            cache = LatentCache(self.config, len(rows), width, self.device, self.dtype)
        else:
            cache = cache.rows(torch.tensor(index, device=self.device), int(cache.length.max()) + width)
        return self.hidden(rows, cache), cache

    def logits(self, h):
        """h (M, C) -> (M, vocab) in fp32."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
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


def progress(batches, title):
    """A bar over items with the time left; on the first process only, and none without a title."""
    quiet = not title or (dist.is_initialized() and dist.get_rank() > 0)
    return tqdm(total=sum(len(b.items) for b in batches), desc=title, disable=quiet, unit="item", smoothing=0.05)


@dataclass
class Batch:
    items: list  # numbers of items
    prefix: list  # tokens that all their rows begin with, at least WORTH_SHARING of them or none


def plan(lengths, sizes, beginnings, groups, batch_tokens):
    """Batches of items of one group and of similar length, longest first.

    lengths: each item's longest row; sizes: its rows; beginnings: the tokens it can share with others (before anything
    that is scored). A batch has at most batch_tokens tokens, padding and shared ones counted, and at least one item.
    """
    batches = []
    for group in dict.fromkeys(groups):
        items = sorted((i for i, g in enumerate(groups) if g == group), key=lambda i: -lengths[i])
        n = common_prefix([beginnings[i] for i in items]) if len(items) > 1 else 0
        prefix = beginnings[items[0]][:n] if n >= WORTH_SHARING else []
        batch, rows, longest = [], 0, lengths[items[0]]
        for i in items:
            if batch and (rows + sizes[i]) * longest > batch_tokens:
                batches.append(Batch(batch, prefix))
                batch, rows, longest = [], 0, lengths[i]
            batch.append(i)
            rows += sizes[i]
        batches.append(Batch(batch, prefix))
    return batches


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
    share=False scores every sequence whole, as a check and for timing.
    """
    items = [[Scored(*pair, runner.max_length) for pair in item] for item in items]
    # rows cut on the left begin anywhere: they share nothing and must not spoil what the others of the group share
    groups = [(g, any(s.truncated for s in item)) for g, item in zip(groups or [0] * len(items), items, strict=True)]
    lengths, sizes = [max(len(s.inputs) for s in item) for item in items], [len(item) for item in items]
    beginnings = [item[0].inputs[: common_prefix([s.inputs[: s.free] for s in item])] for item in items]
    batches = my_share(plan(lengths, sizes, beginnings if share else [[]] * len(items), groups, batch_tokens))
    results, shared = {}, Shared(runner)
    with progress(batches, title) as bar:
        for batch in batches:
            questions = [beginnings[i][len(batch.prefix) :] if share else [] for i in batch.items]
            scores = score_batch(runner, [items[i] for i in batch.items], questions, shared.get(batch.prefix))
            results.update(zip(batch.items, scores, strict=True))
            bar.update(len(batch.items))
    results = gather(results)
    return [results[i] for i in range(len(items))]


def score_batch(runner, items, questions, cache):
    """Stages 2 and 3. `cache` holds the shared prefix (or is None), questions each item's tokens common to its rows."""
    done = 0 if cache is None else int(cache.length[0])
    # equal inputs need one row: choices of one token each (MMLU's letters) are all read from the same prediction
    rows = [list(dict.fromkeys(tuple(s.inputs) for s in item)) for item in items]
    if all(len(r) == 1 for r in rows):
        questions = [[] for _ in items]  # no two rows to share it
    owners = [i for i, r in enumerate(rows) for _ in r]
    starts = [done + len(questions[i]) for i in owners]
    tails = [list(inputs[start:]) for inputs, start in zip(sum(rows, []), starts, strict=True)]
    index = [0] * len(owners)
    if any(questions):
        _, cache = runner.extend(cache, [0] * len(items), [q or [0] for q in questions])
        cache.length = torch.tensor([done + len(q) for q in questions], device=runner.device)
        index = owners
    h = runner.hidden(tails) if cache is None else runner.extend(cache, index, tails)[0]  # (rows, T, C)
    place = {(i, inputs): n for n, (i, inputs) in enumerate(zip(owners, sum(rows, []), strict=True))}
    wanted = [(s, place[i, tuple(s.inputs)]) for i, item in enumerate(items) for s in item]
    scores = iter(read(runner, h, wanted, starts))
    return [[next(scores) for _ in item] for item in items]


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
# Generation


class Vocabulary:
    """The bytes of every token, and which ids must never be generated: those beyond the tokenizer and its holes."""

    def __init__(self, encoding, vocab_size, device):
        self.encoding, self.eot, self.bytes = encoding, encoding.eot_token, []
        for token in range(vocab_size):
            try:
                self.bytes.append(encoding.decode_single_token_bytes(token))
            except KeyError:
                self.bytes.append(None)
        self.forbidden = torch.tensor([b is None for b in self.bytes], device=device)


@torch.inference_mode()
def generate(runner, encoding, prompts, groups=None, stops=(), max_new_tokens=256, batch_tokens=16384, title=""):
    """prompts: texts -> the greedy continuation of each, cut before the first of `stops` and at <|endoftext|>.

    As in lm-evaluation-harness a prompt is truncated from the left so that max_new_tokens fit behind it; these are at
    most half of max_length.
    """
    budget = min(max_new_tokens, runner.max_length // 2)
    prompts = [(encoding.encode_ordinary(p) or [encoding.eot_token])[budget - runner.max_length :] for p in prompts]
    vocabulary = Vocabulary(encoding, runner.config.vocab_size, runner.device)
    stops = [stop.encode() for stop in stops]
    # left-truncated prompts share nothing, see loglikelihoods
    groups = zip(groups or [0] * len(prompts), (len(p) == runner.max_length - budget for p in prompts), strict=True)
    lengths, beginnings = [len(p) + budget for p in prompts], [p[:-1] for p in prompts]
    batches = my_share(plan(lengths, [1] * len(prompts), beginnings, list(groups), batch_tokens))
    results, shared = {}, Shared(runner)
    with progress(batches, title) as bar:
        for batch in batches:
            tails = [prompts[i][len(batch.prefix) :] for i in batch.items]
            texts = generate_batch(runner, vocabulary, tails, shared.get(batch.prefix), stops, budget)
            results.update(zip(batch.items, texts, strict=True))
            bar.update(len(batch.items))
    results = gather(results)
    return [results[i] for i in range(len(prompts))]


def generate_batch(runner, vocabulary, prompts, cache, stops, budget):
    """Continue the prompts (behind the shared prefix in `cache`, or None) by up to `budget` tokens each -> texts."""
    h, cache = runner.extend(cache, [0] * len(prompts), prompts, room=budget)
    h = h[torch.arange(len(prompts)), [len(p) - 1 for p in prompts]]  # (R, C) at each prompt's last token
    texts = [bytearray() for _ in prompts]

    def pick(logits, rows):
        return logits.masked_fill(vocabulary.forbidden, -torch.inf).argmax(-1).tolist()

    def take(row, token):
        return token != vocabulary.eot and not ended(texts[row], vocabulary.bytes[token], stops)

    continue_rows(runner, h, cache, budget, pick, take)
    return [cut(text, stops).decode(errors="replace") for text in texts]


def continue_rows(runner, h, cache, budget, pick, take):
    """The loop of generation: up to `budget` tokens behind each row of `cache`, which has room for them.

    h (R, C): the model's output at each row's last token. pick(logits (M, vocab), rows) -> M tokens, `rows` saying
    which of the R rows they are for; take(row, token) -> whether this row goes on. Rows that do not are soon dropped.
    """
    live = list(range(len(h)))  # the rows of the cache, as numbers of the rows it began with
    running = set(live)
    for left in range(budget, 0, -1):
        tokens = pick(runner.logits(h), live)
        for row, token in zip(live, tokens, strict=True):
            if row in running and not take(row, token):
                running.discard(row)
        if not running or left == 1:
            break
        if 2 * len(running) <= len(live):  # half of the rows run for nothing: drop them
            keep = [k for k, row in enumerate(live) if row in running]
            cache = cache.rows(torch.tensor(keep, device=runner.device))
            live, tokens = [live[k] for k in keep], [tokens[k] for k in keep]
        h = runner.hidden([[token] for token in tokens], cache)[:, 0]


def ended(text, new, stops):
    """Add the bytes `new` to text; whether a stop string is complete now."""
    text += new
    tail = max(map(len, stops), default=0) + len(new)
    return any(stop in text[-tail:] for stop in stops)


def cut(text, stops):
    """Bytes up to the first stop."""
    for stop in stops:
        text = text.split(stop)[0]
    return bytes(text)


# ----------------------------------------------------------------------------------------------------------------------
# Loss on a prepared corpus


@torch.inference_mode()
def sequence_losses(runner, corpus, limit=0, batch_tokens=16384, title=""):
    """The mean loss in nats of each of the first `limit` (0: all) sequences of a data.Corpus, as a list."""
    ids = list(range(min(limit or corpus.n_sequences, corpus.n_sequences)))
    rows = max(1, batch_tokens // corpus.seq_len)
    batches = my_share([Batch(ids[i : i + rows], []) for i in range(0, len(ids), rows)])
    results = {}
    with progress(batches, title) as bar:
        for batch in batches:
            x, y = corpus.sequences(batch.items)  # (rows, T) each
            h, y = runner.hidden(x.tolist()).flatten(0, 1), y.to(runner.device).flatten()
            chunk = max(1, MAX_LOGITS // runner.config.vocab_size)
            losses = [
                torch.nn.functional.cross_entropy(runner.logits(h_c), y_c, reduction="none")
                for h_c, y_c in zip(h.split(chunk), y.split(chunk), strict=True)
            ]
            means = torch.cat(losses).double().view(len(batch.items), -1).mean(1)
            results.update(zip(batch.items, means.tolist(), strict=True))
            bar.update(len(batch.items))
    results = gather(results)
    return [results[i] for i in ids]
