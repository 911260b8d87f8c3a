"""Greedy generation for eval.py, and the loop that sample.py generates with: prompts in, texts out.

    texts = generate(runner, encoding, prompts, groups, stops, max_new_tokens)

The beginning that all prompts of a group have in common runs once; see evals/score.py. Prompts of one batch are padded
on the right, every further token runs alone through the latent cache, and rows that have ended are dropped.
"""

import torch

from evals.batches import Unit, gather, my_share, plan, progress, shared_prefix
from evals.score import NOT_NUMBERS, Shared


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
    by_prefix = pools(prompts, groups or [0] * len(prompts), runner.max_length - budget)
    batches = my_share(plan(by_prefix, batch_tokens, room=budget))
    results, shared = {}, Shared(runner)
    with progress(sum(len(b.units) for b in batches), title) as bar:
        for batch in batches:
            tails = [u.rows[0][len(batch.prefix) :] for u in batch.units]
            texts = generate_batch(runner, vocabulary, tails, shared.get(batch.prefix), stops, budget)
            results |= {u.asked[0]: text for u, text in zip(batch.units, texts, strict=True)}
            bar.update(len(texts))
    results = gather(results)
    if None in results.values():
        raise FloatingPointError(NOT_NUMBERS)
    return [results[i] for i in range(len(prompts))]


def pools(prompts, groups, longest):
    """(prefix, units), a unit for each prompt; those cut to `longest` tokens share nothing, as in score.py."""
    members = {}
    for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        members.setdefault((group, len(prompt) == longest), []).append(i)
    found = {}
    for mine in members.values():
        prefix = shared_prefix([prompts[i][:-1] for i in mine])
        units = [Unit([prompts[i]], 0, len(prompts[i]) - len(prefix), [i]) for i in mine]
        found.setdefault(tuple(prefix), []).extend(units)
    return [(list(prefix), units) for prefix, units in found.items()]


def generate_batch(runner, vocabulary, prompts, cache, stops, budget):
    """Continue the prompts (behind the shared prefix in `cache`, or None) by up to `budget` tokens each -> texts.

    None for one at which the model's output is not a number.
    """
    h, cache = runner.extend(cache, [0] * len(prompts), prompts, room=budget)
    h = h[torch.arange(len(prompts)), [len(p) - 1 for p in prompts]]  # (R, C) at each prompt's last token
    texts, broken = [bytearray() for _ in prompts], set()

    def pick(logits, rows):
        broken.update(row for row, bad in zip(rows, logits.isnan().any(-1).tolist(), strict=True) if bad)
        return logits.masked_fill(vocabulary.forbidden, -torch.inf).argmax(-1).tolist()

    def take(row, token):
        return not (row in broken or token == vocabulary.eot or ended(texts[row], vocabulary.bytes[token], stops))

    continue_rows(runner, h, cache, budget, pick, take)
    return [None if i in broken else cut(text, stops).decode(errors="replace") for i, text in enumerate(texts)]


def continue_rows(runner, h, cache, budget, pick, take):
    """The loop of generation: up to `budget` tokens behind each row of `cache`, which has room for them.

    h (R, C): the model's output at each row's last token. pick(logits (M, vocab), rows) -> M tokens, `rows` saying
    which of the R rows they are for; take(row, token) -> whether this row goes on. Rows that do not are soon dropped.
    """
    live = list(range(len(h)))  # the rows of the cache, as numbers of the rows it began with
    running, one_more = set(live), Decoder(runner, cache)
    for left in range(budget, 0, -1):
        tokens = pick(runner.logits(h), live)
        for row, token in zip(live, tokens, strict=True):
            if row in running and not take(row, token):
                running.discard(row)
        if not running or left == 1:
            break
        if 2 * len(running) <= len(live):  # half of the rows run for nothing: drop them
            keep = [k for k, row in enumerate(live) if row in running]
            one_more = Decoder(runner, one_more.cache.rows(torch.tensor(keep, device=runner.device)))
            live, tokens = [live[k] for k in keep], [tokens[k] for k in keep]
        h = one_more(tokens)


class Decoder:
    """A token more behind every row of a cache: Decoder(runner, cache)(R tokens) -> the model's output (R, C).

    On a GPU a token is one CUDA graph instead of thousands of launches. Its shapes are fixed: attention looks at REACH
    positions at a time, those not written yet masked, and a graph is made anew when they are full. Where experts wait
    for the device (never_waits), which a graph cannot, there is none.
    """

    REACH = 256

    def __init__(self, runner, cache):
        self.runner, self.cache, self.replay = runner, cache, None
        self.graphs = runner.device.type == "cuda" and never_waits(runner.config, runner.dtype)

    def __call__(self, tokens):
        if not self.graphs:
            return self.runner.hidden([[token] for token in tokens], self.cache)[:, 0]
        tokens = torch.tensor(tokens, device=self.runner.device).unsqueeze(1)  # (R, 1)
        if self.replay is None or self.cache.most >= self.cache.reach:
            self.make(tokens)
        most = self.cache.most
        self.idx.copy_(tokens)
        self.replay()
        self.cache.most = most + 1  # a graph adds to `length`, which the device holds
        return self.h

    def make(self, tokens):
        """A graph of one step. Making it runs the step, at the positions that the first replay writes."""
        cache, size = self.cache, self.cache.latent.shape[2]
        cache.reach = min(size, (cache.most // self.REACH + 1) * self.REACH)
        self.idx, length, most = tokens.clone(), cache.length.clone(), cache.most

        def step():
            cache.most = most
            return self.runner.forward(self.idx, cache)[:, 0]

        def undo():
            cache.length.copy_(length)

        self.replay, self.h = captured(step, undo)
        cache.most = most


def never_waits(config, dtype):
    """Whether a token of this model runs on this GPU without waiting for it. torch's grouped product, which takes
    experts in bf16 of aligned widths, is a loop on the host before Hopper; all others go by blocks (layers.py)."""
    aligned = config.n_embd % 8 == 0 and config.moe_intermediate_size % 8 == 0
    grouped = config.has_moe and dtype == torch.bfloat16 and aligned
    return not grouped or torch.cuda.get_device_capability() >= (9, 0)


def captured(step, undo):
    """step() as a CUDA graph -> what replays it, and the tensor it leaves its result in. undo() follows every run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels are compiled and workspaces made before, as a graph cannot hold that
            step()
            undo()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = step()
    return graph.replay, h


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
