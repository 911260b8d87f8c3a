"""Sample from a checkpoint: a prompt in, text out, streamed as it is made.

    python sample.py out/demo/mhc --prompt="def main"
    python sample.py out/demo/mhc --prompt=FILE:story.txt --num_samples=3 --temperature=0.8 --top_p=0.95
    printf "import os" | python sample.py out/demo/mhc/step-00000300 --temperature=0 > continuation.txt

The argument is a run folder (its newest whole checkpoint) or one step folder. <|endoftext|> in a prompt is the token
between documents, and an empty prompt is that token alone; a sample ends where the model writes it. Text goes to
stdout, all else to stderr. Several samples are made at once, in one batch: the first is streamed live, and each after
it as soon as those before it have ended.

Sample number i has the seed `seed + i` and a generator of its own: it does not depend on how many are drawn beside it,
and can be drawn again alone. (Batches of different size round differently, by about 1e-7; a draw that falls that near
to the border between two tokens can go the other way.)

The prompt goes through the model once, whole; every further token goes through it alone and attends to MLA's compressed
cache (the latent and the RoPE key, layers.LatentCache) in absorbed form. `generate` below is the function to import.
"""

import program

if __name__ == "__main__":
    program.begin()  # before torch, and before anything that takes long to import

import codecs
import contextlib
import os
import stat
import sys
import time

import torch

from checkpoint import CheckpointError, load_model
from configurator import above, at_least, between, configure, fail, one_of
from evals.generate import Vocabulary, continue_rows
from evals.score import NOT_NUMBERS, Runner
from names import SAMPLE
from parallel import resolve_device
from tokenizer import ENDOFTEXT, encode, open_encoding

prompt = ""  # text, or FILE:path; "": what is piped in, or else the beginning of a new document
num_samples = 1  # made at once
max_new_tokens = 200  # in each sample, at most
temperature = 0.8  # 0: always the likeliest token
top_k = 0  # draw from the k likeliest tokens only; 0: from all
top_p = 1.0  # draw from the fewest likeliest tokens that together have this probability; 1: from all
seed = 1337  # of the first sample; the next has seed + 1
data_dir = ""  # a corpus made with the checkpoint's tokenizer; "": the one it was trained on
device = "auto"  # 'cpu' | 'cuda' | 'mps'; 'auto': the best there is
dtype = "float32"  # or 'bfloat16': autocast outside the mappings

PROMPT_BYTES = 1 << 26
RULES = {
    "num_samples": at_least(1, 10**5),
    "max_new_tokens": at_least(1, 10**6),
    "temperature": at_least(0),
    "top_k": at_least(0),
    "top_p": above(0, 1),
    "seed": between(0, 2**32 - 1),  # torch's generator on the CPU tells no more apart
    "device": one_of("auto", "cpu", "cuda", "mps"),
    "dtype": one_of("float32", "bfloat16"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Generation


def keep_likeliest(logits, top_k, top_p):
    """logits (M, V) with all but the top_k likeliest (0: all), and of these all but the nucleus of top_p, at -inf.

    The nucleus: the fewest likeliest tokens whose probability reaches top_p, the one that crosses it included.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True, stable=True)
        before = probs.cumsum(-1) - probs  # what the likelier ones have together
        outside = torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def draw(logits, temperature, top_k, top_p, generators):
    """logits (M, V), one generator a row -> M tokens. Temperature acts first, then top_k, then top_p.

    One uniform number a token, looked up in the cumulated probabilities: in fp64 and thus on the CPU (MPS has no fp64),
    and in the order of token numbers, which rounding cannot change as it can the order of nearly equal probabilities.
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    logits = logits.cpu().double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the likeliest at 0: no temperature overflows
    cumulated = keep_likeliest(logits, top_k, top_p).softmax(-1).cumsum(-1)  # (M, V)
    u = torch.stack([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])  # (M, 1), below 1
    return torch.searchsorted(cumulated, u * cumulated[:, -1:], right=True).squeeze(-1).tolist()


@torch.inference_mode()
def generate(
    model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seeds=None, stop=None, on_token=None,
    forbidden=None, dtype="float32",
):  # fmt: skip
    """prompts: lists of tokens, of any lengths, at least one each -> for each the list of new tokens, in one batch.

    seeds: one a prompt (None: 0, 1, ...). stop: the token that ends a sample; it is not part of it. on_token(i, token):
    called for every token of sample i as it is made, and with None at its end. forbidden (V,) bool: tokens never drawn.
    Equal prompts are run once. temperature 0 is greedy. Puts the model into eval mode.
    """
    if empty := [i for i, p in enumerate(prompts) if not p]:
        raise ValueError(f"prompt {empty[0]} has no tokens: wanted at least one (the document separator will do)")
    runner = Runner(model, dtype)
    different = list(dict.fromkeys(map(tuple, prompts)))
    h, cache = runner.extend(None, None, list(map(list, different)), room=max_new_tokens)
    rows = torch.tensor([different.index(tuple(p)) for p in prompts], device=runner.device)
    last = torch.tensor([len(p) - 1 for p in prompts], device=runner.device)
    h, cache = h[rows, last], cache.rows(rows)  # (samples, C): the model's output at each prompt's last token
    seeds = range(len(prompts)) if seeds is None else seeds
    generators = [torch.Generator().manual_seed(s) for s, _ in zip(seeds, prompts, strict=True)]
    samples = [[] for _ in prompts]
    on_token = on_token or (lambda i, token: None)

    def pick(logits, rows):
        if logits.isnan().any():
            raise FloatingPointError(NOT_NUMBERS)
        if forbidden is not None:
            logits = logits.masked_fill(forbidden, -torch.inf)
        return draw(logits, temperature, top_k, top_p, [generators[i] for i in rows])

    def take(i, token):
        if token != stop:
            samples[i].append(token)
            on_token(i, token)
        ended = token == stop or len(samples[i]) == max_new_tokens
        if ended:
            on_token(i, None)
        return not ended

    continue_rows(runner, h, cache, max_new_tokens, pick, take)
    return samples


# ----------------------------------------------------------------------------------------------------------------------
# Text


def read_prompt(prompt):
    """The text that the setting `prompt` stands for."""
    try:
        if prompt.startswith("FILE:"):
            with open(prompt[5:], "rb") as f:  # it may be a pipe, as of <(command)
                return bounded(f).decode()
        if not prompt and sys.stdin and is_piped(sys.stdin):
            note("reading the prompt from stdin")
            return bounded(sys.stdin.buffer).decode()
    except OSError as e:
        fail(f"prompt={prompt!r}: the file cannot be read ({e.strerror})")
    except UnicodeDecodeError as e:
        fail(f"prompt={prompt or 'stdin'!r}: wanted UTF-8, got a byte that is not at {e.start} ({e.reason})")
    return prompt


def bounded(f):
    """All of a file of at most PROMPT_BYTES."""
    if len(data := f.read(PROMPT_BYTES + 1)) > PROMPT_BYTES:
        fail(f"prompt={prompt or 'stdin'!r}: wanted at most {PROMPT_BYTES} bytes")
    return data


def is_piped(stream):
    """Whether somebody has put a file or a pipe there, rather than a terminal or nothing at all."""
    mode = os.fstat(stream.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def encode_prompt(encoding, text):
    """Tokens of a text in which <|endoftext|> is the separator; of an empty one, the separator alone."""
    tokens = []
    for i, document in enumerate(text.split(ENDOFTEXT)):
        tokens += [encoding.eot_token] * (i > 0) + encode(encoding, document).tolist()
    return tokens or [encoding.eot_token]


class Printer:
    """on_token for `generate`: writes each sample, the prompt before it, to `out`, one sample after the other.

    Tokens are bytes, and a character can lie across several: what is not yet a whole one waits. So does the text of a
    sample whose turn has not come.
    """

    def __init__(self, token_bytes, headings, out):
        self.token_bytes, self.headings, self.out = token_bytes, headings, out
        n = len(headings)
        self.decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(n)]
        self.waiting, self.ended, self.turn = list(headings), [False] * n, 0
        self.tokens, self.first_at, self.last_at = [0] * n, None, None

    def __call__(self, i, token):
        self.last_at = time.perf_counter()
        self.first_at = self.first_at or self.last_at
        self.tokens[i] += token is not None
        self.ended[i] = token is None
        self.waiting[i] += self.decoders[i].decode(self.token_bytes[token] if token is not None else b"", token is None)
        while self.turn < len(self.waiting):
            self.out.write(self.waiting[self.turn])
            self.waiting[self.turn] = ""
            if not self.ended[self.turn]:
                break
            self.out.write("\n")
            self.turn += 1
        self.out.flush()

    def rates(self, start, prompt_tokens):
        """One line: how fast the prompt was read and how fast new tokens came, which are different kinds of work."""
        prefill, decode = self.first_at - start, self.last_at - self.first_at
        further = sum(self.tokens) - sum(n > 0 for n in self.tokens)  # the first of each comes with the prefill
        line = f"prefill: {prompt_tokens} tokens in {prefill:.3f} s, {prompt_tokens / prefill:,.0f} tokens/s"
        if further:
            line += f"; decode: {further} tokens in {decode:.3f} s, {further / decode:,.0f} tokens/s"
        return line + (f" ({len(self.tokens)} samples at once)" if len(self.tokens) > 1 else "")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def note(line):
    print(f"note: {line}", file=sys.stderr)


def open_checkpoint(checkpoint, settings):
    """-> model and tokenizer; a checkpoint that cannot be used ends the program."""
    try:
        model, trained = load_model(checkpoint, resolve_device(device))
    except CheckpointError as e:
        fail(str(e))
    return model, open_encoding(settings, trained, model.config)


def main():
    checkpoints = [a for a in sys.argv[1:] if not a.startswith("-") and not a.endswith(".py")]
    others = [a for a in sys.argv[1:] if a not in checkpoints]
    to_stderr = contextlib.nullcontext() if {"-h", "--help"} & set(others) else contextlib.redirect_stdout(sys.stderr)
    with to_stderr:  # stdout is for text
        settings = configure(globals(), RULES, others, SAMPLE)
    if len(checkpoints) != 1:
        fail(f"wanted one run folder or step folder, like python sample.py out/demo/mhc; got {len(checkpoints)}")
    if seed + num_samples > 2**32:
        fail(f"seed={seed}: wanted at most {2**32 - num_samples} for {num_samples} samples, each of which adds one")
    text = read_prompt(prompt)
    model, encoding = open_checkpoint(checkpoints[0], settings)
    tokens = encode_prompt(encoding, text)
    longest, trained_on = len(tokens) + max_new_tokens, model.config.seq_len
    if longest > trained_on:
        note(f"prompt and sample come to {longest} tokens, the model was trained on {trained_on}: it may ramble beyond")
    if temperature == 0 and num_samples > 1:
        note("with temperature=0 all samples are the same")
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the program
    shown = encoding.decode(tokens) if text else ""  # as the model sees it
    several = num_samples > 1
    headings = [f"--- seed {seed + i} ---\n{shown}" if several else shown for i in range(num_samples)]
    vocabulary = Vocabulary(encoding, model.config.vocab_size, next(model.parameters()).device)
    printer, start = Printer(vocabulary.bytes, headings, sys.stdout), time.perf_counter()
    try:
        generate(
            model, [tokens] * num_samples, max_new_tokens, temperature, top_k, top_p, range(seed, seed + num_samples),
            vocabulary.eot, printer, vocabulary.forbidden, dtype,
        )  # fmt: skip
    except FloatingPointError as e:
        fail(f"{checkpoints[0]}: {e}")
    except BrokenPipeError:  # whoever was reading, `head` for one, has had enough
        sys.stdout = open(os.devnull, "w")
        return
    print(printer.rates(start, len(tokens)), file=sys.stderr)


if __name__ == "__main__":
    program.run(main)
