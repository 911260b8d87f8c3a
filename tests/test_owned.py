"""owned.py: only what we made and marked is deleted, moved or overwritten; a file is whole or not there."""

import errno
import fcntl
import os
import resource
import signal
import sys

import pytest

import owned
from owned import MARK, NotOurs, check_file, make, remove, whole_file


def tree(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_taken_if_none_of_our_names_is_in_it(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    make(tmp_path, "run")
    make(tmp_path, "run")  # it is ours by now
    assert owned.what_is(tmp_path) == "run" and tree(tmp_path) == [MARK, "notes.txt"]
    with pytest.raises(NotOurs, match="holds a run, not a corpus"):
        make(tmp_path, "corpus")


@pytest.mark.parametrize("name", ["metrics.jsonl", "latest", ".tmp-step-00000001", "step-00000001", ".lock"])
def test_a_folder_with_one_of_our_names_is_not_taken_unless_it_is_recognised(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(NotOurs, match=f"holds {name}, which is not known to be ours"):
        make(tmp_path, "run")
    assert tree(tmp_path) == [name]
    make(tmp_path, "run", recognise=lambda folder: True)
    assert owned.what_is(tmp_path) == "run"


def test_a_mark_that_is_a_link_or_says_something_else_is_none(tmp_path):
    make(tmp_path / "ours", "run")
    os.symlink(tmp_path / "ours" / MARK, tmp_path / MARK)
    assert owned.what_is(tmp_path) is None
    os.remove(tmp_path / MARK)
    for content in ("", "run", '{"made_by": "mhc", "what": "thesis"}', '{"made_by": "x", "what": "run"}'):
        (tmp_path / MARK).write_text(content)
        assert owned.what_is(tmp_path) is None


def test_removing_leaves_strangers_and_what_links_lead_to(tmp_path):
    folder, thesis = tmp_path / "corpus", tmp_path / "thesis"
    make(folder, "corpus")
    thesis.mkdir()
    (thesis / "meta.json").write_text("x")
    for name in ("meta.json", "train_000000.bin"):
        (folder / name).write_text("x")
    assert owned.strangers(folder, "corpus") == []
    os.symlink(thesis / "meta.json", folder / "tokenizer.json")  # our name, but no file of ours
    os.symlink(thesis, folder / "val_000000.bin")
    (folder / "notes").mkdir()
    (folder / "notes" / "meta.json").write_text("x")  # our name at another place
    theirs = ["notes", "notes/meta.json", "tokenizer.json", "val_000000.bin"]
    assert sorted(owned.strangers(folder, "corpus")) == theirs
    with pytest.raises(NotOurs, match="which is not ours"):
        owned.check_removable(folder, "corpus")
    assert sorted(remove(folder, "corpus")) == theirs and tree(folder) == theirs
    assert (thesis / "meta.json").read_text() == "x"
    assert remove(tmp_path / "nowhere", "corpus") == []
    os.symlink(thesis, tmp_path / "link")
    for use in (remove, owned.check_removable):
        with pytest.raises(NotOurs, match="is a link, not a folder of ours"):
            use(tmp_path / "link", "corpus")


def test_a_whole_run_is_removed_with_its_folder(tmp_path):
    make(tmp_path / "run", "run")
    for name in ("config.json", ".lock", "step-00000004/state.json", "broken-step-00000002-2/manifest.json"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("x")
    os.symlink("step-00000004", tmp_path / "run" / "latest")
    assert owned.strangers(tmp_path / "run", "run") == [] == remove(tmp_path / "run", "run") and tree(tmp_path) == []


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["nameless", "named", "no links"])
def way(request, monkeypatch):
    """With O_TMPFILE, as where the system has no such thing, and where such a file cannot get a name."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE")
    elif request.param == "no links":

        def link(*args, **more):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", link)
    return request.param


def test_a_file_is_whole_or_as_it_was(tmp_path, way):
    path = tmp_path / "x"
    for content in ("one", "two"):
        with whole_file(str(path)) as f:
            f.write(content)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == content and tree(tmp_path) == ["x"]
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole_file(str(path)) as f:
            f.write("three")
            raise error
        assert path.read_text() == "two" and tree(tmp_path) == ["x"]


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, way):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path / 'x'}'"):
            owned.write_json(str(tmp_path / "x"), ["y" * 2000])
        with open(tmp_path / "records", "ab", buffering=0) as f:
            owned.append(f, b"a" * 900)
            with pytest.raises(OSError, match="File too large"):
                owned.append(f, b"b" * 200)
            owned.append(f, b"c" * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert tree(tmp_path) == ["records"] and (tmp_path / "records").read_bytes() == b"a" * 900 + b"c" * 10


def test_only_a_regular_file_of_ours_is_replaced(tmp_path, way):
    thesis = tmp_path / "thesis"
    thesis.write_text("x")
    os.symlink(thesis, tmp_path / "link")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, named in (("link", "a link"), ("fifo", "a FIFO"), ("folder", "a folder"), ("thesis", "was not made by")):
        before = tree(tmp_path)
        with pytest.raises(NotOurs, match=f"{name}: is.*{named}"), whole_file(str(tmp_path / name), lambda path: False):
            pytest.fail("it was opened")
        assert tree(tmp_path) == before and thesis.read_text() == "x"
    with pytest.raises(NotOurs, match="is a device"):
        check_file("/dev/null")


def test_what_comes_in_between_is_not_overwritten(tmp_path, way):
    ours = lambda path: open(path).read() == "ours"  # noqa: E731
    with pytest.raises(NotOurs, match="was not made by this program"), whole_file(str(tmp_path / "x"), ours) as f:
        f.write("ours")
        (tmp_path / "x").write_text("theirs")
    assert (tmp_path / "x").read_text() == "theirs" and tree(tmp_path) == ["x"]


def test_what_a_killed_write_has_left_is_cleared_by_the_next(tmp_path, way):
    left = tmp_path / f"{MARK}.x"
    left.write_text("half")
    for content in ("one", "two"):
        with whole_file(str(tmp_path / "x")) as f:
            f.write(content)
    assert (tmp_path / "x").read_text() == "two" and tree(tmp_path) == ["x"]
    assert owned.is_name("run", f"step-00000001/{MARK}.state.json") and not owned.is_name("run", f"{MARK}.thesis")


def test_a_write_that_is_going_on_is_not_disturbed(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")
    with open(tmp_path / f"{MARK}.x", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process is writing this file"), whole_file(str(tmp_path / "x")):
            pytest.fail("it was opened")
    assert tree(tmp_path) == [f"{MARK}.x"]


@pytest.mark.skipif(sys.platform != "linux", reason="O_TMPFILE")
def test_a_kill_leaves_nothing_of_a_nameless_file(tmp_path):
    child = os.fork()
    if child == 0:
        with whole_file(str(tmp_path / "x")) as f:
            f.write("half")
            f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and tree(tmp_path) == []


def test_nothing_is_written_into_a_checkpoint(tmp_path):
    step = tmp_path / "run" / "step-00000004"
    step.mkdir(parents=True)
    owned.check_place(step / "x")  # not yet: it has no manifest
    (step / "manifest.json").write_text("{}")
    os.symlink("step-00000004", tmp_path / "run" / "latest")
    for place in (step / "x", tmp_path / "run" / "latest" / "x", step / "a" / "b"):
        with pytest.raises(NotOurs, match="lies inside the checkpoint"):
            owned.check_place(place)
        with pytest.raises(NotOurs, match="lies inside the checkpoint"):
            make(place, "results")
    owned.check_place(tmp_path / "run" / "x")
