"""download.py against a local server that breaks off, stalls, errs, ignores ranges, lies and changes its files."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import download as dl
from download import Changed, DownloadError, Stream, download
from owned import NotOurs, write_json
from records import integer
from tests.http_server import becomes, broken, serving, stalled, status

CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(dl, "BACKOFF", 0.001)
    monkeypatch.setattr(dl, "TIMEOUT", 5.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as s:
        yield s


def get(server, tmp_path, file="/f.bin", **known):
    """Download; the file as it lies on the disk."""
    path = tmp_path / "f.bin"
    record = download(server.url + file, str(path), **known)
    data = path.read_bytes()
    assert record["bytes"] == len(data) and record["sha256"] == hashlib.sha256(data).hexdigest()
    assert sorted(os.listdir(tmp_path)) == ["f.bin", "f.bin.json"]  # nothing temporary is left
    return data


def ranges(file):
    return [request.get("Range") for request in file.requests]


def test_plain_then_not_again(server, tmp_path):
    file = server.add("/f.bin", CONTENT)
    assert get(server, tmp_path) == CONTENT
    assert get(server, tmp_path) == CONTENT
    assert len(file.requests) == 1
    assert file.requests[0]["Accept-Encoding"] == "identity"


def test_altered_or_truncated_file_is_refused_until_it_is_moved_away(server, tmp_path):
    """It is not what we made: somebody may want it."""
    file = server.add("/f.bin", CONTENT)
    for spoilt in (CONTENT[:-1], CONTENT[:1000] + b"x" + CONTENT[1001:]):
        get(server, tmp_path)
        (tmp_path / "f.bin").write_bytes(spoilt)
        with pytest.raises(NotOurs, match="f.bin: is there and was not made by this program, or altered since"):
            get(server, tmp_path)
        assert (tmp_path / "f.bin").read_bytes() == spoilt
        os.remove(tmp_path / "f.bin")
    assert get(server, tmp_path) == CONTENT and len(file.requests) == 3


def test_a_file_of_ours_from_another_address_is_replaced(server, tmp_path):
    server.add("/f.bin", CONTENT)
    server.add("/g.bin", OTHER)
    get(server, tmp_path)
    assert get(server, tmp_path, "/g.bin") == OTHER


@pytest.mark.parametrize("name", ["f.bin", "f.bin.part"])
def test_links_and_folders_in_the_way_are_refused(server, tmp_path, name):
    server.add("/f.bin", CONTENT)
    (tmp_path / "thesis").write_text("x")
    os.symlink("thesis", tmp_path / name)
    with pytest.raises(NotOurs, match="is a link"):
        download(server.url + "/f.bin", str(tmp_path / "f.bin"))
    os.remove(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(NotOurs, match="is a folder"):
        download(server.url + "/f.bin", str(tmp_path / "f.bin"))
    assert (tmp_path / "thesis").read_text() == "x"


def test_file_without_record_is_only_trusted_with_a_known_sha256(server, tmp_path):
    file = server.add("/f.bin", CONTENT)
    (tmp_path / "f.bin").write_bytes(CONTENT)
    assert download(server.url + "/f.bin", str(tmp_path / "f.bin"), sha256=SHA256)["sha256"] == SHA256
    assert not file.requests
    (tmp_path / "f.bin").write_bytes(OTHER)
    for known in ({}, {"sha256": SHA256}):
        with pytest.raises(NotOurs, match="f.bin: is there and was not made by this program"):
            download(server.url + "/f.bin", str(tmp_path / "f.bin"), **known)
    assert not file.requests and (tmp_path / "f.bin").read_bytes() == OTHER


def test_broken_connection_is_continued_by_range(server, tmp_path):
    file = server.add("/f.bin", CONTENT, faults=[broken(100_000), broken(0), broken(70_000)])
    assert get(server, tmp_path, size=len(CONTENT), sha256=SHA256) == CONTENT
    starts = [int(r[6:-1]) for r in ranges(file)[1:]]
    assert ranges(file)[0] is None and 0 < starts[0] == starts[1] < starts[2]
    assert all(request["If-Range"] == '"v1"' for request in file.requests[1:])


@pytest.mark.parametrize("how", [{"ranges": False}, {"etag": ""}, {"etag": 'W/"weak"'}])
def test_without_ranges_or_a_strong_etag_it_is_read_again_and_compared(server, tmp_path, how):
    file = server.add("/f.bin", CONTENT, faults=[broken(100_000), broken(150_000)], **how)
    assert get(server, tmp_path) == CONTENT
    assert len(file.requests) == 3
    if "etag" in how:
        assert ranges(file) == [None] * 3


@pytest.mark.parametrize("etag", ['"v2"', '"v1"', ""])
@pytest.mark.parametrize("ranged", [True, False])
def test_changed_file_is_never_spliced(server, tmp_path, etag, ranged):
    """A new version between tries, with a new ETag, with none, and with the old one by mistake (then ranges cannot
    be told apart, and only a known sha256 helps)."""
    faults = [broken(100_000), becomes(OTHER, etag)]
    server.add("/f.bin", CONTENT, faults=faults, ranges=ranged)
    known = {"sha256": hashlib.sha256(OTHER).hexdigest()} if etag == '"v1"' else {}
    assert get(server, tmp_path, **known) == OTHER


def test_file_that_became_shorter(server, tmp_path):
    faults = [broken(100_000), becomes(CONTENT[:50_000], "")]
    server.add("/f.bin", CONTENT, length="chunked", ranges=False, faults=faults)
    assert get(server, tmp_path) == CONTENT[:50_000]


def test_stall(server, tmp_path, monkeypatch):
    monkeypatch.setattr(dl, "TIMEOUT", 0.3)
    release = threading.Event()
    file = server.add("/f.bin", CONTENT, faults=[stalled(100_000, release), stalled(0, release)])
    began = time.time()
    assert get(server, tmp_path) == CONTENT
    release.set()
    assert len(file.requests) == 3 and 0.6 < time.time() - began < 5


def test_500_429_and_retry_after(server, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(dl.time, "sleep", slept.append)
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    file = server.add(
        "/f.bin",
        CONTENT,
        faults=[status(500), status(503), status(429, Retry_After="7"), status(429, Retry_After=date)],
    )
    assert get(server, tmp_path) == CONTENT
    assert len(file.requests) == 5
    assert slept[:3] == [0.001, 0.002, 7.0] and 90 < slept[3] <= 100


def test_gives_up(server, tmp_path):
    server.add("/f.bin", CONTENT, faults=[status(500)] * 100)
    with pytest.raises(DownloadError, match=r"500 .*gave up after 9 tries"):
        get(server, tmp_path)
    server.add("/g.bin", CONTENT, faults=[status(429, Retry_After="100000")])
    with pytest.raises(DownloadError, match="asks to wait 100000 s"):
        get(server, tmp_path, "/g.bin")
    with pytest.raises(DownloadError, match="404 Not Found"):
        get(server, tmp_path, "/missing")
    assert not (tmp_path / "f.bin").exists()


def test_progress_renews_the_tries(server, tmp_path, monkeypatch):
    monkeypatch.setattr(dl, "RETRIES", 1)
    file = server.add("/f.bin", CONTENT, faults=[broken(70_000)] * 4)
    assert get(server, tmp_path) == CONTENT
    assert len(file.requests) == 5


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.setattr(dl, "BACKOFF", 0.001)
    with serving() as gone:
        pass
    with pytest.raises(DownloadError, match="connection refused; gave up after 3 tries"):
        download(gone.url + "/f.bin", str(tmp_path / "f.bin"))
    assert not (tmp_path / "f.bin").exists()


@pytest.mark.parametrize("length", [len(CONTENT) + 10, len(CONTENT) - 10])
@pytest.mark.parametrize("known", [{"size": len(CONTENT)}, {"sha256": SHA256}])
def test_lying_length(server, tmp_path, length, known):
    """Too long a Content-Length never completes; too short a one is seen by the known size or sha256."""
    server.add("/f.bin", CONTENT, length=length)
    with pytest.raises(DownloadError, match="wanted|connection|bytes"):
        get(server, tmp_path, **known)
    assert not (tmp_path / "f.bin").exists()


def test_length_that_promises_too_much(server, tmp_path):
    server.add("/f.bin", CONTENT, length=len(CONTENT) + 10)
    with pytest.raises(DownloadError):
        get(server, tmp_path)
    assert not (tmp_path / "f.bin").exists()


def test_no_length_at_all_is_refused(server, tmp_path):
    server.add("/f.bin", CONTENT, length=None, faults=[broken(1000)])
    with pytest.raises(DownloadError, match="without a length"):
        get(server, tmp_path)
    assert get(server, tmp_path, size=len(CONTENT)) == CONTENT


def test_chunked(server, tmp_path):
    file = server.add("/f.bin", CONTENT, length="chunked", faults=[broken(100_000)])
    assert get(server, tmp_path) == CONTENT
    assert len(file.requests) == 2


def test_compression_on_the_fly_is_refused_but_a_gz_file_is_not_unpacked(server, tmp_path):
    server.add("/f.bin", CONTENT, headers={"Content-Encoding": "gzip"})
    with pytest.raises(DownloadError, match="compressed on the fly"):
        get(server, tmp_path)
    server.add("/f.gz", CONTENT, headers={"Content-Encoding": "x-gzip"})
    assert get(server, tmp_path, "/f.gz") == CONTENT


def test_wrong_sha256_keeps_nothing(server, tmp_path):
    file = server.add("/f.bin", CONTENT)
    with pytest.raises(DownloadError, match=f"wanted sha256 {'0' * 64}, got {SHA256}"):
        get(server, tmp_path, sha256="0" * 64)
    assert os.listdir(tmp_path) == [] and len(file.requests) == 3


def test_sha256_named_by_a_redirect(server, tmp_path):
    """As Hugging Face does: the redirect names sha256 and size of the file it leads to."""
    linked = {"Location": "/real", "X-Linked-ETag": f'"{"0" * 64}"', "X-Linked-Size": str(len(CONTENT))}
    server.add("/f.bin", b"", faults=[status(302, **{k.replace("-", "_"): v for k, v in linked.items()})] * 3)
    server.add("/real", CONTENT)
    with pytest.raises(DownloadError, match="wanted sha256 0000"):
        get(server, tmp_path)
    linked["X-Linked-ETag"] = f'"{SHA256}"'
    server.add("/f.bin", b"", faults=[status(302, **{k.replace("-", "_"): v for k, v in linked.items()})] * 3)
    assert get(server, tmp_path) == CONTENT
    assert json.loads((tmp_path / "f.bin.json").read_text())["published_sha256"] is True


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def leave_part(server, tmp_path, monkeypatch):
    """Let a download fail in the middle; returns the server's file with no faults left."""
    monkeypatch.setattr(dl, "RETRIES", 0)
    file = server.add("/f.bin", CONTENT, faults=[broken(200_000)])
    with pytest.raises(DownloadError):
        get(server, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["f.bin.part", "f.bin.part.json"]
    file.requests.clear()
    return file


def test_part_of_an_earlier_run_is_continued(server, tmp_path, monkeypatch):
    file = leave_part(server, tmp_path, monkeypatch)
    size = os.path.getsize(tmp_path / "f.bin.part")
    assert get(server, tmp_path) == CONTENT
    assert ranges(file) == [f"bytes={size}-"] and size > 100_000


@pytest.mark.parametrize("spoil", ["torn", "altered", "longer", "record"])
def test_spoilt_part_is_not_used(server, tmp_path, monkeypatch, spoil):
    file = leave_part(server, tmp_path, monkeypatch)
    part = tmp_path / "f.bin.part"
    data = part.read_bytes()
    if spoil == "record":
        (tmp_path / "f.bin.part.json").write_text('{"url": "')
    else:
        part.write_bytes(
            {"torn": data[:-500], "altered": data[:50] + b"\0\0\0\0" + data[54:], "longer": data + b"garbage"}[spoil]
        )
    if spoil == "record":  # nothing says any more that the part is ours
        with pytest.raises(NotOurs, match="f.bin.part: is there and was not made by this program"):
            get(server, tmp_path)
        return
    assert get(server, tmp_path) == CONTENT
    assert ranges(file) == [f"bytes={len(data)}-" if spoil == "longer" else None]


def test_part_remembers_the_sha256_that_a_redirect_named(server, tmp_path):
    """A part that is whole is not asked for again, so only the note can say what it should be."""
    file = server.add("/f.bin", CONTENT)
    (tmp_path / "f.bin.part").write_bytes(OTHER)
    note = {
        "url": server.url + "/f.bin",
        "validator": '"v1"',
        "total": len(OTHER),
        "bytes": len(OTHER),
        "sha256": hashlib.sha256(OTHER).hexdigest(),
        "whole_sha256": SHA256,
    }
    (tmp_path / "f.bin.part.json").write_text(json.dumps(note))
    assert get(server, tmp_path) == CONTENT and len(file.requests) == 1


def test_killed_download_is_continued(server, tmp_path):
    """kill -9 in the middle; what had been noted on the disk is continued."""
    release = threading.Event()
    file = server.add("/f.bin", CONTENT, faults=[stalled(200_000, release)])
    code = (
        f"import download as d; d.SYNC_BYTES = 60_000\n"
        f"d.download({server.url + '/f.bin'!r}, {str(tmp_path / 'f.bin')!r})"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    note = tmp_path / "f.bin.part.json"
    deadline = time.time() + 20
    while time.time() < deadline and not (note.exists() and json.loads(note.read_text())["bytes"] > 150_000):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    release.set()
    assert not (tmp_path / "f.bin").exists()
    assert get(server, tmp_path) == CONTENT
    assert int(ranges(file)[1][6:-1]) > 150_000


# ----------------------------------------------------------------------------------------------------------------------
# Disk


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize("limit", [100_000, len(CONTENT) - 10])  # the second is met by the very last write
def test_disk_that_ends_in_the_middle_leaves_nothing(server, tmp_path, limit):
    """The operating system refuses to let any file grow beyond the limit, as a full disk would."""
    import resource

    server.add("/f.bin", CONTENT)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(DownloadError, match="cannot be written.*nothing was left behind"):
            download(server.url + "/f.bin", str(tmp_path / "f.bin"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_disk_known_to_be_too_small_is_seen_before_the_first_byte(server, tmp_path, monkeypatch):
    server.add("/f.bin", CONTENT)
    monkeypatch.setattr(dl.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(dl, "write_all", lambda f, chunk: pytest.fail("wrote although there is no room"))
    with pytest.raises(DownloadError, match="wanted 300000 bytes, 1000 are free"):
        download(server.url + "/f.bin", str(tmp_path / "f.bin"))
    assert os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------------
# Small files


@pytest.mark.parametrize("content", [b'{"a": ', b"\xff\xfe", b"[1]", b"{}"])
def test_damaged_record_is_as_good_as_none(tmp_path, content):
    path = str(tmp_path / "r.json")
    (tmp_path / "r.json").write_bytes(content)
    kind = {"a": integer()}
    assert dl.read_record(path, kind) is None
    write_json(path, {"a": 1})
    assert dl.read_record(path, kind) == {"a": 1}
    for bad, error in ((object(), TypeError), (float("nan"), ValueError)):
        with pytest.raises(error):
            write_json(path, {"a": bad})
    assert os.listdir(tmp_path) == ["r.json"] and dl.read_record(path) == {"a": 1}


# ----------------------------------------------------------------------------------------------------------------------
# Streams


def test_stream_may_be_left_early(server):
    file = server.add("/f.bin", CONTENT)
    got = b""
    for chunk in Stream(server.url + "/f.bin"):
        got += chunk
        if len(got) > 70_000:
            break
    assert CONTENT.startswith(got) and len(file.requests) == 1


def test_stream_of_a_changed_file_ends_in_an_error(server):
    server.add("/f.bin", CONTENT, faults=[broken(100_000), becomes(OTHER, '"v2"')])
    with pytest.raises(Changed):
        b"".join(Stream(server.url + "/f.bin"))


def test_mirror():
    assert dl.mirrored("https://host/a/b", "") == "https://host/a/b"
    assert dl.mirrored("https://host/a/b", "http://127.0.0.1:1/m/") == "http://127.0.0.1:1/m/host/a/b"
