"""Where the text comes from: each dataset is a list of parts, and a part yields documents or tokens.

    parts(settings) -> list of parts, read one after the other. A part has
        .name              how meta.json and the journal call it
        .splits            the splits it feeds; it is read until train, or else all of them, have their tokens
        .encoded(enc, n_threads)   yields (split, uint32 tokens)
        .documents()       yields (split, text); not for text that comes tokenised
        .record()          what meta.json says of it, after it was read: a list of {name, bytes, sha256, ...}

python       Python's own standard library and help topics; no network; varies a little with the Python version
shakespeare  tinyshakespeare, 1.1 MB, one long document
c4           C4's English part (ODC-BY): 1024 shards of gzipped JSON lines of about 318 MB, read as a stream
fineweb10b   FineWeb, 10 B tokens, tokenised with gpt2 by others: 103 shards of 100 M tokens
a path       a .txt or .jsonl file, either also .gz, or a folder of them; <|endoftext|> in a .txt separates documents
"""

import gzip
import hashlib
import itertools
import json
import os
import sys
import sysconfig
import zlib
from functools import partial

import numpy as np

from data import FORMATS, HEADER_BYTES, DataError, sha256_file
from download import Changed, DownloadError, Stream, download, mirrored
from tokenizer import ENDOFTEXT, encode_documents

NAMES = ("python", "shakespeare", "c4", "fineweb10b", "eval")
HUB = "https://huggingface.co/datasets"
C4 = HUB + "/allenai/c4/resolve/main/en/c4-{split}.{i:05d}-of-{n:05d}.json.gz"
FINEWEB = HUB + "/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{split}_{i:06d}.bin"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
LINE_BYTES = 1 << 28  # of a row of JSON lines, at most
SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


def parts(s):
    """The parts of the dataset that the settings s (a dict) name. Raises DataError for an unknown one."""
    name, mirror = s["dataset"], s["mirror"]
    if name in ("c4", "fineweb10b") and s["tokens"] == -1:
        raise DataError(f"{name} is large: say how much of it is wanted, as in --tokens=1e9")
    if name == "python":
        return [Texts(python_documents, s["val_fraction"], python_record)]
    if name == "shakespeare":
        fetch = partial(
            download,
            SHAKESPEARE,
            os.path.join(s["data_root"], "download", "tinyshakespeare.txt"),
            SHAKESPEARE_BYTES,
            SHAKESPEARE_SHA256,
            mirror,
        )
        return [Texts(lambda: shakespeare_documents(fetch), s["val_fraction"], lambda: [fetch()])]
    if name == "c4":
        return [C4Shard("val", C4.format(split="validation", i=i, n=8), mirror) for i in range(8)] + [
            C4Shard("train", C4.format(split="train", i=i, n=1024), mirror) for i in range(1024)
        ]
    if name == "fineweb10b":
        if s["tokenizer"] != "gpt2":
            raise DataError(f"fineweb10b comes tokenised with gpt2: wanted --tokenizer=gpt2, got {s['tokenizer']}")
        return [TokenShard("val", FINEWEB.format(split="val", i=0), mirror)] + [
            TokenShard("train", FINEWEB.format(split="train", i=i), mirror) for i in range(1, 104)
        ]
    if os.path.exists(name):
        files = text_files(name)
        return [Texts(lambda: file_documents(files, s["text_key"]), s["val_fraction"], lambda: file_records(files))]
    raise DataError(
        f"dataset {name!r}: wanted python, shakespeare, c4, fineweb10b, eval, or a file or folder that "
        f"exists, of {' '.join(SUFFIXES)}"
    )


class Texts:
    """A part made of texts on this machine, split into train and val by the documents' content."""

    name, splits = "texts", ("train", "val")

    def __init__(self, texts, fraction, record):
        self.texts, self.fraction, self.record = texts, fraction, record

    def documents(self):
        return split_documents(self.texts(), self.fraction)

    def encoded(self, enc, n_threads):
        return encode_documents(self.documents(), enc, n_threads)


# ----------------------------------------------------------------------------------------------------------------------
# Train or val


def content_hash(text):
    """A document's number in [0, 2^64), by its content alone; equal documents go to the same split."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def split_documents(texts, fraction, small=64e6):
    """Yield (split, text) for each text, about `fraction` of the text being val.

    A large corpus is split by its documents' hashes as it streams. One under `small` characters is looked at whole, so
    that the share is met although documents are few: val are the documents of the lowest hashes that fit into it.
    A single document is cut in two. What was looked at whole yields val first: reading stops when train has its tokens.
    """
    texts, head, size = iter(texts), [], 0
    while size < small and (text := next(texts, None)) is not None:
        head.append(text)
        size += len(text)
    if size < small and len(head) == 1:
        train, val = cut_in_two(head[0], fraction)
        yield from [("val", val), ("train", train)]
    elif size < small:
        chosen = pick_val(head, fraction * size)
        in_val = [content_hash(text) in chosen for text in head]
        for split, wanted in (("val", True), ("train", False)):
            yield from ((split, text) for text, is_val in zip(head, in_val, strict=True) if is_val == wanted)
    else:
        for text in itertools.chain(head, texts):
            yield ("val" if content_hash(text) < fraction * 2**64 else "train"), text


def pick_val(documents, budget):
    """Hashes of the documents that are val: by rising hash, those that still fit into `budget` characters, or one."""
    lengths = {}
    for text in documents:
        number = content_hash(text)
        lengths[number] = lengths.get(number, 0) + len(text)
    val = set()
    for number in sorted(lengths):
        if lengths[number] <= budget:
            val.add(number)
            budget -= lengths[number]
    return val or set(sorted(lengths)[:1])


def cut_in_two(text, fraction):
    """One long text as two documents, (train, val), cut at the last paragraph's end before the val share of it."""
    at = int(len(text) * (1 - fraction))
    paragraph = text.rfind("\n\n", 0, at)
    at = paragraph + 2 if paragraph >= 0 else at
    return text[:at], text[at:]


# ----------------------------------------------------------------------------------------------------------------------
# python, shakespeare


def python_documents():
    """Python's own standard library, one document a file, and the language's help topics, in the order of their hashes.

    Left out: tests, installed packages, the codecs' tables. In the order of hashes --tokens= takes a fair sample.
    """
    root = sysconfig.get_paths()["stdlib"]
    skip = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    texts = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skip]
        for name in files:
            if name.endswith(".py"):
                with open(os.path.join(folder, name), "rb") as f:
                    texts.append(f.read().decode("utf-8", "replace"))
    if not texts:
        raise DataError(f"{root}: no .py files of the standard library here; use --dataset=<a folder of text>")
    from pydoc_data.topics import topics

    return sorted(texts + list(topics.values()), key=content_hash)


def python_record():
    return [{"name": f"standard library and help topics of Python {sys.version.split()[0]}"}]


def shakespeare_documents(fetch):
    fetch()
    yield from file_documents([fetch.args[1]], "")


# ----------------------------------------------------------------------------------------------------------------------
# Files


def text_files(path):
    """The text files at a path: the file itself, or all below a folder, sorted. Raises DataError if there is none."""
    if os.path.isfile(path):
        if not path.endswith(SUFFIXES):
            raise DataError(f"{path}: wanted a file ending in {', '.join(SUFFIXES)}")
        return [path]
    found = [os.path.join(folder, f) for folder, _, files in os.walk(path, onerror=stop_at) for f in files]
    files = sorted(f for f in found if f.endswith(SUFFIXES))
    if odd := [f for f in files if not os.path.isfile(f)]:
        raise DataError(f"{odd[0]}: is no file that can be read (a FIFO, a device, a link to nothing); move it away")
    if not files:
        raise DataError(f"{path}: no file ending in {', '.join(SUFFIXES)} among {len(found)} files here")
    if len(files) < len(found):
        print(f"{path}: {len(files)} text files; {len(found) - len(files)} others are left out")
    return files


def stop_at(error):
    """A folder that cannot be looked into: its text must not be missing in silence."""
    raise error


def file_documents(files, text_key):
    """The documents of .txt and .jsonl files. Raises DataError naming the file that is damaged or of another format."""
    for path in files:
        try:
            with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as f:
                chunks = iter(lambda f=f: f.read(1 << 20), b"")
                yield from json_texts(chunks, path, text_key) if ".jsonl" in path[-9:] else plain_texts(chunks)
        except UnicodeDecodeError as e:
            raise DataError(f"{path}: not UTF-8 ({e.reason}); convert it first") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise DataError(f"{path}: damaged or truncated gzip file ({e})") from None


def file_records(files):
    return [{"name": f, "bytes": os.path.getsize(f), "sha256": sha256_file(f)} for f in files]


def text_sha256(dataset):
    """One sha256 over the files of a dataset that is a path, so that changed text is noticed; '' for the others."""
    if dataset in NAMES:
        return ""
    return hashlib.sha256("".join(sha256_file(f) for f in text_files(dataset)).encode()).hexdigest()


def pieces(chunks, separator, name=None):
    """Split a stream of bytes at a separator, which may lie across chunks. With the file's name, no piece may be longer
    than LINE_BYTES: raises DataError."""
    held = bytearray()
    for chunk in chunks:
        start = max(0, len(held) - len(separator) + 1)
        held += chunk
        if held.find(separator, start) >= 0:
            *whole, held = held.split(separator)
            yield from map(bytes, whole)
        if name is not None and len(held) > LINE_BYTES:
            raise DataError(f"{name}: a line of more than {LINE_BYTES} bytes: not JSON lines")
    yield bytes(held)


def plain_texts(chunks):
    """The documents of a text file: all of it, or what stands between <|endoftext|>s."""
    for piece in pieces(chunks, ENDOFTEXT.encode()):
        if piece.strip():
            yield piece.decode("utf-8")


def json_texts(chunks, name, text_key):
    """The field `text_key` of every row of JSON lines."""
    for number, line in enumerate(pieces(chunks, b"\n", name), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[text_key]
        except (ValueError, RecursionError) as e:
            raise DataError(f"{name}: line {number} is not JSON ({' '.join(str(e).split())})") from None
        except (KeyError, TypeError):
            raise DataError(f"{name}: line {number} has no field {text_key!r}; name it by --text_key=") from None
        if not isinstance(text, str):
            raise DataError(f"{name}: line {number}: wanted a string in {text_key!r}, got {type(text).__name__}")
        if text:
            yield text


# ----------------------------------------------------------------------------------------------------------------------
# Streams: nothing is kept of the download, and it stops where enough has been read


class Shard:
    """A part that is one remote file of one split, read as a stream."""

    def __init__(self, split, url, mirror):
        self.url, self.mirror, self.split = url, mirror, split
        self.name, self.splits = url.rsplit("/", 1)[1], (split,)
        self.stream = None

    def chunks(self):
        """The file's bytes. Raises DownloadError also when the file changed or is not what its host says it is."""
        self.stream = Stream(mirrored(self.url, self.mirror))
        try:
            yield from self.stream
        except Changed as e:
            raise DownloadError(f"{self.stream.url}: {e}; nothing of it was kept: run the same command again") from e

    def record(self):
        s = self.stream
        whole = s.position == s.total
        return [
            {
                "name": self.name,
                "url": self.url,
                "bytes": s.position,
                "of_bytes": s.total,
                "whole": whole,
                "sha256": s.hasher.hexdigest(),
                "published_sha256": whole and s.sha256 is not None,
            }
        ]


class C4Shard(Shard):
    """A gzipped file of JSON lines with the field "text"."""

    def documents(self):
        for text in json_texts(gunzip(self.chunks(), self.url), self.url, "text"):
            yield self.split, text

    def encoded(self, enc, n_threads):
        return encode_documents(self.documents(), enc, n_threads)


class TokenShard(Shard):
    """A file of uint16 tokens behind our own header."""

    def encoded(self, enc, n_threads):
        held, wanted, got = b"", None, 0
        for chunk in self.chunks():
            held += chunk
            if wanted is None and len(held) >= HEADER_BYTES:
                wanted, held = self.check_header(held[:HEADER_BYTES]), held[HEADER_BYTES:]
            if wanted is not None:
                ids, held = np.frombuffer(held[: len(held) // 2 * 2], "<u2"), held[len(held) // 2 * 2 :]
                got += len(ids)
                if len(ids) and ids.max() >= enc.n_vocab:
                    raise DataError(f"{self.url}: holds token {ids.max()}, but {enc.name} has {enc.n_vocab}")
                yield self.split, ids.astype(np.uint32)
        if held or got != wanted:
            raise DataError(f"{self.url}: its header says {wanted} tokens, the file holds {got}; run again later")

    def check_header(self, header):
        magic, version = (int(v) for v in np.frombuffer(header, "<i4", 2))
        if magic not in FORMATS or FORMATS[magic] != (version, np.dtype("<u2")):
            raise DataError(f"{self.url}: not a shard of uint16 tokens (magic {magic}, version {version})")
        return int(np.frombuffer(header, "<u4", 3)[2])


def gunzip(chunks, name):
    """Uncompress a stream of gzip bytes, of one or several members. Raises DataError if it is damaged or truncated."""
    d = zlib.decompressobj(31)
    try:
        for chunk in chunks:
            while chunk:
                d = zlib.decompressobj(31) if d.eof else d
                yield d.decompress(chunk, 1 << 20)  # a kilobyte may stand for a megabyte
                chunk = d.unconsumed_tail or d.unused_data
    except zlib.error as e:
        raise DataError(f"{name}: damaged gzip file ({e}); run again later") from None
    if not d.eof:
        raise DataError(f"{name}: truncated gzip file; run again later")
