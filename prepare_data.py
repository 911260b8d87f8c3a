"""Make a corpus: fetch text, tokenise it, write shards and meta.json that train.py and eval.py read (see data.py).

    python prepare_data.py                                                  # Python's own library, no network
    python prepare_data.py --dataset=shakespeare --tokenizer=bytes
    python prepare_data.py --dataset=c4 --tokenizer=cl100k_base --tokens=1e9
    python prepare_data.py --dataset=fineweb10b --tokenizer=gpt2 --tokens=1e9
    python prepare_data.py --dataset=path/to/folder --tokenizer=gpt2        # .txt, .jsonl, each also .gz
    python prepare_data.py --dataset=eval                                   # the tasks of eval.py (see evals/fetch.py)

The corpus appears at data/<dataset>_<tokenizer>/ when it is whole and not before: it is written beside it and renamed.
Running the same command again finds it complete. Documents are whole in either train or val, and each is ended by
<|endoftext|>. Which documents are val depends on their content alone, so it changes with neither order nor machine.
"""

import program

if __name__ == "__main__":
    program.begin()  # before anything that takes long to import

import contextlib
import os
import shutil
import sys
import time

from tqdm import tqdm

import owned
from configurator import above, between, configure, fail, some
from corpora import parts, text_sha256
from data import DataError, ends_sha256, read_meta, sha256_file, shard_header, token_dtype
from download import DownloadError
from evals.fetch import prepare_eval
from owned import NotOurs, sync_folder, write_json
from records import Missing, RecordError, anything, each, integer, number, read_json, sha256, string
from tokenizer import make_tokenizer, read_tokenizer, save_tokenizer, token_lengths

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
mirror = ""  # fetch https://host/path from <mirror>/host/path instead
eval_dir = ""  # where dataset=eval puts the tasks; "": <data_root>/eval
tasks = "all"  # for dataset=eval: all, small, or names separated by commas

DEFAULTS = dict(globals())  # before configure() changes them
EVAL_ONLY = ["tasks", "eval_dir"]
IGNORED = {  # settings that a dataset does not use; changing one is a mistake
    "python": [*EVAL_ONLY, "text_key"],
    "shakespeare": [*EVAL_ONLY, "text_key"],
    "c4": [*EVAL_ONLY, "text_key", "val_fraction"],
    "fineweb10b": [*EVAL_ONLY, "text_key", "val_fraction", "bpe_train_mb", "workers"],
    "eval": [
        "data_dir",
        "tokenizer",
        "tokens",
        "val_tokens",
        "val_fraction",
        "overwrite",
        "bpe_train_mb",
        "shard_tokens",
        "workers",
        "text_key",
    ],
}
RULES = {
    **dict.fromkeys(("dataset", "tokenizer", "tasks", "text_key"), some("a name")), "data_root": some("a folder"),
    "tokens": (lambda v: v == -1 or 0 < v <= 1e15, "a number above 0 and at most 1e15, or -1 for all"),
    "val_tokens": (lambda v: v == -1 or 0 < v <= 1e15, "a number above 0 and at most 1e15, or -1 for no limit"),
    "val_fraction": (lambda v: v == -1 or 0 < v < 1, "a fraction between 0 and 1, or -1 for the default"),
    "bpe_train_mb": above(0, 10**6),
    "shard_tokens": between(1, 2**31 - 1),
    "workers": (lambda v: v == -1 or 0 < v <= 1024, "a number above 0 and at most 1024, or -1 for all cores"),
}  # fmt: skip

SPLIT = {
    "tokens": integer(0), "bytes": integer(0), "documents": integer(0), "bytes_per_token": number(0),
    "files": [{"name": string(1, 100), "tokens": integer(0), "sha256": sha256}],
}  # fmt: skip
JOURNAL = {  # of an unfinished corpus: what of it is done
    "settings": each(anything), "parts": [string()], "sources": [each(anything)], "splits": each(SPLIT),
}  # fmt: skip

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

    def write(self, ids):
        """Append tokens up to the limit; returns how many."""
        if self.limit != -1:
            ids = ids[: self.limit - self.tokens]
        self.tokens += len(ids)
        self.bytes += int(self.lengths[ids].sum())
        self.documents += int((ids == self.eot).sum())
        n = len(ids)
        while len(ids):
            if self.file is None:
                self.open_shard()
            room = self.shard_tokens - self.in_shard
            self.file.write(ids[:room].astype(self.dtype).tobytes())
            self.in_shard += min(room, len(ids))
            ids = ids[room:]
            if self.in_shard == self.shard_tokens:
                self.close_shard()
        return n

    def open_shard(self):
        self.name, self.in_shard = f"{self.split}_{len(self.files):06d}.bin", 0
        owned.check_file(path := os.path.join(self.folder, self.name))
        self.file = open(path, "wb")
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
        self.files.append(
            {"name": self.name, "tokens": self.in_shard, "sha256": sha256_file(path), "ends_sha256": ends_sha256(path)}
        )

    def info(self):
        """The split's entry in meta.json."""
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "bytes_per_token": self.bytes / max(self.tokens, 1),
            "files": self.files,
        }

    def restore(self, info):
        """Continue after the shards an interrupted run had finished."""
        self.tokens, self.bytes, self.documents = info["tokens"], info["bytes"], info["documents"]
        self.files = info["files"]


def write_parts(folder, s, enc, todo, journal):
    """Write the parts into `folder`. After each, the shards are closed and the journal on the disk says so."""
    limits = {"train": s["tokens"], "val": s["val_tokens"]}
    writers = {k: SplitWriter(folder, k, enc, limit, s["shard_tokens"]) for k, limit in limits.items()}
    for k, w in writers.items():
        if k in journal["splits"]:
            w.restore(journal["splits"][k])
    n_threads = os.cpu_count() if s["workers"] == -1 else s["workers"]
    started, before = time.time(), sum(w.bytes for w in writers.values())
    limit = None if s["tokens"] == -1 else s["tokens"]
    with tqdm(total=limit, initial=writers["train"].tokens, desc="tokens", unit_scale=True, disable=None) as bar:
        for part in todo:
            if part.name in journal["parts"] or all(writers[k].full for k in part.splits):
                continue
            with contextlib.closing(part.encoded(enc, n_threads)) as stream:
                for split, ids in stream:
                    n = writers[split].write(ids)
                    bar.update(n if split == "train" else 0)
                    if all(writers[k].full for k in part.splits) or writers["train"].full:
                        break
            for w in writers.values():
                w.close_shard()
            journal["parts"].append(part.name)
            journal["sources"] += part.record()
            journal["splits"] = {k: w.info() for k, w in writers.items()}
            write_json(os.path.join(folder, "journal.json"), journal)
    seconds, n_bytes = time.time() - started, sum(w.bytes for w in writers.values()) - before
    print(
        f"tokenised {n_bytes / 1e6:.1f} MB of text in {seconds:.1f} s: {n_bytes / 1e6 / seconds:.1f} MB/s "
        f"on {n_threads} threads"
    )
    return {k: w.info() for k, w in writers.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The whole

IDENTITY_OF_OLD = {"dataset", "tokenizer", "tokens", "val_tokens", "val_fraction"}
IDENTITY = "dataset tokenizer tokens val_tokens val_fraction bpe_train_mb shard_tokens text_key".split()


def prepare(s):
    """Make the corpus that the settings s (a dict) describe; returns its folder. Raises DataError, DownloadError."""
    s = s | {
        "val_fraction": s["val_fraction"] if s["val_fraction"] != -1 else 0.1 if s["dataset"] == "shakespeare" else 0.02
    }
    todo = parts(s)
    name = f"{short_name(s['dataset'])}_{s['tokenizer']}"
    final = os.path.normpath(s["data_dir"] or os.path.join(s["data_root"], name))
    identity = {k: s[k] for k in IDENTITY} | {"text_sha256": text_sha256(s["dataset"])}
    folder = final + ".tmp"
    refuse_foreign(final, s["overwrite"])
    if not s["overwrite"] and is_complete(final, identity):
        print(f"{final}: complete already, made with these settings; nothing to do")
        return final
    owned.check_removable(final + ".old", "corpus", is_corpus)  # of a run that was killed while it replaced one
    owned.check_removable(folder, "corpus", is_unfinished)  # or while it wrote one
    check_room(s, final)
    owned.make(folder, "corpus", is_unfinished)
    with sole_writer(folder):
        write_corpus(folder, s, identity, todo)
        put_in_place(folder, final)
    report(final)
    return final


def short_name(dataset):
    """The dataset's name within the corpus's: for a path, its last part without the endings."""
    return os.path.basename(os.path.normpath(dataset)).split(".")[0] or "text"


def refuse_foreign(final, overwrite):
    """Raise NotOurs if what stands in the corpus's place is not ours to replace, or holds what is not."""
    if not os.path.lexists(final):
        owned.check_place(final)
    elif overwrite:
        owned.check_removable(final, "corpus", is_corpus)
    elif not is_corpus(final) and not (owned.is_folder(final) and not os.listdir(final)):
        raise NotOurs(f"{final}: is there and is no prepared corpus; choose another --data_dir=")


def is_corpus(folder):
    """Whether a folder without our mark is a corpus of before there were marks: its meta.json is wholly one of ours."""
    try:
        meta = read_meta(folder)
    except DataError:
        return owned.what_is(folder) == "corpus"
    return IDENTITY_OF_OLD <= meta.get("settings", {}).keys() and "tokenizer_sha256" in meta


def is_unfinished(folder):
    """Whether a folder without our mark is what an interrupted run of before there were marks has left."""
    try:
        read_json(os.path.join(folder, "journal.json"), JOURNAL)
    except RecordError:
        return False
    return True


def is_complete(final, identity):
    """Whether a corpus of these settings is there and whole. Raises DataError if it is another or a damaged one."""
    if not os.path.lexists(final) or not os.listdir(final):
        return False
    meta = read_meta(final)
    has = meta.get("settings", {})
    other = [f"{k}: it has {has.get(k)!r}, wanted {v!r}" for k, v in identity.items() if has.get(k) != v]
    if other:
        raise DataError(
            f"{final}: holds a corpus made with other settings ({'; '.join(other)}); "
            "use --overwrite=True, or another --data_dir="
        )
    wanted = {f["name"]: f["sha256"] for info in meta["splits"].values() for f in info["files"]}
    for name, digest in (wanted | {meta["tokenizer_file"]: meta["tokenizer_sha256"]}).items():
        path = os.path.join(final, name)
        if not os.path.exists(path) or sha256_file(path) != digest:
            raise DataError(
                f"{path}: missing, or altered since it was written; use --overwrite=True to make the corpus anew"
            )
    return True


def check_room(s, final):
    """Refuse to begin what cannot fit on the disk, where the number of tokens is known."""
    parent = os.path.dirname(final) or "."
    os.makedirs(parent, exist_ok=True)
    wanted = max(s["tokens"], 0) * (4 if s["tokenizer"].startswith(("cl100k", "o200k")) else 2)
    free = shutil.disk_usage(parent).free
    if s["dataset"] in ("c4", "fineweb10b") and wanted > free:
        raise DataError(
            f"{parent}: {s['tokens']} tokens take {wanted} bytes, {free} are free; "
            "ask for fewer --tokens= or name another --data_root="
        )


@contextlib.contextmanager
def sole_writer(folder):
    """Hold the unfinished corpus against a second process that would write the same one."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise DataError(f"{folder}: another process is writing this corpus; wait for it") from None
    try:
        yield
    finally:
        os.close(fd)


def write_corpus(folder, s, identity, todo):
    """Write the corpus into `folder`, continuing what an interrupted run with the same settings finished there.

    If it fails, parts that were finished stay for the next run; a folder in which none was is removed.
    """
    journal = {"settings": identity, "parts": [], "sources": [], "splits": {}}
    with contextlib.suppress(Missing):
        before = read_json(os.path.join(folder, "journal.json"), JOURNAL)
        journal = before if before["settings"] == identity else journal
    clean(folder, journal)
    if journal["parts"]:
        print(f"{folder}: continuing after {len(journal['parts'])} finished parts")
    try:
        enc = tokenizer_of(folder, s, todo)
        splits = write_parts(folder, s, enc, todo, journal)
        check_splits(s, splits, journal)
        write_meta(folder, s, identity, enc, splits, journal["sources"])
    except BaseException as e:  # Ctrl-C too; all of them go on upwards
        clean(folder, journal)
        if not journal["parts"]:
            owned.remove(folder, "corpus")
        if isinstance(e, OSError):
            raise DataError(
                f"{folder}: not finished: {e}; nothing half-written was left behind "
                "(disk full? make room or name another --data_root=)"
            ) from e
        raise


def clean(folder, journal):
    """Remove whatever of ours an interrupted run left unfinished."""
    keep = {f["name"] for info in journal["splits"].values() for f in info["files"]} | {owned.MARK}
    keep |= {"journal.json", "tokenizer.json"} if journal["parts"] else set()
    for name in set(os.listdir(folder)) - keep:
        if owned.is_ours(path := os.path.join(folder, name), "corpus", name) and not os.path.isdir(path):
            os.remove(path)


def tokenizer_of(folder, s, todo):
    """The tokenizer, kept in the folder; a bpe<size> is trained on the first bpe_train_mb of training text."""
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
        train = next(p for p in todo if "train" in p.splits)
        save_tokenizer(make_tokenizer(s["tokenizer"], sample(train, s["bpe_train_mb"] * 1e6), s["mirror"]), path)
    return read_tokenizer(path)


def sample(part, n_chars):
    """Training text of a part, until it is n_chars long."""
    with contextlib.closing(part.documents()) as documents:
        for split, text in documents:
            if split == "train":
                yield text
                n_chars -= len(text)
                if n_chars <= 0:
                    return


def check_splits(s, splits, journal):
    """A corpus needs both splits, else nothing of it is worth keeping; fewer tokens than asked for are worth a line."""
    for split, info in splits.items():
        if not info["tokens"]:
            journal.update(parts=[], splits={})
            raise DataError(
                f"{s['dataset']}: no text for {split}: there are too few documents for val_fraction="
                f"{s['val_fraction']} and tokens={s['tokens']}; name larger ones"
            )
    if splits["train"]["tokens"] < s["tokens"]:
        print(f"note: {s['tokens']:,} training tokens were asked for, but that is all of {s['dataset']}")


def write_meta(folder, s, identity, enc, splits, sources):
    """meta.json, the last file of a corpus."""
    write_json(
        os.path.join(folder, "meta.json"),
        {
            "format": 1,
            "dataset": s["dataset"],
            "tokenizer": s["tokenizer"],
            "vocab_size": enc.n_vocab,
            "eot": enc.eot_token,
            "dtype": token_dtype(enc.n_vocab).name,
            "tokenizer_file": "tokenizer.json",
            "tokenizer_sha256": sha256_file(os.path.join(folder, "tokenizer.json")),
            "bytes_per_token": {k: v["bytes_per_token"] for k, v in splits.items()},
            "splits": splits,
            "sources": sources,
            "settings": identity,
        },
    )
    os.remove(os.path.join(folder, "journal.json"))


def put_in_place(folder, final):
    """Rename the finished folder; a corpus that stood there goes only then."""
    sync_folder(folder)
    old = final + ".old"
    if os.path.lexists(final):
        owned.check_removable(final, "corpus", is_corpus)  # it took a while: somebody may have come in between
        owned.check_removable(old, "corpus", is_corpus)
        owned.remove(old, "corpus")
        os.rename(final, old)
    os.rename(folder, final)
    sync_folder(os.path.dirname(final) or ".")
    if os.path.lexists(old):
        owned.remove(old, "corpus")


def report(final):
    meta = read_meta(final)
    for split, v in meta["splits"].items():
        print(
            f"{final}: {split}: {v['tokens']:,} tokens in {v['documents']:,} documents, "
            f"{v['bytes_per_token']:.3f} bytes a token, vocabulary {meta['vocab_size']}"
        )


def main(s):
    """The command: exit code 0, 1 after an error, 2 if what is in the way is not ours (one line), 130 after Ctrl-C."""
    try:
        if s["dataset"] == "eval":
            prepare_eval(
                s["eval_dir"] or os.path.join(s["data_root"], "eval"),
                os.path.join(s["data_root"], "download"),
                s["tasks"].split(","),
                s["mirror"],
            )
        else:
            prepare(s)
    except (DataError, DownloadError, NotOurs, RecordError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, NotOurs) else 1
    except OSError as e:  # a file that cannot be written or read: its name and the system's reason
        print(f"error: {e.filename or s['data_root']}: {e.strerror or e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as e:
        print("interrupted; nothing unfinished was left behind", file=sys.stderr)
        return getattr(e, "code", 130)
    return 0


def refuse_ignored(s):
    """End the program if a setting was changed that this dataset does not use."""
    no_bpe = [] if s["tokenizer"].startswith("bpe") else ["bpe_train_mb"]
    for name in IGNORED.get(s["dataset"], EVAL_ONLY) + no_bpe:
        if s[name] != DEFAULTS[name]:
            fail(f"{name}={s[name]!r}: not used with dataset={s['dataset']}, tokenizer={s['tokenizer']}; leave it out")


def command():
    config = configure(globals(), RULES)
    refuse_ignored(config)
    sys.exit(main(config))


if __name__ == "__main__":
    program.run(command)
