"""prepare_data.py, corpora.py and tokenizer.py: what is in the shards, tokenizers, remote corpora, interruptions."""

import base64
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.registry

import corpora
import download as dl
import owned
import prepare_data
import tokenizer as tok
from configurator import configure
from data import Corpus, DataError, read_header, shard_header, token_dtype
from owned import NotOurs
from prepare_data import RULES, main, prepare
from tests.http_server import broken, serving, status
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
WORDS = "the a mapping doubly stochastic stream café 深い residual\n\n gain 0.5 <|endoftext|> é".split(" ")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(dl, "BACKOFF", 0.001)
    monkeypatch.setattr(dl, "TIMEOUT", 5.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def settings(tmp_path, **changes):
    """All settings of prepare_data.py, with these changes."""
    flags = {"tokenizer": "bytes", "data_root": str(tmp_path / "data"), "workers": 2} | changes
    return configure(dict(vars(prepare_data)), RULES, argv=[f"--{k}={v}" for k, v in flags.items()])


def texts(n, seed=0, length=60):
    """n different documents; some spell <|endoftext|>."""
    rng = random.Random(seed)
    return [f"{seed}.{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, length))) for i in range(n)]


def write_jsonl(path, documents):
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    return str(path)


def split_tokens(folder, split):
    """The tokens of a split, read by hand."""
    meta = json.loads((Path(folder) / "meta.json").read_text())
    files = [Path(folder) / f["name"] for f in meta["splits"][split]["files"]]
    return np.concatenate([np.fromfile(f, read_header(f)[1], offset=1024) for f in files]).astype(np.int64)


def documents_of(folder, split):
    """The documents of a split, decoded; the last must be ended."""
    enc, ids = load_tokenizer(folder), split_tokens(folder, split)
    assert ids[-1] == enc.eot_token
    return [enc.decode(piece.tolist()) for piece in np.split(ids, np.flatnonzero(ids == enc.eot_token) + 1)[:-1]]


def without_eot(documents):
    assert all(d.endswith(tok.ENDOFTEXT) for d in documents)
    return [d[: -len(tok.ENDOFTEXT)] for d in documents]


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir()}


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_folder_of_all_kinds_of_files(tmp_path):
    source = tmp_path / "my.corpus"
    (source / "sub").mkdir(parents=True)
    plain = [t.replace("<|endoftext|>", "|") for t in texts(30, seed=1)]
    rows, packed = texts(30, seed=2), texts(30, seed=3)
    (source / "a.txt").write_text("<|endoftext|>".join(plain), encoding="utf-8")
    write_jsonl(source / "sub" / "b.jsonl", rows)
    write_jsonl(source / "c.jsonl.gz", packed)
    with gzip.open(source / "d.txt.gz", "wb") as f:
        f.write(b"one\r\nmore<|endoftext|>\n")
    (source / "notes.md").write_text("left out")
    folder = prepare(settings(tmp_path, dataset=source, val_fraction=0.1))
    assert folder == str(tmp_path / "data" / "my_bytes")
    train, val = without_eot(documents_of(folder, "train")), without_eot(documents_of(folder, "val"))
    assert Counter(train + val) == Counter(plain + packed + ["one\r\nmore"] + rows)
    assert train == [t for t in plain + packed + ["one\r\nmore"] + rows if t not in val]  # the files' order is kept
    assert 0.03 < sum(map(len, val)) / sum(map(len, train + val)) <= 0.1
    meta = Corpus(folder, "train", 16).meta
    for split, documents in (("train", train), ("val", val)):
        info, n_bytes = meta["splits"][split], sum(len(d.encode()) for d in documents)
        assert info["documents"] == len(documents) and info["bytes"] == n_bytes
        assert info["tokens"] == n_bytes + len(documents)
        assert meta["bytes_per_token"][split] == info["bytes_per_token"] == n_bytes / info["tokens"]
    assert {os.path.basename(s["name"]) for s in meta["sources"]} == {"a.txt", "b.jsonl", "c.jsonl.gz", "d.txt.gz"}
    assert all(s["sha256"] == hashlib.sha256(Path(s["name"]).read_bytes()).hexdigest() for s in meta["sources"])
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"], meta["dtype"]) == ("bytes", 257, 256, "uint16")
    Corpus(folder, "val", 16).verify()


@pytest.mark.parametrize("workers", [1, 3])
def test_result_does_not_depend_on_threads_or_batches(tmp_path, monkeypatch, workers):
    source = write_jsonl(tmp_path / "t.jsonl", texts(300))
    one = prepare(settings(tmp_path / "1", dataset=source, tokenizer="bpe300", workers=2))
    batches = tok.batches
    monkeypatch.setattr(tok, "batches", lambda documents: batches(documents, size=1000))
    two = prepare(settings(tmp_path / "2", dataset=source, tokenizer="bpe300", workers=workers))
    assert hashes(one) == hashes(two)


def test_shards_are_cut_and_limits_are_exact(tmp_path):
    source = write_jsonl(tmp_path / "t.jsonl", texts(300))
    whole = prepare(settings(tmp_path / "1", dataset=source, val_fraction=0.2))
    cut = prepare(
        settings(tmp_path / "2", dataset=source, val_fraction=0.2, shard_tokens=1000, tokens=5500, val_tokens=1001)
    )
    meta = Corpus(cut, "train", 16).meta
    assert [f["tokens"] for f in meta["splits"]["train"]["files"]] == [1000] * 5 + [500]
    assert [f["tokens"] for f in meta["splits"]["val"]["files"]] == [1000, 1]
    for split, n in (("train", 5500), ("val", 1001)):
        ids = split_tokens(cut, split)
        assert len(ids) == n and (ids == split_tokens(whole, split)[:n]).all()
        assert meta["splits"][split]["bytes"] == (ids != 256).sum()


def test_split_is_by_content(tmp_path):
    """In a stream, a document's split depends on nothing but the document; with few documents the share is met."""
    documents = texts(2000) + ["twice"] * 2
    split = dict(zip(documents, (s for s, _ in corpora.split_documents(documents, 0.1, small=0)), strict=True))
    assert 150 < Counter(split.values())["val"] < 250
    shuffled = random.Random(1).sample(documents, 1000)
    assert all(split[text] == s for s, text in corpora.split_documents(shuffled, 0.1, small=0))
    few = texts(40)
    one = [set(t for s, t in corpora.split_documents(order, 0.1) if s == "val") for order in (few, few[::-1])]
    assert one[0] == one[1] and 0.05 < sum(map(len, one[0])) / sum(map(len, few)) <= 0.1
    assert [s for s, _ in corpora.split_documents(["long " * 100, "short"], 0.001)].count("val") == 1


def test_one_document_is_cut_at_a_paragraph(tmp_path):
    text = "\n\n".join(f"paragraph {i}" for i in range(100))
    (tmp_path / "book.txt").write_text(text)
    folder = prepare(settings(tmp_path, dataset=tmp_path / "book.txt", val_fraction=0.1))
    (train,), (val,) = without_eot(documents_of(folder, "train")), without_eot(documents_of(folder, "val"))
    assert train + val == text and train.endswith("\n\n") and 0.09 < len(val) / len(text) < 0.12


@pytest.mark.parametrize("n", [1, 20])
def test_val_is_whole_however_few_training_tokens_are_wanted(tmp_path, n):
    source = write_jsonl(tmp_path / "t.jsonl", [f"{i}\n\n" + "paragraph\n\n" * 50_000 for i in range(n)])
    s = settings(tmp_path, dataset=source, val_fraction=0.1)
    some, whole = prepare(s | {"tokens": 1000, "data_dir": str(tmp_path / "some")}), prepare(s)
    assert len(split_tokens(some, "train")) == 1000
    assert (split_tokens(some, "train") == split_tokens(whole, "train")[:1000]).all()
    assert (split_tokens(some, "val") == split_tokens(whole, "val")).all()


def test_long_document_is_shared_out_and_keeps_one_end(tmp_path):
    text = "".join(f"line {i}\n" for i in range(200_000))
    pieces = list(tok.batches([("train", text), ("val", "short")]))
    assert len(pieces) > 5 and "".join(t for b in pieces for s, t, _ in b if s == "train") == text
    ends = [last for b in pieces for _, _, last in b]
    assert ends == [False] * (len(ends) - 2) + [True, True]
    ids = np.concatenate([ids for _, ids in tok.encode_documents([("train", text)], tok.make_tokenizer("bytes"), 2)])
    assert bytes(ids[:-1].astype(np.uint8)) == text.encode() and (ids == 256).sum() == 1 and ids[-1] == 256
    assert all(t.endswith("\n") for b in pieces for s, t, _ in b if s == "train")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.jsonl", b'{"text": "a"}\n{"text": \n', r"t.jsonl: line 2 is not JSON"),
        ("t.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', r"t.jsonl: line 3 has no field 'text'; .*--text_key="),
        ("t.jsonl", b'{"text": 3}\n', r"t.jsonl: line 1: wanted a string in 'text', got int"),
        ("t.jsonl", b"[1]\n", r"t.jsonl: line 1 has no field 'text'"),
        ("t.txt", b"caf\xe9", r"t.txt: not UTF-8"),
        ("t.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-9], r"t.txt.gz: damaged or truncated gzip"),
        ("t.jsonl.gz", b"not gzip", r"t.jsonl.gz: damaged or truncated gzip"),
        ("t.txt", b"", r"no text for train"),
        ("t.md", b"", r"wanted a file ending in .txt"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(settings(tmp_path, dataset=tmp_path / name))
    assert not (tmp_path / "data").exists() or os.listdir(tmp_path / "data") == []


def test_text_key(tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"body": t, "text": "x"}) + "\n" for t in texts(20)))
    folder = prepare(settings(tmp_path, dataset=tmp_path / "t.jsonl", text_key="body"))
    assert set(without_eot(documents_of(folder, "train") + documents_of(folder, "val"))) == set(texts(20))


def test_separator_across_chunks():
    data = b"one<|endoftext|>two<|endoftext|><|endoftext|>three"
    for size in (1, 2, 5, 13, 100):
        chunks = [data[i : i + size] for i in range(0, len(data), size)]
        assert list(corpora.pieces(chunks, b"<|endoftext|>")) == [b"one", b"two", b"", b"three"]


def test_gzip_comes_in_pieces_however_much_it_stands_for():
    data = gzip.compress(b"a" * (9 << 20)) + gzip.compress(b"b" * 5)
    got = list(corpora.gunzip(iter([data[:5000], data[5000:]]), "x"))
    assert b"".join(got) == b"a" * (9 << 20) + b"b" * 5 and max(map(len, got)) <= 1 << 20


def test_python_needs_nothing(tmp_path):
    folder = prepare(settings(tmp_path, dataset="python", tokens=300_000))
    meta = Corpus(folder, "train", 64).meta
    assert meta["splits"]["train"]["tokens"] == 300_000 and meta["splits"]["val"]["tokens"] > 50_000
    train, val = bytes(i for i in split_tokens(folder, "train") if i < 256), documents_of(folder, "val")
    assert not any("Python Character Mapping Codec" in text for text in corpora.python_documents())
    assert b"\ndef " in train and b"\nimport " in train and len(val) > 5
    assert sys.version.split()[0] in meta["sources"][0]["name"]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_bytes_are_utf8():
    enc = tok.make_tokenizer("bytes")
    for text in ["", "café 深い\r\n\0", "<|endoftext|>"]:
        assert tok.encode(enc, text).tolist() == list(text.encode())
    assert enc.n_vocab == 257 and enc.eot_token == 256


def naive_bpe(words, n_tokens):
    """Count everything anew for each merge. words: {bytes: count}."""
    words = [([bytes([b]) for b in w], c) for w, c in words.items()]
    ranks = {bytes([i]): i for i in range(256)}
    while len(ranks) < n_tokens:
        counts = Counter()
        for parts, c in words:
            for pair in zip(parts, parts[1:], strict=False):
                counts[pair] += c
        if not counts:
            break
        best = min(counts, key=lambda p: (-counts[p], ranks[p[0]], ranks[p[1]]))
        ranks.setdefault(best[0] + best[1], len(ranks))
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [best[0] + best[1]]
                i += 1
    return ranks


@pytest.mark.parametrize("seed", range(5))
def test_bpe_equals_counting_everything_anew(seed):
    """Few letters make the hard cases common: aaa, the same bytes by two ways, words that vanish."""
    rng = random.Random(seed)
    letters = b"ab" if seed < 3 else b"abcd"
    words = {bytes(rng.choices(letters, k=rng.randint(1, 12))): rng.randint(1, 9) for _ in range(60)}
    got = tok.merge_pairs([(list(w), c) for w, c in words.items()], 256 + 80)
    assert got == naive_bpe(words, 256 + 80)
    assert sorted(got.values()) == list(range(len(got)))


def test_bpe_round_trip_and_size(tmp_path, capsys):
    documents = texts(400)
    enc = tok.make_tokenizer("bpe400", documents)
    assert enc.n_vocab == 400 and enc.eot_token == 399
    for text in documents[:50] + ["unseen: Ωß\U0001f600\n\n   x", "<|endoftext|>"]:
        ids = tok.encode(enc, text)
        assert enc.decode(ids.tolist()) == text and (ids.size == 0 or ids.max() < 399)
        assert tok.token_lengths(enc)[ids].sum() == len(text.encode())
    n_tokens = sum(len(tok.encode(enc, t)) for t in documents)
    assert n_tokens < 0.5 * sum(len(t.encode()) for t in documents)
    assert tok.make_tokenizer("bpe5000", ["ab ab"]).n_vocab < 300
    assert "not 5000" in capsys.readouterr().out
    for bad in ("bpe256", "bpe0", "bpe99999999"):
        with pytest.raises(DataError, match="the size must be from 257"):
            tok.make_tokenizer(bad)


def test_bpe_is_trained_on_training_text_only(tmp_path):
    """Words of the validation text must not get tokens of their own."""
    documents = texts(50) + [f"zyzzyva{i} " * 300 for i in range(5)]
    source = write_jsonl(tmp_path / "t.jsonl", documents)
    folder = prepare(settings(tmp_path, dataset=source, tokenizer="bpe350", val_fraction=0.35))
    val, train = (without_eot(documents_of(folder, split)) for split in ("val", "train"))
    trained = set(tok.make_tokenizer("bpe350", train)._mergeable_ranks)
    assert (
        set(load_tokenizer(folder)._mergeable_ranks)
        == trained
        != set(tok.make_tokenizer("bpe350", train + val)._mergeable_ranks)
    )


def test_lone_surrogates_become_replacement_characters():
    enc = tok.make_tokenizer("bytes")
    assert bytes(tok.encode(enc, "a\ud800b\ud83d\ude00").tolist()).decode() == "a\ufffdb\U0001f600"


def test_large_vocabulary_takes_32_bits(tmp_path, monkeypatch):
    ranks = {bytes([i]): i for i in range(256)} | {b"the": 69_999}
    enc = tiktoken.Encoding("big", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 70_000})
    monkeypatch.setattr(prepare_data, "make_tokenizer", lambda *args: enc)
    source = write_jsonl(tmp_path / "t.jsonl", ["the"] * 10 + ["other", "more"])
    folder = prepare(settings(tmp_path, dataset=source, val_fraction=0.3))
    c = Corpus(folder, "train", 4)
    assert c.vocab_size == 70_001 and c.meta["dtype"] == "uint32" and 69_999 in c.sequences([0, 1, 2])[0]
    assert load_tokenizer(folder).decode([69_999, 70_000]) == "the<|endoftext|>"


def test_unknown_tokenizer_and_altered_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"unknown tokenizer 'gpt5'.*bytes, bpe<size> or one of .*cl100k_base"):
        tok.make_tokenizer("gpt5")
    source = write_jsonl(tmp_path / "t.jsonl", texts(20))
    folder = Path(prepare(settings(tmp_path, dataset=source)))
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("bytes", "bites"))
    with pytest.raises(DataError, match="tokenizer.json: altered"):
        load_tokenizer(folder)


RANKS = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)) + base64.b64encode(b"th") + b" 256\n"
RANKS_URL = "https://example.invalid/tiny.tiktoken"


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A tiktoken encoding 'tiny', whose ranks tiktoken downloads and keeps as it does for its own."""
    tiktoken.list_encoding_names()  # fills the registry
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(
        tiktoken.registry.ENCODING_CONSTRUCTORS,
        "tiny",
        lambda: {
            "name": "tiny",
            "pat_str": r"\w+|\W+",
            "special_tokens": {"<|endoftext|>": 257},
            "mergeable_ranks": tiktoken.load.load_tiktoken_bpe(RANKS_URL, hashlib.sha256(RANKS).hexdigest()),
        },
    )
    yield tmp_path / "cache" / hashlib.sha1(RANKS_URL.encode()).hexdigest()
    tiktoken.registry.ENCODINGS.pop("tiny", None)


def test_ranks_are_fetched_with_care_and_then_cached(tiny, tmp_path):
    with serving() as server:
        file = server.add("/example.invalid/tiny.tiktoken", RANKS, faults=[status(500), broken(1000)])
        enc = tok.make_tokenizer("tiny", mirror=server.url)
        assert tok.encode(enc, "the").tolist() == [256, ord("e")] and len(file.requests) == 3
    assert tiny.read_bytes() == RANKS
    tiktoken.registry.ENCODINGS.pop("tiny")
    assert tok.make_tokenizer("tiny", mirror=server.url).n_vocab == 258  # the server is gone
    source = write_jsonl(tmp_path / "t.jsonl", texts(20))
    folder = prepare(settings(tmp_path, dataset=source, tokenizer="tiny"))
    tiktoken.registry.ENCODINGS.pop("tiny")
    tiny.unlink()
    assert tok.encode(load_tokenizer(folder), "the").tolist() == [256, ord("e")]  # a corpus carries its tokenizer


def test_ranks_that_cannot_be_had(tiny):
    with serving() as server:
        with pytest.raises(DataError) as e:
            tok.make_tokenizer("tiny", mirror=server.url)
        for wanted in (RANKS_URL, str(tiny), "TIKTOKEN_CACHE_DIR", "404"):
            assert wanted in str(e.value)
        server.add("/example.invalid/tiny.tiktoken", RANKS[:-10])
        with pytest.raises(DataError, match="Hash mismatch"):
            tok.make_tokenizer("tiny", mirror=server.url)
    tiny.parent.mkdir()
    tiny.write_bytes(RANKS)  # put there by hand, as the message says
    assert tok.make_tokenizer("tiny").n_vocab == 258


# ----------------------------------------------------------------------------------------------------------------------
# Remote corpora


C4_PATH = "/huggingface.co/datasets/allenai/c4/resolve/main/en/"


def c4_server(server, shards=3, n=150):
    """C4 as it is published, but small; returns {name: documents} and {name: served file}."""
    names = [f"c4-validation.{i:05d}-of-00008.json.gz" for i in range(2)] + [
        f"c4-train.{i:05d}-of-01024.json.gz" for i in range(shards)
    ]
    documents = {name: texts(n, seed=10 + i) for i, name in enumerate(names)}
    packed = {
        name: b"".join(
            gzip.compress("".join(json.dumps({"text": t, "url": "u"}) + "\n" for t in half).encode())
            for half in (ts[:70], ts[70:])
        )
        for name, ts in documents.items()
    }  # two gzip members
    return documents, {name: server.add(C4_PATH + name, content) for name, content in packed.items()}


def test_c4_is_read_as_far_as_asked(tmp_path):
    with serving() as server:
        documents, files = c4_server(server)
        val, train = documents["c4-validation.00000-of-00008.json.gz"], documents["c4-train.00000-of-01024.json.gz"]
        second = documents["c4-train.00001-of-01024.json.gz"]
        n_first = sum(len(t.encode()) + 1 for t in train)
        s = settings(tmp_path, dataset="c4", tokens=n_first + 2000, val_tokens=3000, mirror=server.url)
        folder = prepare(s)
        assert [name[:15] for name, f in files.items() if f.requests] == [
            "c4-validation.0",
            "c4-train.00000-",
            "c4-train.00001-",
        ]
    meta = Corpus(folder, "train", 16).meta
    ids = split_tokens(folder, "train")
    expected = [b for t in train + second for b in [*t.encode(), 256]]
    assert ids.tolist() == expected[: n_first + 2000]
    assert split_tokens(folder, "val").tolist() == [b for t in val for b in [*t.encode(), 256]][:3000]
    first = meta["sources"][1]
    assert first["published_sha256"] is False  # this server names none
    assert (
        first["whole"]
        and first["sha256"] == hashlib.sha256(files["c4-train.00000-of-01024.json.gz"].content).hexdigest()
        and first["url"].startswith("https://huggingface.co")
    )


def test_c4_stops_in_the_middle_of_a_shard(tmp_path):
    """Noise does not compress, so that a shard is much longer than what a small corpus needs of it."""
    with serving() as server:
        _, files = c4_server(server, shards=0)
        rows = "".join(json.dumps({"text": random.Random(i).randbytes(20_000).hex()}) + "\n" for i in range(400))
        name = "c4-train.00000-of-01024.json.gz"
        server.add(C4_PATH + name, gzip.compress(rows.encode(), 1))
        folder = prepare(settings(tmp_path, dataset="c4", tokens=50_000, val_tokens=100, workers=1, mirror=server.url))
    source = Corpus(folder, "train", 16).meta["sources"][-1]
    assert source["name"] == name and not source["whole"] and source["bytes"] < 0.4 * source["of_bytes"]


def test_c4_wants_a_number(tmp_path):
    with pytest.raises(DataError, match="--tokens=1e9"):
        prepare(settings(tmp_path, dataset="c4"))


def test_c4_survives_breaks_and_continues_an_interrupted_run(tmp_path):
    def run(folder, server):
        return prepare(
            settings(
                tmp_path / folder,
                dataset="c4",
                tokens=15_000,
                val_tokens=3000,
                tokenizer="bpe300",
                bpe_train_mb=0.01,
                mirror=server.url,
            )
        )

    with serving() as server:
        documents, files = c4_server(server)
        straight = run("straight", server)
        for f in files.values():
            f.requests.clear()
            f.faults[:] = [broken(1000), status(503)]
        files["c4-train.00001-of-01024.json.gz"].faults[:] = [broken(1000), status(404)]
        with pytest.raises(dl.DownloadError, match="404"):
            run("stopped", server)
        assert not (tmp_path / "stopped/data/c4_bpe300").exists()
        left = sorted(os.listdir(tmp_path / "stopped/data/c4_bpe300.tmp"))
        assert left == [".made_by_mhc", "journal.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"]
        files["c4-train.00000-of-01024.json.gz"].requests.clear()
        again = run("stopped", server)
        assert not files["c4-train.00000-of-01024.json.gz"].requests
        assert os.listdir(tmp_path / "stopped/data") == ["c4_bpe300"]
    one, two = Corpus(straight, "train", 16).meta, Corpus(again, "train", 16).meta
    assert one["splits"] == two["splits"] and len(one["splits"]["train"]["files"]) > 1
    assert [s["sha256"] for s in one["sources"]] == [s["sha256"] for s in two["sources"]]


def test_interrupted_run_of_other_settings_is_not_continued(tmp_path):
    with serving() as server:
        _, files = c4_server(server)
        s = settings(
            tmp_path,
            dataset="c4",
            tokens=15_000,
            val_tokens=3000,
            mirror=server.url,
            tokenizer="bpe300",
            bpe_train_mb=0.01,
            data_dir=tmp_path / "data" / "c",
        )
        files["c4-train.00001-of-01024.json.gz"].faults[:] = [status(404)]
        with pytest.raises(dl.DownloadError):
            prepare(s)
        assert (tmp_path / "data" / "c.tmp" / "journal.json").exists()
        got = prepare(s | {"tokenizer": "bytes"})
        assert hashes(got) == hashes(prepare(s | {"tokenizer": "bytes", "data_dir": str(tmp_path / "data" / "d")}))


def test_what_a_killed_run_left_is_not_used(tmp_path):
    s = settings(tmp_path, dataset=write_jsonl(tmp_path / "t.jsonl", texts(100)), tokenizer="bpe300")
    left = tmp_path / "data" / "t_bpe300.tmp"
    owned.make(left, "corpus")
    tok.save_tokenizer(tok.make_tokenizer("bytes"), left / "tokenizer.json")
    (left / "train_000007.bin").write_bytes(b"half a shard")
    folder = prepare(s)
    assert load_tokenizer(folder).n_vocab == 300 and "train_000007.bin" not in os.listdir(folder)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda b: b[:-5], "truncated gzip"),
        (lambda b: b[:500] + b"\0\0\0\0" + b[504:], "damaged gzip|not JSON"),
        (lambda b: gzip.compress(b'{"text": "a"}\n{"te'), "line 2 is not JSON"),
    ],
)
def test_damaged_c4_is_not_used(tmp_path, monkeypatch, damage, message):
    batches = tok.batches
    monkeypatch.setattr(tok, "batches", lambda documents: batches(documents, size=100))  # something is written before
    with serving() as server:
        _, files = c4_server(server)
        files["c4-train.00000-of-01024.json.gz"].content = damage(files["c4-train.00000-of-01024.json.gz"].content)
        with pytest.raises(DataError, match=message):
            prepare(settings(tmp_path, dataset="c4", tokens=10**6, val_tokens=100, mirror=server.url))
    assert not (tmp_path / "data/c4_bytes").exists()
    assert not [f for f in os.listdir(tmp_path / "data/c4_bytes.tmp") if f.startswith("train")]


def test_c4_with_another_sha256_than_published_is_not_used(tmp_path):
    with serving() as server:
        _, files = c4_server(server)
        files["c4-train.00000-of-01024.json.gz"].headers = {"X-Linked-ETag": f'"{"0" * 64}"'}
        with pytest.raises(dl.DownloadError, match="wanted sha256 0000"):
            prepare(settings(tmp_path, dataset="c4", tokens=10**6, val_tokens=100, mirror=server.url))
        assert not [f for f in os.listdir(tmp_path / "data/c4_bytes.tmp") if f.startswith("train")]


def fineweb_shard(ids):
    return shard_header(len(ids), token_dtype(50257)).tobytes() + np.asarray(ids, "<u2").tobytes()


@pytest.fixture
def gpt2(monkeypatch):
    """Stands in for gpt2, whose ranks would have to be downloaded: the same size and name."""
    ranks = {bytes([i]): i for i in range(256)} | {b"%05d" % i: i for i in range(256, 50256)}
    enc = tiktoken.Encoding("gpt2", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    monkeypatch.setattr(prepare_data, "make_tokenizer", lambda *args: enc)


def test_fineweb(tmp_path, gpt2):
    rng = np.random.default_rng(0)
    path = "/huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_"
    shards = {
        name: rng.integers(0, 50257, n)
        for name, n in [("val_000000", 3001), ("train_000001", 70_001), ("train_000002", 60_000), ("train_000003", 9)]
    }
    with serving() as server:
        files = {
            name: server.add(f"{path}{name}.bin", fineweb_shard(ids), faults=[broken(1500)])
            for name, ids in shards.items()
        }
        s = settings(
            tmp_path, dataset="fineweb10b", tokenizer="gpt2", tokens=100_000, val_tokens=2000, mirror=server.url
        )
        folder = prepare(s)
        assert not files["train_000003"].requests
        train = np.concatenate([shards["train_000001"], shards["train_000002"]])[:100_000]
        assert (split_tokens(folder, "train") == train).all()
        assert (split_tokens(folder, "val") == shards["val_000000"][:2000]).all()
        info = Corpus(folder, "train", 16).meta["splits"]["train"]
        lengths = np.where(train < 256, 1, np.where(train == 50256, 0, 5))
        assert info["bytes"] == lengths.sum() and info["documents"] == (train == 50256).sum()
        with pytest.raises(DataError, match="wanted --tokenizer=gpt2, got bytes"):
            prepare(s | {"tokenizer": "bytes"})
        bad = {
            "not a shard": fineweb_shard([1, 2]).replace(b"\1", b"\2", 1),
            "not a shard of uint16": shard_header(1, token_dtype(70_000)).tobytes() + b"\0" * 4,
            "says 3 tokens, the file holds 2": shard_header(3, token_dtype(9)).tobytes() + b"\0" * 4,
            "holds token 50257": fineweb_shard([50257]),
        }
        for message, content in bad.items():
            files["val_000000"].content = content
            with pytest.raises(DataError, match=message):
                prepare(s | {"data_dir": str(tmp_path / "bad")})
            assert not (tmp_path / "bad").exists() and not (tmp_path / "bad.tmp").exists()


def test_tokens_cut_by_chunks():
    """A network's chunks end anywhere: within the header, within a token."""
    content = fineweb_shard([1, 200, 256, 0])
    for size in (1, 3, 1025, 1026, 5000):
        shard = corpora.TokenShard("val", "http://x/s.bin", "")
        shard.chunks = lambda size=size: (content[i : i + size] for i in range(0, len(content), size))
        got = list(shard.encoded(tok.make_tokenizer("bytes"), 1))
        assert np.concatenate([ids for _, ids in got]).tolist() == [1, 200, 256, 0]


def test_shakespeare(tmp_path, monkeypatch):
    play = "\n\n".join(f"CITIZEN {i}:\nSpeak, speak." for i in range(1000)).encode()
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(play).hexdigest())
    monkeypatch.setattr(corpora, "SHAKESPEARE_BYTES", len(play))
    path = "/raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    with serving() as server:
        file = server.add(path, play[:-1] + b"!")
        s = settings(tmp_path, dataset="shakespeare", mirror=server.url)
        with pytest.raises(dl.DownloadError, match="wanted sha256"):
            prepare(s)
        file.content = play
        folder = prepare(s)
    assert bytes(i for i in [*split_tokens(folder, "train"), *split_tokens(folder, "val")] if i < 256) == play
    meta = Corpus(folder, "val", 16).meta
    assert 0.09 < meta["splits"]["val"]["bytes"] / len(play) < 0.11
    assert meta["sources"][0]["sha256"] == hashlib.sha256(play).hexdigest()
    assert prepare(s) == folder  # complete, so that the server, which is gone, is not asked


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def test_second_run_other_settings_overwrite(tmp_path, capsys):
    source = write_jsonl(tmp_path / "t.jsonl", texts(100))
    s = settings(tmp_path, dataset=source)
    folder = prepare(s)
    before = {p: p.stat().st_mtime_ns for p in Path(folder).iterdir()}
    assert prepare(s | {"workers": 1}) == folder
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(DataError, match="val_fraction: it has 0.02, wanted 0.3.*--overwrite=True"):
        prepare(s | {"val_fraction": 0.3})
    assert before == {p: p.stat().st_mtime_ns for p in Path(folder).iterdir()}
    prepare(s | {"val_fraction": 0.3, "overwrite": True})
    assert len(documents_of(folder, "val")) > 20
    write_jsonl(tmp_path / "t.jsonl", texts(101))
    with pytest.raises(DataError, match="text_sha256"):
        prepare(s | {"val_fraction": 0.3})
    assert os.listdir(tmp_path / "data") == ["t_bytes"]


def test_damaged_corpus_is_not_called_complete(tmp_path):
    s = settings(tmp_path, dataset=write_jsonl(tmp_path / "t.jsonl", texts(100)))
    shard = Path(prepare(s)) / "train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match="train_000000.bin: missing, or altered"):
        prepare(s)
    shard.unlink()
    with pytest.raises(DataError, match="train_000000.bin: missing, or altered"):
        prepare(s)
    prepare(s | {"overwrite": True})
    content = shard.read_bytes()
    shard.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))  # one bit
    with pytest.raises(DataError, match="train_000000.bin: missing, or altered"):
        prepare(s)
    prepare(s | {"overwrite": True})
    Corpus(prepare(s), "train", 16).verify()


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("x")
    s = settings(tmp_path, dataset=write_jsonl(tmp_path / "t.jsonl", texts(100)), data_dir=tmp_path / "thesis")
    for overwrite, named in ((False, "is no prepared corpus"), (True, "not known to be a corpus of ours")):
        with pytest.raises(NotOurs, match=named):
            prepare(s | {"overwrite": overwrite})
    assert (tmp_path / "thesis" / "chapter").read_text() == "x"


def whole(path):
    """All that is below a path: {path: content, or where a link leads}."""
    paths = [p for p in Path(path).rglob("*") if p.is_symlink() or p.is_file()]
    return {p: os.readlink(p) if p.is_symlink() else p.read_bytes() for p in paths}


def test_only_what_is_ours_is_replaced(tmp_path):
    """X.old and X.tmp of others, a stranger's file in X, links for each of them: refused, and nothing is changed."""
    s = settings(tmp_path, dataset=write_jsonl(tmp_path / "t.jsonl", texts(100)), overwrite=True)
    final, thesis = Path(prepare(s)), tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "meta.json").write_text('{"splits": {}}')
    for suffix in (".old", ".tmp", ""):
        place = final.with_name(final.name + suffix)
        if not suffix:
            os.rename(final, tmp_path / "data" / "kept")
        for put, clear in (
            (lambda p=place: os.symlink(thesis, p), os.remove),
            (lambda p=place: (p.mkdir(), (p / "train_000000.bin").write_text("x")), shutil.rmtree),
            (lambda p=place: (p.mkdir(), (p / "meta.json").write_text('{"splits": {}}')), shutil.rmtree),
            (lambda p=place: p.write_text("x"), os.remove),
        ):
            put()
            before = whole(tmp_path)
            with pytest.raises(NotOurs, match=str(place)):
                prepare(s)
            assert whole(tmp_path) == before
            clear(place)
    os.rename(tmp_path / "data" / "kept", final)
    for name in ("notes.txt", "sub/notes.txt"):
        (final / name).parent.mkdir(exist_ok=True)
        (final / name).write_text("x")
        with pytest.raises(NotOurs, match="which is not ours"):
            prepare(s)
        (final / name).unlink()
    (final / "sub").rmdir()
    os.remove(final / ".made_by_mhc")  # as from before there were marks: known by its meta.json
    assert prepare(s) == str(final) and os.listdir(tmp_path / "data") == ["t_bytes"]


def test_no_validation_text(tmp_path):
    s = settings(tmp_path, dataset=write_jsonl(tmp_path / "t.jsonl", ["same"] * 10))
    with pytest.raises(DataError, match="no text for train"):
        prepare(s)
    assert os.listdir(tmp_path / "data") == []


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_full_disk_leaves_nothing(tmp_path, capsys):
    """The operating system refuses to let any file grow beyond 50 kB, as a full disk would."""
    import resource

    s = settings(tmp_path, dataset=write_jsonl(tmp_path / "t.jsonl", texts(1000)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        assert main(s) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path / "data") == []
    assert main(s) == 0


@pytest.mark.parametrize("blocked", ["data", "data/t_bytes.tmp/sub/x"])
def test_a_file_in_the_way_is_one_line(tmp_path, capsys, blocked):
    """A file where a folder is wanted; a folder within the unfinished corpus."""
    (tmp_path / blocked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / blocked).write_text("")
    assert main(settings(tmp_path, dataset=write_jsonl(tmp_path / "t.jsonl", texts(100)))) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path / 'data'}") and err.count("\n") == 1


def test_room_is_looked_at_first(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="1000000000000000 tokens take 2000000000000000 bytes"):
        prepare(settings(tmp_path, dataset="c4", tokens=1e15))


def start(tmp_path, source):
    command = [
        sys.executable,
        "prepare_data.py",
        f"--dataset={source}",
        "--tokenizer=bytes",
        f"--data_root={tmp_path / 'data'}",
    ]
    # a shell's background job ignores Ctrl-C, and would hand that down
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    )
    shard, deadline = tmp_path / "data" / "big_bytes.tmp" / "train_000000.bin", time.time() + 20
    while time.time() < deadline and process.poll() is None and not shard.exists():
        time.sleep(0.005)
    assert shard.exists()
    return process


def test_ctrl_c_and_kill(tmp_path):
    """Ctrl-C leaves nothing; after kill -9 the same command makes the corpus."""
    source = tmp_path / "big.txt"
    source.write_text("<|endoftext|>".join(texts(20_000) * 3))  # long enough for a signal to find it at work
    process = start(tmp_path, source)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err and "interrupted" in err
    assert os.listdir(tmp_path / "data") == []
    process = start(tmp_path, source)
    with pytest.raises(DataError, match="another process is writing this corpus"):
        prepare(settings(tmp_path, dataset=source))
    process.kill()
    process.communicate(timeout=20)
    assert os.listdir(tmp_path / "data") == ["big_bytes.tmp"]
    folder = prepare(settings(tmp_path, dataset=source))
    assert os.listdir(tmp_path / "data") == ["big_bytes"]
    assert Corpus(folder, "train", 16).meta["splits"]["train"]["documents"] > 17_000


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--tokens=0"], 2, "tokens=0: wanted a number above 0"),
        (["--val_fraction=1.5"], 2, "val_fraction=1.5: wanted"),
        (["--tokeniser=gpt2"], 2, "did you mean tokenizer?"),
        (["--dataset=nosuch"], 1, "wanted python, shakespeare, c4, fineweb10b, eval, or a file or folder"),
        (["--tokenizer=bpe"], 1, "unknown tokenizer 'bpe'"),
        (["--dataset=eval", "--tasks=mmlu,chess"], 1, "unknown task chess: wanted arc_easy, bbh"),
        (["--dataset=eval", "--tokens=5"], 2, "tokens=5: not used with dataset=eval"),
        (["--dataset=c4", "--tokens=5", "--val_fraction=0.5"], 2, "val_fraction=0.5: not used with dataset=c4"),
        (["--tasks=mmlu"], 2, "tasks='mmlu': not used with dataset=python"),
        (["--tokenizer=bytes", "--bpe_train_mb=1"], 2, "bpe_train_mb=1.0: not used with"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, flags, code, message):
    command = [sys.executable, str(ROOT / "prepare_data.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and message in done.stderr and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
