"""Make a corpus: fetch text, tokenise it, write shards and meta.json that train.py and eval.py read (see data.py).

    python prepare_data.py                                                  # Python's own library, no network
    python prepare_data.py --dataset=shakespeare --tokenizer=bytes
    python prepare_data.py --dataset=c4 --tokenizer=cl100k_base --tokens=1e9
    python prepare_data.py --dataset=path/to/folder --tokenizer=gpt2        # .txt, .jsonl, each also .gz

The corpus appears at data/<dataset>_<tokenizer>/ when it is whole and not before: it is written beside it and renamed.
Running the same command again finds it complete. Documents are whole in either train or val, and each is ended by
<|endoftext|>. Which documents are val depends on their content alone, so it changes with neither order nor machine.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
import sysconfig
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from configurator import above, between, configure
from data import DataError, sha256_file, shard_header, token_dtype
from tokenizer import encode, load_tokenizer, make_tokenizer, save_tokenizer, token_lengths  # noqa: F401  (for sample.py, eval.py)

# ----------------------------------------------------------------------------------------------------------------------
# Settings

dataset = "python"  # python | shakespeare | c4 | fineweb10b | eval | a file or folder of .txt/.jsonl[.gz]
tokenizer = "bpe2048"  # bytes | bpe<size> | gpt2 | cl100k_base | another of tiktoken's
tokens = -1  # stop after this many training tokens; -1: all there is (c4 wants a number)
val_tokens = 10_000_000  # stop after this many validation tokens; -1: no limit
val_fraction = -1.0  # share of the text kept for validation; -1: 0.02 (shakespeare: 0.1, as is customary)
data_root = "data"  # corpora and downloads live here
data_dir = ""  # the corpus; "": <data_root>/<dataset>_<tokenizer>
overwrite = False  # replace a corpus that was made with other settings
bpe_train_mb = 16.0  # MB of training text that bpe<size> is trained on
shard_tokens = 100_000_000  # tokens a shard
workers = -1  # threads that tokenise; -1: one for each core
text_key = "text"  # the field of a .jsonl row that holds the document

RULES = {
    "tokens": (lambda v: v == -1 or v > 0, "a number above 0, or -1 for all"),
    "val_tokens": (lambda v: v == -1 or v > 0, "a number above 0, or -1 for no limit"),
    "val_fraction": (lambda v: v == -1 or 0 < v < 1, "a fraction between 0 and 1, or -1 for the default"),
    "bpe_train_mb": above(0),
    "shard_tokens": between(1, 2**31 - 1),
    "workers": (lambda v: v == -1 or v > 0, "a number above 0, or -1 for all cores"),
}

# ----------------------------------------------------------------------------------------------------------------------
# Documents


def python_documents():
    """Python's own standard library, one document a file, and the language's help topics, in the order of their hashes.

    Left out: tests, installed packages, the codecs' tables. In the order of hashes, --tokens= takes a fair sample.
    """
    root = sysconfig.get_paths()["stdlib"]
    skip = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    documents = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skip]
        for name in files:
            if name.endswith(".py"):
                with open(os.path.join(folder, name), "rb") as f:
                    documents.append(f.read().decode("utf-8", "replace"))
    if not documents:
        raise DataError(f"{root}: no .py files of the standard library here; use --dataset=<a folder of text>")
    from pydoc_data.topics import topics

    return sorted(documents + list(topics.values()), key=content_hash)


def content_hash(text):
    """A document's number in [0, 2^64), by its content alone; equal documents go to the same split."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def split_documents(documents, fraction):
    """Yield (split, text) for each text, about `fraction` of the bytes being val.

    A large corpus is split by its documents' hashes as it streams. One under 64 M characters is looked at whole, so
    that the share is met although documents are few: val are the documents of the lowest hashes that fit into it.
    """
    documents, head, size = iter(documents), [], 0
    while size < 64e6 and (text := next(documents, None)) is not None:
        head.append(text)
        size += len(text)
    small = size < 64e6
    val = pick_val(head, fraction * size) if small else None
    for text in itertools.chain(head, documents):
        number = content_hash(text)
        yield ("val" if (number in val if small else number < fraction * 2**64) else "train"), text


def pick_val(documents, budget):
    """Hashes of the documents that are val: by rising hash, those that still fit into `budget` characters, or one."""
    by_hash = {}
    for text in documents:
        number = content_hash(text)
        by_hash[number] = by_hash.get(number, 0) + len(text)
    val = set()
    for number in sorted(by_hash):
        if by_hash[number] <= budget:
            val.add(number)
            budget -= by_hash[number]
    return val or {min(by_hash, default=None, key=lambda number: (by_hash[number], number))}


def cut_in_two(text, fraction):
    """One long text as two documents, (train, val), cut at the paragraph nearest before the last `fraction` of it."""
    at = int(len(text) * (1 - fraction))
    at = text.rfind("\n\n", 0, at) + 2 if "\n\n" in text[:at] else at
    return text[:at], text[at:]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenising on all cores


def batches(documents, size=1 << 18):
    """Group (split, text) into lists of (split, piece of text, is its document's end) of about `size` characters."""
    batch, filled = [], 0
    for split, text in documents:
        while text:
            at = len(text)
            if at > 2 * size:  # a very long document is cut at a line's end, so that all cores can share it
                at = text.rfind("\n", 0, size) + 1 or size
            batch.append((split, text[:at], at == len(text)))
            filled, text = filled + at, text[at:]
            if filled >= size:
                yield batch
                batch, filled = [], 0
    if batch:
        yield batch


def encode_batch(enc, batch):
    """List of (split, uint32 tokens), each document's end marked by <|endoftext|>."""
    end = np.array([enc.eot_token], dtype=np.uint32)
    return [(split, np.concatenate([encode(enc, text), end[:last]])) for split, text, last in batch]


def encoded(documents, enc, n_threads):
    """Yield (split, tokens) in the documents' order, encoded by n_threads threads.

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


# ----------------------------------------------------------------------------------------------------------------------
# Writing shards


class SplitWriter:
    """Writes one split's tokens as shards <split>_000000.bin ... of at most shard_tokens, and counts them."""

    def __init__(self, folder, split, enc, limit, shard_tokens):
        self.folder, self.split, self.limit, self.shard_tokens = folder, split, limit, shard_tokens
        self.dtype, self.eot, self.lengths = token_dtype(enc.n_vocab), enc.eot_token, token_lengths(enc)
        self.files, self.tokens, self.bytes, self.documents = [], 0, 0, 0
        self.file = None

    @property
    def full(self):
        return self.limit != -1 and self.tokens >= self.limit

    def write(self, tokens):
        """Append tokens, up to the limit; returns the number of bytes of text they stand for."""
        if self.limit != -1:
            tokens = tokens[:self.limit - self.tokens]
        n_bytes = int(self.lengths[tokens].sum())
        self.tokens, self.bytes = self.tokens + len(tokens), self.bytes + n_bytes
        self.documents += int((tokens == self.eot).sum())
        while len(tokens):
            if self.file is None:
                self.open_shard()
            room = self.shard_tokens - self.in_shard
            self.file.write(tokens[:room].astype(self.dtype).tobytes())
            self.in_shard += min(room, len(tokens))
            tokens = tokens[room:]
            if self.in_shard == self.shard_tokens:
                self.close_shard()
        return n_bytes

    def open_shard(self):
        self.name, self.in_shard = f"{self.split}_{len(self.files):06d}.bin", 0
        self.file = open(os.path.join(self.folder, self.name), "wb")
        self.file.write(shard_header(0, self.dtype).tobytes())  # the count follows when it is known

    def close_shard(self):
        """Put the count into the header, bring the shard to the disk, and note its sha256."""
        if self.file is None:
            return
        with self.file as f:
            f.seek(0)
            f.write(shard_header(self.in_shard, self.dtype).tobytes())
            f.flush()
            os.fsync(f.fileno())
        self.file = None
        path = os.path.join(self.folder, self.name)
        self.files.append({"name": self.name, "tokens": self.in_shard, "sha256": sha256_file(path)})

    def info(self):
        """The split's entry in meta.json."""
        return {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents,
                "bytes_per_token": self.bytes / max(self.tokens, 1), "files": self.files}


def write_json(path, value):
    """Write JSON under a temporary name, bring it to the disk, rename it."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def sync_folder(path):
    """Bring renames within a folder to the disk."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(fd)
        os.close(fd)


# ----------------------------------------------------------------------------------------------------------------------
# The whole


def write_corpus(folder, s, documents, sample, sources):
    """Write a corpus into `folder`: documents() yields (split, text); sample() yields text to train a BPE on."""
    enc = make_tokenizer(s["tokenizer"], sample())
    save_tokenizer(enc, os.path.join(folder, "tokenizer.json"))
    limits = {"train": s["tokens"], "val": s["val_tokens"]}
    writers = {k: SplitWriter(folder, k, enc, limit, s["shard_tokens"]) for k, limit in limits.items()}
    n_threads = os.cpu_count() if s["workers"] == -1 else s["workers"]
    start, total = time.time(), None if s["tokens"] == -1 else s["tokens"]
    with tqdm(total=total, desc="tokenising", unit="token", unit_scale=True, disable=None) as bar:
        for split, ids in encoded(documents(), enc, n_threads):
            writers[split].write(ids)
            if split == "train":
                bar.update(len(ids))
            if writers["train"].full:
                break
    for w in writers.values():
        w.close_shard()
    n_bytes, seconds = sum(w.bytes for w in writers.values()), time.time() - start
    print(f"tokenised {n_bytes / 1e6:.1f} MB of text in {seconds:.1f} s: {n_bytes / 1e6 / seconds:.1f} MB/s "
          f"on {n_threads} threads")
    return enc, {k: w.info() for k, w in writers.items()}


def prepare(s):
    """Make the corpus that the settings s (a dict) describe; returns its folder."""
    fraction = 0.02 if s["val_fraction"] == -1 else s["val_fraction"]
    final = s["data_dir"] or os.path.join(s["data_root"], f"{s['dataset']}_{s['tokenizer']}")
    if s["dataset"] != "python":
        raise DataError(f"unknown dataset {s['dataset']!r}: wanted python")
    if os.path.exists(os.path.join(final, "meta.json")):
        print(f"{final}: complete already, nothing to do")
        return final
    folder = final.rstrip("/") + ".tmp"
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    texts = list(split_documents(python_documents(), fraction))
    enc, splits = write_corpus(folder, s, lambda: texts, lambda: (t for split, t in texts if split == "train"), [])
    write_json(os.path.join(folder, "meta.json"), {
        "format": 1, "dataset": s["dataset"], "tokenizer": s["tokenizer"], "vocab_size": enc.n_vocab,
        "eot": enc.eot_token, "dtype": token_dtype(enc.n_vocab).name, "tokenizer_file": "tokenizer.json",
        "tokenizer_sha256": sha256_file(os.path.join(folder, "tokenizer.json")),
        "bytes_per_token": {k: v["bytes_per_token"] for k, v in splits.items()}, "splits": splits,
        "sources": [{"name": f"Python {sys.version.split()[0]} standard library and help topics"}]})
    sync_folder(folder)
    os.rename(folder, final)
    for k, v in splits.items():
        print(f"{final}: {k}: {v['tokens']:,} tokens, {v['documents']:,} documents, "
              f"{v['bytes_per_token']:.3f} bytes a token")
    return final


if __name__ == "__main__":
    try:
        prepare(configure(globals(), RULES))
    except DataError as e:
        sys.exit(f"error: {e}")
