"""Tokenizers: bytes, a BPE trained on the spot, and tiktoken's; all of them are tiktoken.Encoding in the end.

    make_tokenizer("bytes", ...)        256 bytes and <|endoftext|>; needs nothing
    make_tokenizer("bpe2048", texts)    trained on `texts`, 2048 tokens in all, <|endoftext|> the last of them
    make_tokenizer("gpt2", ...)         tiktoken's by name: gpt2, cl100k_base, o200k_base, r50k_base, p50k_base ...

A corpus carries its tokenizer (tokenizer.json: split pattern, ranks, special tokens), whichever it is, so that reading
one never downloads anything: load_tokenizer(data_dir).
"""

import base64
import contextlib
import hashlib
import heapq
import json
import os
import re
import tempfile
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import regex
import tiktoken
import tiktoken.load
from tiktoken_ext.openai_public import r50k_pat_str
from tqdm import tqdm

import owned
from configurator import fail
from data import DataError, open_data, read_meta
from download import DownloadError, read_url
from records import RecordError, each, integer, read_json, string

ENDOFTEXT = "<|endoftext|>"


def make_tokenizer(name, texts=(), mirror=""):
    """The tokenizer of this name. `texts`: an iterable of strings, read only to train `bpe<size>`."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}  # ids equal UTF-8 bytes
        return tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={ENDOFTEXT: 256}, explicit_n_vocab=257
        )
    if match := re.fullmatch(r"bpe(\d+)", name):
        return train_bpe(name, texts, int(match[1]))
    return tiktoken_by_name(name, mirror)


# ----------------------------------------------------------------------------------------------------------------------
# Byte-pair encoding


def train_bpe(name, texts, vocab_size):
    """A BPE of vocab_size tokens (256 bytes, merges, <|endoftext|>), with GPT-2's split pattern.

    Deterministic: the most frequent pair is merged first, of equally frequent ones the pair of the older tokens.
    """
    if not 257 <= vocab_size <= 2**20:
        raise DataError(f"tokenizer {name!r}: the size must be from 257 (bytes and {ENDOFTEXT}) to {2**20}")
    words = Counter()
    for text in texts:
        words.update(regex.findall(r50k_pat_str, text))
    ranks = merge_pairs([(list(w.encode("utf-8", "replace")), c) for w, c in words.items()], vocab_size - 1)
    if len(ranks) < vocab_size - 1:
        print(
            f"tokenizer: the text holds only {len(ranks) - 256} pairs to merge, "
            f"so {name} has {len(ranks) + 1} tokens, not {vocab_size}"
        )
    return tiktoken.Encoding(
        name,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={ENDOFTEXT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )


def merge_pairs(words, n_tokens):
    """Token bytes -> rank, for up to n_tokens tokens: the 256 bytes, then merges in the order they were made.

    words: list of (list of token ids, count); the list is used up. Only words that hold the merged pair are touched,
    and the heap is lazy: an entry whose count has changed since it was pushed is pushed again when met.
    """
    vocab = [bytes([i]) for i in range(256)]
    ranks = {token: i for i, token in enumerate(vocab)}
    counts, where = Counter(), defaultdict(set)
    for i, (ids, count) in enumerate(words):
        for pair in zip(ids, ids[1:], strict=False):
            counts[pair] += count
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    bar = tqdm(total=n_tokens - 256, desc="training BPE", unit="merge", leave=False, disable=None)
    while len(ranks) < n_tokens and heap:
        negative, pair = heapq.heappop(heap)
        if -negative != counts[pair]:
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        token = vocab[pair[0]] + vocab[pair[1]]
        if token not in ranks:  # the same bytes may be made twice, as ab+c and as a+bc; they are one token
            ranks[token] = len(vocab)
            vocab.append(token)
            bar.update()
        for p in apply_merge(words, pair, ranks[token], counts, where):
            heapq.heappush(heap, (-counts[p], p))
    bar.close()
    return ranks


def apply_merge(words, pair, new, counts, where):
    """Replace pair by new in all words, keeping counts and where up to date; returns the pairs that came about."""
    created = set()
    for i in where.pop(pair):
        ids, count = words[i]
        merged = merge(ids, pair, new)
        for p in zip(ids, ids[1:], strict=False):
            counts[p] -= count
        for p in zip(merged, merged[1:], strict=False):
            counts[p] += count
            where[p].add(i)
            created.add(p)
        words[i] = (merged, count)
    return {p for p in created if counts[p] > 0}


def merge(ids, pair, new):
    """ids with every occurrence of pair, from the left, replaced by new."""
    out, i = [], 0
    while i < len(ids):
        hit = i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair
        out.append(new if hit else ids[i])
        i += 2 if hit else 1
    return out


# ----------------------------------------------------------------------------------------------------------------------
# tiktoken's own


def tiktoken_by_name(name, mirror=""):
    """tiktoken's encoding of this name. Raises DataError: unknown, or ranks not to be had (which, and where to)."""
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise DataError(f"unknown tokenizer {name!r}: wanted bytes, bpe<size> or one of {', '.join(sorted(known))}")
    with checked_downloads(mirror):
        # gpt2 has the ranks of r50k_base. tiktoken builds it from two files of another format; one file is enough.
        enc = tiktoken.get_encoding("r50k_base" if name == "gpt2" else name)
    if name == "gpt2":
        enc = tiktoken.Encoding(
            "gpt2",
            pat_str=enc._pat_str,
            mergeable_ranks=enc._mergeable_ranks,
            special_tokens=enc._special_tokens,
            explicit_n_vocab=50257,
        )
    if ENDOFTEXT not in enc.special_tokens_set:
        raise DataError(f"tokenizer {name!r} has no {ENDOFTEXT}, which separates documents; use another")
    return enc


@contextlib.contextmanager
def checked_downloads(mirror):
    """Within it tiktoken fetches its ranks by our downloader: with time-outs, retries and a helpful error.

    tiktoken's own fetch (tiktoken.load.read_file) waits for ever on a stalled connection. Its cache and its sha256
    check stay in force.
    """
    theirs = tiktoken.load.read_file

    def read_file(url):
        try:
            return read_url(url, mirror=mirror) if "://" in url else theirs(url)
        except DownloadError as e:
            raise DataError(where_to_put_ranks(url, e)) from e

    tiktoken.load.read_file = read_file
    try:
        yield
    except DataError:  # a ValueError too
        raise
    except ValueError as e:  # tiktoken's hash mismatch
        raise DataError(str(e)) from e
    finally:
        tiktoken.load.read_file = theirs


def where_to_put_ranks(url, error):
    """What to do when tiktoken's ranks at this URL cannot be downloaded."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = folder or os.path.join(tempfile.gettempdir(), "data-gym-cache")  # tiktoken's default
    name = hashlib.sha1(url.encode()).hexdigest()
    return (
        f"tiktoken's ranks cannot be downloaded ({error})\n"
        f"  wanted: {url}\n"
        f"  to do:  fetch that file on a machine with a network, put it at {os.path.join(folder, name)}\n"
        f"          (the name is the sha1 of the URL; another folder: set TIKTOKEN_CACHE_DIR), and run again;\n"
        f"          or use --tokenizer=bytes or --tokenizer=bpe<size>, which need no download"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Use


def encode(enc, text):
    """Token ids of a text as a uint32 array; special tokens spelt out in it are ordinary text. Releases the GIL."""
    try:
        return enc.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # lone surrogates, which JSON can spell: pairs are joined, the rest become U+FFFD
        return enc.encode_to_numpy(
            text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), disallowed_special=()
        )


def batches(documents, size=1 << 18):
    """Group (split, text) into lists of (split, piece of text, is its document's end) of size/2 characters or more."""
    batch, filled = [], 0
    for split, text in documents:
        start, stop = 0, 0
        while stop < len(text):
            stop = len(text)
            if stop - start > 2 * size:  # a very long document is cut at a line's end, so that all cores can share it
                stop = text.rfind("\n", start, start + size) + 1 or start + size
            batch.append((split, text[start:stop], stop == len(text)))
            filled, start = filled + stop - start, stop
            if filled >= size // 2:
                yield batch
                batch, filled = [], 0
    if batch:
        yield batch


def encode_batch(enc, batch):
    """List of (split, uint32 tokens), each document's end marked by <|endoftext|>."""
    end = np.array([enc.eot_token], dtype=np.uint32)
    return [(split, np.concatenate([encode(enc, text), end[:last]])) for split, text, last in batch]


def encode_documents(documents, enc, n_threads):
    """Yield (split, tokens) in the order of documents, which are (split, text), encoded by n_threads threads.

    Threads are enough, and they end with the program: tiktoken releases the GIL. Few batches are in flight, so memory
    stays small however long the stream is.
    """
    with ThreadPoolExecutor(n_threads) as pool:
        flying = deque()
        try:
            for batch in batches(documents):
                flying.append(pool.submit(encode_batch, enc, batch))
                if len(flying) > 4 * n_threads:
                    yield from flying.popleft().result()
            while flying:
                yield from flying.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def token_lengths(enc):
    """(n_vocab,) int64: how many bytes of text each token stands for; 0 for special tokens and unused ids."""
    lengths = np.zeros(enc.n_vocab, dtype=np.int64)
    for token, rank in enc._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


def save_tokenizer(enc, path):
    """Write a tokenizer so that load_tokenizer can read it."""
    ranks = sorted(enc._mergeable_ranks.items(), key=lambda item: item[1])
    spec = {
        "name": enc.name,
        "pat_str": enc._pat_str,
        "special_tokens": enc._special_tokens,
        "ranks": [[base64.b64encode(token).decode(), rank] for token, rank in ranks],
    }
    with owned.whole_file(path) as f:
        json.dump(spec, f)


def load_tokenizer(data_dir):
    """The tiktoken.Encoding a prepared corpus was made with. Raises DataError if it is missing or altered."""
    meta = read_meta(data_dir)
    if not {"tokenizer_file", "tokenizer_sha256"} <= meta.keys():
        raise DataError(f"{data_dir}: meta.json names no tokenizer; prepare the data again")
    path = os.path.join(data_dir, meta["tokenizer_file"])
    with open_data(path) as f:
        got = hashlib.file_digest(f, "sha256").hexdigest()
    if got != meta["tokenizer_sha256"]:
        raise DataError(f"{path}: altered: wanted sha256 {meta['tokenizer_sha256']}, got {got}; prepare the data again")
    return read_tokenizer(path)


TOKEN_ID = integer(0, 2**24)
TOKENIZER = {"name": string(1, 200), "pat_str": string(1, 20_000), "special_tokens": each(TOKEN_ID),
             "ranks": [(string(), TOKEN_ID)]}  # fmt: skip


def read_tokenizer(path):
    """A tokenizer written by save_tokenizer. Raises DataError for a file that is none."""
    try:
        spec = read_json(path, TOKENIZER)
        ranks = {base64.b64decode(token, validate=True): rank for token, rank in spec["ranks"]}
        check_tokens(ranks, spec)
        return tiktoken.Encoding(
            spec["name"], pat_str=spec["pat_str"], special_tokens=spec["special_tokens"], mergeable_ranks=ranks
        )
    except RecordError as e:
        raise DataError(f"{e}; prepare the data again") from None
    except ValueError as e:  # no base64, no regular expression
        raise DataError(f"{path}: cannot be a tokenizer ({' '.join(str(e).split())}); prepare the data again") from None


def check_tokens(ranks, spec):
    """Raise ValueError for what tiktoken would take and stumble over later."""
    ids = [*ranks.values(), *spec["special_tokens"].values()]
    if len(ranks) != len(spec["ranks"]) or len(set(ids)) != len(ids):
        raise ValueError("ranks: a token or a number comes twice")
    if lacking := next((b for b in range(256) if bytes([b]) not in ranks), None):
        raise ValueError(f"ranks: byte {lacking} has no token, so not every text could be encoded")
    if ENDOFTEXT not in spec["special_tokens"]:
        raise ValueError(f"special_tokens: no {ENDOFTEXT}")
    regex.compile(spec["pat_str"])


def open_encoding(s, settings, config):
    """The checkpoint's tokenizer. Ends the program if there is none, or another than the model was trained with.

    s: the program's own settings. settings: load_model()'s, in which newer checkpoints say the tokenizer's sha256."""
    folder, trained_on = s["data_dir"] or settings.get("data_dir"), settings.get("data_dir")
    if not isinstance(folder, str):
        fail("the checkpoint does not say which corpus it was trained on: name it, by --data_dir=")
    wanted = settings.get("tokenizer_sha256")
    try:
        encoding = load_tokenizer(folder)
        if not wanted and s["data_dir"] and isinstance(trained_on, str) and os.path.isdir(trained_on):
            wanted = read_meta(trained_on).get("tokenizer_sha256")
        if wanted and read_meta(folder)["tokenizer_sha256"] != wanted:
            fail(f"{folder}: its tokenizer is not the one that the checkpoint was trained with, from {trained_on}")
    except DataError as e:
        fail(f"{e}; --data_dir= names another corpus made with the checkpoint's tokenizer")
    if encoding.n_vocab > config.vocab_size:
        fail(f"{folder}: its tokenizer has {encoding.n_vocab} tokens, the model {config.vocab_size}: not the model's")
    return encoding
