"""data.py: shards, sequences across them, damage, and the order of sequences."""

import hashlib
import itertools
import json
import time

import numpy as np
import pytest
import torch

import data
from data import HEADER_BYTES, Corpus, DataError, order, read_header, shard_header, token_dtype


def make_corpus(folder, tokens, cuts=(), vocab_size=1000):
    """A corpus whose split 'val' holds `tokens` in shards that end at `cuts`."""
    folder.mkdir(exist_ok=True)
    tokens, dtype, files = np.asarray(tokens), token_dtype(vocab_size), []
    for k, piece in enumerate(np.split(tokens, cuts)):
        content = shard_header(len(piece), dtype).tobytes() + piece.astype(dtype).tobytes()
        (folder / f"val_{k:06d}.bin").write_bytes(content)
        files.append({"name": f"val_{k:06d}.bin", "tokens": len(piece), "sha256": hashlib.sha256(content).hexdigest()})
    meta = {
        "vocab_size": vocab_size,
        "eot": vocab_size - 1,
        "splits": {"val": {"tokens": len(tokens), "bytes_per_token": 3.5, "files": files}},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Shards and sequences


@pytest.mark.parametrize(
    "vocab_size, dtype, magic, version",
    [
        (257, np.uint16, 20240520, 1),
        (65536, np.uint16, 20240520, 1),
        (65537, np.uint32, 20240801, 7),
        (129280, np.uint32, 20240801, 7),
    ],
)
def test_header(tmp_path, vocab_size, dtype, magic, version):
    assert token_dtype(vocab_size) == dtype
    header = shard_header(123, token_dtype(vocab_size))
    assert header.nbytes == HEADER_BYTES == 1024 and header.dtype == np.int32
    assert list(header[:3]) == [magic, version, 123] and not header[3:].any()
    path = tmp_path / "s.bin"
    path.write_bytes(header.tobytes() + np.arange(123).astype(dtype).tobytes())
    assert read_header(path) == (123, dtype)


@pytest.mark.parametrize("cuts", [(), (10,), (3, 4, 5), (16, 17, 50), (0, 99)])
@pytest.mark.parametrize("vocab_size", [1000, 100_000])
def test_sequences_are_the_split_in_order_whatever_the_shards(tmp_path, cuts, vocab_size):
    tokens = np.random.default_rng(0).integers(0, vocab_size, 100)
    c = Corpus(make_corpus(tmp_path / "c", tokens, cuts, vocab_size), "val", seq_len=8)
    assert (c.n_tokens, c.n_sequences, c.vocab_size, c.bytes_per_token) == (100, 12, vocab_size, 3.5)
    x, y = c.sequences(range(12))
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (12, 8)
    assert x.flatten().tolist() == tokens[:96].tolist()
    assert y.flatten().tolist() == tokens[1:97].tolist()
    x, y = c.sequences([7, 2, 7])
    assert x[0].equal(x[2]) and x[1].tolist() == tokens[16:24].tolist() and y[1].tolist() == tokens[17:25].tolist()
    assert c.sequences([])[0].shape == (0, 8)
    with pytest.raises(IndexError):
        c.sequences([12])
    with pytest.raises(IndexError):
        c.sequences([-1])


def test_the_last_target_needs_a_token(tmp_path):
    assert Corpus(make_corpus(tmp_path / "a", range(17)), "val", 8).n_sequences == 2
    assert Corpus(make_corpus(tmp_path / "b", range(16)), "val", 8).n_sequences == 1


def test_split_smaller_than_a_sequence(tmp_path):
    folder = make_corpus(tmp_path / "c", range(8))
    assert Corpus(folder, "val", 7).n_sequences == 1
    with pytest.raises(DataError, match="has 8 tokens, but one sequence of seq_len=8 needs 9"):
        Corpus(folder, "val", 8)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(DataError, match="no prepared corpus here.*prepare_data.py"):
        Corpus(str(tmp_path), "val", 8)
    for content in (b"{", b"\xff", b"[]"):
        (tmp_path / "meta.json").write_bytes(content)
        with pytest.raises(DataError, match="meta.json: .*prepare the data again"):
            Corpus(str(tmp_path), "val", 8)
    folder = make_corpus(tmp_path / "c", range(100), (50,))
    with pytest.raises(DataError, match="no split 'train'; it has val"):
        Corpus(folder, "train", 8)
    (tmp_path / "c" / "val_000001.bin").unlink()
    with pytest.raises(DataError, match="val_000001.bin.*not there"):
        Corpus(folder, "val", 8)


@pytest.mark.parametrize("spoil, message", [
    (lambda b: b[:-1], r"val_000001.bin: truncated: its header says 50 tokens, so wanted 1124 bytes, got 1123"),
    (lambda b: b + b"xy", r"val_000001.bin: too long: .*wanted 1124 bytes, got 1126"),
    (lambda b: b[:100], r"val_000001.bin: truncated: wanted a header of 1024 bytes, got 100"),
    (lambda b: b"\0" * 4 + b[4:], r"val_000001.bin: not a token shard: wanted magic 20240520 .*got 0 version 1"),
    (lambda b: b[:4] + b"\7" + b[5:], r"val_000001.bin: not a token shard: .*got 20240520 version 7"),
    (lambda b: shard_header(49, token_dtype(9)).tobytes() + b[1024:-2], r"meta.json says 50 tokens .*its header 49"),
    (lambda b: shard_header(50, token_dtype(70000)).tobytes() + b[1024:] * 2, r"50 tokens of uint16, .* of uint32"),
])  # fmt: skip
def test_damaged_shard(tmp_path, spoil, message):
    folder = make_corpus(tmp_path / "c", range(100), (50,))
    path = tmp_path / "c" / "val_000001.bin"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        Corpus(folder, "val", 8)


def test_token_outside_the_vocabulary(tmp_path):
    c = Corpus(make_corpus(tmp_path / "c", [*range(50), 1000, *range(50)]), "val", 8)
    c.sequences([0])
    with pytest.raises(DataError, match="holds token 1000, but its vocabulary has 1000"):
        c.sequences([6])


def test_verify_and_fingerprint(tmp_path):
    folder = make_corpus(tmp_path / "c", range(100), (50,))
    c = Corpus(folder, "val", 8)
    c.verify()
    assert c.fingerprint == Corpus(folder, "val", 16).fingerprint
    assert c.fingerprint != Corpus(make_corpus(tmp_path / "d", [1, *range(1, 100)], (50,)), "val", 8).fingerprint
    path = tmp_path / "c" / "val_000001.bin"
    flipped = bytearray(path.read_bytes())
    flipped[1024 + 33] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(DataError, match="val_000001.bin: altered"):
        c.verify()


# ----------------------------------------------------------------------------------------------------------------------
# Order


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 101, 1000, 4097])
def test_each_epoch_is_a_permutation(n):
    ids = order(7, 0, 4 * n, n).reshape(4, n)
    assert ids.dtype == np.int64
    assert (np.sort(ids, axis=1) == np.arange(n)).all()
    if n > 60:
        for a, b in itertools.combinations([np.arange(n), *ids, *order(8, 0, 2 * n, n).reshape(2, n)], 2):
            assert (a == b).mean() < 0.1  # epochs and seeds differ, from one another and from the unshuffled order


@pytest.mark.parametrize("n", [1, 3, 7, 100, 2**33 + 7])
def test_any_slice_is_the_same_stream(n):
    whole = order(3, 0, 100, n)
    assert (whole[40:60] == order(3, 40, 20, n)).all()
    assert (whole == np.concatenate([order(3, s * 7, 7, n) for s in range(15)])[:100]).all()
    assert len(order(3, 5, 0, n)) == 0


def test_order_is_frozen():
    """A run resumed with another version of this file must see the same sequences."""
    assert order(1337, 0, 12, 10).tolist() == FROZEN
    assert order(-1, 2**40, 3, 2**33 + 7).tolist() == FROZEN_LARGE


def test_it_looks_random():
    n = 20_000
    ids = order(0, 0, 2 * n, n).astype(float)
    first, second = ids[:n], ids[n:]
    for a, b in [(first, np.arange(n)), (first, second), (first[1:], first[:-1]), (first, order(1, 0, n, n))]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.04  # 5 standard deviations of chance
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[np.arange(5), order(seed, 0, 5, 5)] += 1
    assert abs(counts / 2000 - 1 / 5).max() < 0.045  # every place sees every sequence equally often


def test_large_corpora_and_places_are_quick():
    began = time.time()
    ids = order(5, 10**12, 100_000, 2**31 + 11)
    assert time.time() - began < 2
    assert len(set(ids.tolist())) == 100_000 and 0 <= ids.min() and 2**30 < ids.max() < 2**31 + 11


def test_order_refuses_nonsense():
    for arguments in [(0, 0, 1, 0), (0, -1, 1, 5), (0, 0, -1, 5)]:
        with pytest.raises(ValueError, match="n_sequences >= 1, start >= 0 and count >= 0"):
            order(*arguments)


def test_the_format_needs_no_torch():
    """prepare_data.py runs where torch is not installed."""
    assert "torch" not in vars(data)


FROZEN = [1, 6, 5, 4, 0, 9, 8, 3, 7, 2, 5, 8]
FROZEN_LARGE = [5150447173, 7457697303, 1211647937]
