"""Tokenizers: bytes, a BPE trained on the spot, and tiktoken's; all of them are tiktoken.Encoding in the end.

    make_tokenizer("bytes", ...)        256 bytes and <|endoftext|>; needs nothing
    make_tokenizer("bpe2048", texts)    trained on `texts`, 2048 tokens in all, <|endoftext|> the last of them
    make_tokenizer("gpt2", ...)         tiktoken's by name: gpt2, cl100k_base, o200k_base, r50k_base, p50k_base ...

A corpus carries its tokenizer (tokenizer.json: split pattern, ranks, special tokens), whichever it is, so that reading
one never downloads anything: load_tokenizer(data_dir).
"""

import base64
import heapq
import json
import os
import re
from collections import Counter, defaultdict

import numpy as np
import regex
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str
from tqdm import tqdm

from data import DataError, read_meta, sha256_file

ENDOFTEXT = "<|endoftext|>"


def make_tokenizer(name, texts=(), mirror=""):
    """The tokenizer of this name. `texts`: an iterable of strings, read only to train `bpe<size>`."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}  # ids equal UTF-8 bytes
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                 special_tokens={ENDOFTEXT: 256}, explicit_n_vocab=257)
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
        print(f"tokenizer: the text holds only {len(ranks) - 256} pairs to merge, "
              f"so {name} has {len(ranks) + 1} tokens, not {vocab_size}")
    return tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={ENDOFTEXT: len(ranks)}, explicit_n_vocab=len(ranks) + 1)


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
    """tiktoken's encoding of this name. Raises DataError: unknown, or its ranks cannot be had (which, where to)."""
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise DataError(f"unknown tokenizer {name!r}: wanted bytes, bpe<size> or one of {', '.join(sorted(known))}")
    # gpt2 has the ranks of r50k_base. tiktoken builds it from two files of another format; one file is enough.
    enc = tiktoken.get_encoding("r50k_base" if name == "gpt2" else name)
    if name == "gpt2":
        enc = tiktoken.Encoding("gpt2", pat_str=enc._pat_str, mergeable_ranks=enc._mergeable_ranks,
                                special_tokens=enc._special_tokens, explicit_n_vocab=50257)
    if ENDOFTEXT not in enc.special_tokens_set:
        raise DataError(f"tokenizer {name!r} has no {ENDOFTEXT}, which separates documents; use another")
    return enc


# ----------------------------------------------------------------------------------------------------------------------
# Use


def encode(enc, text):
    """Token ids of a text as a uint32 array; special tokens spelt out in it are ordinary text. Releases the GIL."""
    try:
        return enc.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # lone surrogates, which JSON can spell: pairs are joined, the rest become U+FFFD
        return enc.encode_to_numpy(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
                                   disallowed_special=())


def token_lengths(enc):
    """(n_vocab,) int64: how many bytes of text each token stands for; 0 for special tokens and unused ids."""
    lengths = np.zeros(enc.n_vocab, dtype=np.int64)
    for token, rank in enc._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


def save_tokenizer(enc, path):
    """Write a tokenizer so that load_tokenizer can read it."""
    ranks = sorted(enc._mergeable_ranks.items(), key=lambda item: item[1])
    spec = {"name": enc.name, "pat_str": enc._pat_str, "special_tokens": enc._special_tokens,
            "ranks": [[base64.b64encode(token).decode(), rank] for token, rank in ranks]}
    with open(path, "w", encoding="utf-8") as f:
        json.dump(spec, f)
        f.flush()
        os.fsync(f.fileno())


def load_tokenizer(data_dir):
    """The tiktoken.Encoding a prepared corpus was made with. Raises DataError if it is missing or altered."""
    meta = read_meta(data_dir)
    path = os.path.join(data_dir, meta["tokenizer_file"])
    if not os.path.exists(path):
        raise DataError(f"{path}: meta.json names this tokenizer, but it is not there; prepare the data again")
    if (got := sha256_file(path)) != meta["tokenizer_sha256"]:
        raise DataError(f"{path}: altered: wanted sha256 {meta['tokenizer_sha256']}, got {got}; prepare the data again")
    with open(path, encoding="utf-8") as f:
        spec = json.load(f)
    return tiktoken.Encoding(spec["name"], pat_str=spec["pat_str"], special_tokens=spec["special_tokens"],
                             mergeable_ranks={base64.b64decode(token): rank for token, rank in spec["ranks"]})
