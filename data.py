"""Reading a prepared corpus, and the order in which training sees its sequences.

    corpus = Corpus("data/python_bpe2048", "train", seq_len=256)
    ids = order(seed, step * batch_size, batch_size, corpus.n_sequences)   # the sequences of one step
    x, y = corpus.sequences(ids)                                           # (batch_size, seq_len) int64 each

A corpus is a folder made by prepare_data.py: meta.json beside shards train_000000.bin ... val_000000.bin ...

Layout of a shard: 256 int32 (magic, version, number of tokens, zeros), then the tokens, little-endian:
    magic 20240520, version 1: uint16 tokens  (vocabularies up to 65536; the format of the public GPT-2 shards)
    magic 20240801, version 7: uint32 tokens
Documents follow one another, each ended by <|endoftext|>. A split is the concatenation of its shards; sequence i reads
tokens [i*seq_len, (i+1)*seq_len] of it, the last one being the target of the last input only, so that sequences share
no target and leave out none but the tail. Sequences may begin inside a document and run across documents and shards.

What is checked of the tokens: when a corpus is opened, the size, the header, and the sha256 of the first and last
megabyte of every shard against meta.json's; check_in_background() then reads all of them; and a shard that was written
to, replaced or cut since it was opened is noticed when it is read next.

Nothing here keeps a state: `order` computes the sequences at any place of the endless shuffled stream from the seed and
the place alone. A run that resumes needs only its step number, and every process can compute the whole batch and take
its own rows of it, so the order does not depend on the number of processes.
"""

import hashlib
import os
import threading
import time

import numpy as np

import records
from records import Missing, RecordError, each, file_name, integer, open_file, read_json, sha256, string

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic -> version, dtype


MEGABYTE = 1 << 20
HASHED_A_SECOND = 200e6  # bytes at most, in the background

FILE = {"name": file_name, "tokens": integer(0, 2**32 - 1), "sha256": sha256, "ends_sha256?": sha256}
SPLIT = {"tokens": integer(0), "bytes_per_token": records.number(0, 1e6), "files": [FILE]}
META = {
    "format?": records.one_of(1), "vocab_size": integer(1, 2**32), "eot": integer(0, 2**32), "splits": each(SPLIT),
    "tokenizer_file?": file_name, "tokenizer_sha256?": sha256, "tokenizer?": string(), "dataset?": records.anything,
    "settings?": each(records.anything),
}  # fmt: skip


class DataError(ValueError):
    """A corpus that is missing, damaged or unfit; the message says what was wanted, what was got and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Shards


def token_dtype(vocab_size):
    """The dtype a vocabulary of this size is stored in."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def shard_header(n_tokens, dtype):
    """(256,) int32 header of a shard of n_tokens of this dtype."""
    magic, version = next((m, v) for m, (v, d) in FORMATS.items() if d == dtype)
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[0], header[1] = magic, version
    header[2:3].view("<u4")[0] = n_tokens
    return header


def read_header(path):
    """Number of tokens and dtype of a shard. Raises DataError unless magic, version and the file's size agree."""
    with open_data(path) as f:
        size, head = os.fstat(f.fileno()).st_size, f.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise DataError(f"{path}: truncated: wanted a header of {HEADER_BYTES} bytes, got {size}; prepare it again")
    header = np.frombuffer(head, dtype="<i4")
    magic, version, n_tokens = int(header[0]), int(header[1]), int(header[2:3].view("<u4")[0])
    if magic not in FORMATS or FORMATS[magic][0] != version:
        wanted = " or ".join(f"{m} version {v} ({d.name})" for m, (v, d) in FORMATS.items())
        raise DataError(f"{path}: not a token shard: wanted magic {wanted}, got {magic} version {version}")
    dtype = FORMATS[magic][1]
    wanted = HEADER_BYTES + n_tokens * dtype.itemsize
    if size != wanted:
        raise DataError(
            f"{path}: {'truncated' if size < wanted else 'too long'}: its header says {n_tokens} tokens, "
            f"so wanted {wanted} bytes, got {size}; remove the folder and prepare the data again"
        )
    return n_tokens, dtype


def open_data(path):
    """A file of a corpus, open for reading. Raises DataError."""
    try:
        return open_file(path)
    except Missing:
        raise DataError(f"{path}: meta.json names this file, but it is not there; prepare the data again") from None
    except RecordError as e:
        raise DataError(str(e)) from None


def sha256_file(path):
    """Hexadecimal sha256 of a file. Raises OSError."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def ends_sha256(path):
    """Hexadecimal sha256 of a file's first and last megabyte, one behind the other."""
    with open_data(path) as f:
        ends = f.read(MEGABYTE)
        f.seek(max(0, os.fstat(f.fileno()).st_size - MEGABYTE))
        return hashlib.sha256(ends + f.read(MEGABYTE)).hexdigest()


class Shard:
    """The tokens of one shard, read when they are asked for: shard[start:stop].

    Not a memory map: if the file were cut behind its back, a read would end the program by SIGBUS, without a word."""

    def __init__(self, path, n_tokens, dtype):
        self.path, self.n_tokens, self.dtype = path, n_tokens, dtype
        with open_data(path) as f:
            self.stamp = self.stamp_of(f)

    def __len__(self):
        return self.n_tokens

    @staticmethod
    def stamp_of(f):
        found = os.fstat(f.fileno())
        return found.st_size, found.st_mtime_ns

    def __getitem__(self, tokens):
        start, stop, _ = tokens.indices(self.n_tokens)
        wanted = (stop - start) * self.dtype.itemsize
        with open_data(self.path) as f:
            try:
                f.seek(HEADER_BYTES + start * self.dtype.itemsize)
                found = f.read(wanted)
            except OSError as e:
                raise DataError(f"{self.path}: cannot be read ({e.strerror})") from None
            if self.stamp_of(f) != self.stamp or len(found) != wanted:
                raise DataError(f"{self.path}: was altered or cut since this program began; prepare the data again")
        return np.frombuffer(found, self.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# A corpus


class Corpus:
    """One split of a prepared corpus, as sequences of seq_len tokens and their targets.

    .meta            meta.json as a dict
    .vocab_size      of the tokenizer (a model's may be padded to more)
    .eot             the id of <|endoftext|>
    .n_tokens, .n_sequences
    .bytes_per_token UTF-8 bytes of text per token, the separators counted among the tokens (they stand for no bytes):
                     bits per byte = loss in nats / ln 2 / bytes_per_token
    .fingerprint     sha256 over the split's own sha256s: what a checkpoint keeps to know its data again
    .tokenizer_sha256  of the tokenizer it was made with, or None
    Raises DataError for a folder without a complete corpus, a damaged shard, or a split of less than one sequence.
    """

    def __init__(self, data_dir, split, seq_len):
        self.data_dir, self.split, self.seq_len = data_dir, split, seq_len
        self.meta = read_meta(data_dir)
        if split not in self.meta["splits"]:
            raise DataError(f"{data_dir}: no split {split!r}; it has {', '.join(self.meta['splits'])}")
        if seq_len < 1:
            raise DataError(f"seq_len must be at least 1, got {seq_len}")
        info = self.meta["splits"][split]
        self.vocab_size, self.eot, self.files = self.meta["vocab_size"], self.meta["eot"], info["files"]
        self.bytes_per_token, self.tokenizer_sha256 = info["bytes_per_token"], self.meta.get("tokenizer_sha256")
        self.altered, self.bytes_checked, self.bytes = None, 0, 0  # of check_in_background
        self.shards = [self._open(f) for f in self.files]
        self.ends = np.cumsum([0] + [len(s) for s in self.shards])  # shard k holds tokens ends[k] .. ends[k+1]
        self.n_tokens = int(self.ends[-1])
        self.n_sequences = (self.n_tokens - 1) // seq_len  # the last target needs one token more
        if self.n_sequences < 1:
            raise DataError(
                f"{data_dir}: split {split!r} has {self.n_tokens} tokens, but one sequence of "
                f"seq_len={seq_len} needs {seq_len + 1}; prepare more text (or a larger --val_fraction), "
                "or use a smaller seq_len"
            )
        self.fingerprint = hashlib.sha256("".join(f["sha256"] for f in self.files).encode()).hexdigest()

    def _open(self, file):
        path = os.path.join(self.data_dir, file["name"])
        n_tokens, dtype = read_header(path)
        if n_tokens != file["tokens"] or dtype != token_dtype(self.vocab_size):
            raise DataError(
                f"{path}: meta.json says {file['tokens']} tokens of {token_dtype(self.vocab_size).name}, "
                f"its header {n_tokens} of {dtype.name}; prepare the data again"
            )
        shard = Shard(path, n_tokens, dtype)
        if "ends_sha256" in file and ends_sha256(path) != file["ends_sha256"]:
            raise DataError(
                f"{path}: altered since it was written (its first or last megabyte); prepare the data again"
            )
        return shard

    def tokens(self, start, stop):
        """Tokens start..stop of the split as an int64 array, across shards."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start}..{stop} of a split of {self.n_tokens}")
        out, first = np.empty(stop - start, dtype=np.int64), int(np.searchsorted(self.ends, start, side="right")) - 1
        done = 0
        for k in range(first, len(self.shards)):
            if done == len(out):
                break
            piece = self.shards[k][start + done - self.ends[k] : stop - self.ends[k]]
            out[done : done + len(piece)] = piece
            done += len(piece)
        return out

    def sequences(self, ids):
        """Inputs and targets of these sequences: two int64 torch tensors (len(ids), seq_len)."""
        import torch  # here, because prepare_data.py uses this file's format and does not need torch

        if self.altered:
            raise self.altered
        T = self.seq_len
        rows = np.empty((len(ids), T + 1), dtype=np.int64)
        for row, i in zip(rows, ids, strict=True):
            if not 0 <= i < self.n_sequences:
                raise IndexError(f"{self.data_dir}: sequence {i} of {self.n_sequences} in split {self.split!r}")
            row[:] = self.tokens(int(i) * T, int(i) * T + T + 1)
        if rows.size and rows.max() >= self.vocab_size:  # an embedding lookup out of range gives a far worse message
            raise DataError(
                f"{self.data_dir}: split {self.split!r} holds token {rows.max()}, but its vocabulary has "
                f"{self.vocab_size}; a shard was altered: prepare the data again"
            )
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # (k, T) each

    def verify(self):
        """Read every shard and compare its sha256 with meta.json's. Raises DataError naming the altered shard."""
        for file, shard in zip(self.files, self.shards, strict=True):
            self.verify_shard(file, shard)

    def verify_shard(self, file, shard, pause=lambda n_bytes: None):
        """pause(n): called after each n bytes."""
        digest = hashlib.sha256()
        with open_data(shard.path) as f:
            try:
                while chunk := f.read(8 * MEGABYTE):
                    digest.update(chunk)
                    pause(len(chunk))
            except OSError as e:
                raise DataError(f"{shard.path}: cannot be read ({e.strerror})") from None
        if (got := digest.hexdigest()) != file["sha256"]:
            raise DataError(
                f"{shard.path}: altered since it was written: wanted sha256 {file['sha256']}, got {got}; "
                "prepare the data again"
            )

    def check_in_background(self):
        """verify() in a thread, at HASHED_A_SECOND at most; the next call of sequences() raises what it finds."""

        def pause(n_bytes):
            self.bytes_checked += n_bytes
            time.sleep(n_bytes / HASHED_A_SECOND)

        def work():
            try:
                for file, shard in zip(self.files, self.shards, strict=True):
                    self.verify_shard(file, shard, pause)
            except DataError as e:
                self.altered = e

        self.bytes = sum(shard.stamp[0] for shard in self.shards)
        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()


def read_meta(data_dir):
    """meta.json of a prepared corpus. Raises DataError with the command to run if there is none."""
    path = os.path.join(data_dir, "meta.json")
    try:
        return read_json(path, META)
    except Missing:
        raise DataError(
            f"{data_dir}: no prepared corpus here (no meta.json); make one with "
            f"`python prepare_data.py --data_dir={data_dir} --dataset=... --tokenizer=...`"
        ) from None
    except RecordError as e:
        raise DataError(f"{e}; prepare the data again") from None


# ----------------------------------------------------------------------------------------------------------------------
# Order

U64 = np.uint64
ROUNDS = 8  # of the Feistel network; 4 are enough to look random on large n, small n wants more


def mix(z):
    """splitmix64's finaliser: uint64 -> uint64, every input bit moves every output bit. Multiplies modulo 2^64."""
    z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
    return z ^ (z >> U64(31))


def feistel(v, keys, bits):
    """A keyed bijection of [0, 2^bits): v (N,) uint64, keys (ROUNDS, N) uint64 -> (N,) uint64.

    The value is cut into a left part of ceil(bits/2) and a right part of floor(bits/2) bits; each round xors to one
    part a keyed hash of the other, which can be undone whatever the hash is, so the whole is a permutation.
    """
    b = U64(bits // 2)
    left, right = v >> b, v & ((U64(1) << b) - U64(1))
    mask_left, mask_right = (U64(1) << U64(bits - bits // 2)) - U64(1), (U64(1) << b) - U64(1)
    for r, key in enumerate(keys):
        if r % 2 == 0:
            left = left ^ (mix(right ^ key) & mask_left)
        else:
            right = right ^ (mix(left ^ key) & mask_right)
    return (left << b) | right


def permute(index, epoch, seed, n):
    """Entry `index` of epoch `epoch`'s permutation of range(n): index, epoch (N,) uint64 -> (N,) uint64."""
    bits = (n - 1).bit_length()
    golden = U64(0x9E3779B97F4A7C15)
    stream = mix(mix(np.array(seed % 2**64, dtype=U64) + golden) + epoch * golden)  # (N,) one per epoch
    keys = np.stack([mix(stream + U64(r + 1) * golden) for r in range(ROUNDS)])  # (ROUNDS, N)
    v = feistel(index, keys, bits)
    while (outside := v >= U64(n)).any():  # cycle walking: 2^bits < 2n, so each value needs under 2 applications or so
        v[outside] = feistel(v[outside], keys[:, outside], bits)
    return v


def order(seed, start, count, n_sequences):
    """Ids of sequences number start .. start+count of the endless shuffled stream: (count,) int64.

    Every epoch (n_sequences in a row) is a permutation of all sequences, another one for each epoch and each seed.
    Any slice is computed from its place alone: order(seed, 0, 100, n)[40:60] equals order(seed, 40, 20, n).
    """
    if n_sequences < 1 or start < 0 or count < 0:
        raise ValueError(
            "order needs n_sequences >= 1, start >= 0 and count >= 0, "
            f"got n_sequences={n_sequences}, start={start}, count={count}"
        )
    place = np.arange(start, start + count, dtype=U64)
    with np.errstate(over="ignore"):  # uint64 arithmetic modulo 2^64 is meant
        return permute(place % U64(n_sequences), place // U64(n_sequences), seed, n_sequences).astype(np.int64)
