"""Downloads that can be trusted: retried, resumed, checked, and never there until they are whole.

    download(url, "data/download/file.gz", size=..., sha256=...)   # the file appears when it is whole and checked
    for chunk in Stream(url): ...                                  # the same care without a file; may be stopped early

What goes wrong, and what is done about it:
    connection broken, stalled, refused; 408, 425, 429, 5xx   tried again after a growing pause, or after Retry-After
    broken in the middle       continued by a range request, if the server named the version (a strong ETag); If-Range
                               makes a changed file come whole instead of being spliced
    server ignores ranges      read again from the start; the bytes before the break must have the same sha256
    file changed between tries download() starts it anew; a Stream, whose first part has been used, ends in an error
    length                     what arrives is compared with Content-Length, Content-Range and `size`; a reply that lets
                               nobody tell whole from truncated is refused
    content                    compared with `sha256`, or with the sha256 that Hugging Face's redirects name
    program killed             <file>.part holds a prefix whose length and sha256 <file>.part.json knows; a prefix that
                               does not match (a torn write, an altered file) is thrown away
    disk full                  seen before the first byte where the length is known; otherwise the part is removed
The whole file is fsynced, renamed, and its sha256 kept in <file>.json, with which a later call compares it again.
"""

import contextlib
import email.utils
import errno
import hashlib
import os
import re
import shutil
import time

import requests
import urllib3
from tqdm import tqdm

import owned
from data import sha256_file
from records import RecordError, Unreadable, anything, boolean, integer, null_or, read_json, string
from records import sha256 as hash_rule

TIMEOUT = 30.0  # seconds to connect, and seconds without a byte that count as a stall
RETRIES = 8  # tries in a row that bring no new byte
CONNECT_RETRIES = 2  # ... for a host that never answered: most likely there is no network
BACKOFF = 1.0  # seconds before the first retry; doubles
MAX_WAIT = 300.0  # seconds; a server that asks for more is not waited for
RESTARTS = 2  # of a file that changed or has the wrong sha256
SYNC_BYTES = 64 << 20  # a killed download loses at most this much


class DownloadError(RuntimeError):
    """A download that failed for good; the message names the URL, what was wanted and what was got."""


class Changed(Exception):
    """What the server sends now does not continue what it sent before."""


class Retry(Exception):
    """A failure that may pass. .after: seconds the server asked to wait, or None."""

    def __init__(self, reason, after=None):
        super().__init__(reason)
        self.after = after


def mirrored(url, mirror):
    """The URL, or the same path below a mirror: https://host/path -> <mirror>/host/path."""
    return f"{mirror.rstrip('/')}/{url.split('://', 1)[1]}" if mirror else url


class Stream:
    """The bytes of a URL from `start` on, as chunks: iterating retries, resumes and checks; see the module's docstring.

    start, hasher    bytes already had, and a hashlib.sha256 that has seen them
    validator        the strong ETag they came with ('' if the server gave none)
    total            length of the file ('size' if the caller knows it, else learnt from the server), or None
    sha256           of the whole file, if known; checked at the end
    While iterating: .position (bytes had), .hasher (over all of them), .validator, .total.
    Raises DownloadError, and Changed when what was yielded before cannot be continued.
    """

    def __init__(self, url, start=0, hasher=None, validator="", size=None, sha256=None, total=None):
        self.url, self.position, self.hasher = url, start, hasher or hashlib.sha256()
        self.validator, self.size, self.sha256, self.total = validator, size, sha256, total or size
        self.answered = False

    def __iter__(self):
        failures = 0
        while self.total is None or self.position != self.total:  # a part may be whole already
            before = self.position
            try:
                yield from self.attempt()
                break
            except Retry as e:
                failures = 1 if self.position > before else failures + 1
                self.pause(e, failures, RETRIES if self.answered else CONNECT_RETRIES)
        if self.sha256 and self.hasher.hexdigest() != self.sha256:
            raise Changed(f"wanted sha256 {self.sha256}, got {self.hasher.hexdigest()} ({self.position} bytes)")

    def pause(self, e, failures, limit):
        """Wait before the next try, or give up."""
        if failures > limit:
            raise DownloadError(f"{self.url}: {e}; gave up after {failures} tries (had {self.position} bytes)") from e
        wait = min(BACKOFF * 2 ** (failures - 1), MAX_WAIT) if e.after is None else e.after
        if wait > MAX_WAIT:
            raise DownloadError(f"{self.url}: {e}; the server asks to wait {wait:.0f} s: run again later") from e
        tqdm.write(f"{self.url}: {e}; again in {wait:.1f} s ({failures} of {limit})")
        time.sleep(wait)

    def attempt(self):
        """One request: yield what is new in its answer. Raises Retry, Changed, DownloadError."""
        headers = {"Accept-Encoding": "identity"}  # lengths and ranges of the file itself, not of a compressed form
        if self.position and self.validator:
            headers |= {"Range": f"bytes={self.position}-", "If-Range": self.validator}
        try:
            with requests.get(self.url, headers=headers, stream=True, timeout=(TIMEOUT, TIMEOUT)) as reply:
                self.answered = True
                self.check_status(reply)
                repeated = 0 if reply.status_code == 206 else self.position
                self.learn(reply)
                yield from self.new_bytes(reply, repeated)
        except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as e:
            raise Retry(short_reason(e)) from e
        except requests.RequestException as e:  # a malformed URL, endless redirects
            raise DownloadError(f"{self.url}: {e}") from e
        if self.total is not None and self.position < self.total:
            raise Retry(f"connection closed after {self.position} of {self.total} bytes")

    def check_status(self, reply):
        """Return for a usable answer (200; 206 that starts where we stand); else raise."""
        status, said = reply.status_code, f"{reply.status_code} {reply.reason}"
        if status in (408, 425, 429) or status >= 500:
            raise Retry(said, retry_after(reply.headers.get("Retry-After")))
        if status == 416:  # the file is shorter than what we have: read it whole to see what it is now
            self.validator = ""
            raise Retry(f"{said}: no bytes from {self.position} on")
        if status not in (200, 206):
            raise DownloadError(f"{self.url}: {said}")
        packed = reply.headers.get("Content-Encoding", "identity") != "identity"
        if packed and not self.url.endswith(("gz", "tgz")):  # some servers call a .gz file an encoding of its content
            raise DownloadError(f"{self.url}: sent compressed on the fly, so its length cannot be checked")
        if status == 206:
            got = re.match(r"bytes (\d+)-", reply.headers.get("Content-Range", ""))
            if not self.validator or not got or int(got[1]) != self.position:
                self.validator = ""  # no more ranges from this server
                raise Retry(f"asked for bytes from {self.position} on, got {reply.headers.get('Content-Range')!r}")

    def learn(self, reply):
        """Take validator and length from an answer. Raises Changed, or Retry for a length that is not the known one."""
        named = reply.headers.get("ETag", "")
        named = "" if named.startswith("W/") else named
        if reply.status_code == 206:
            if named and named != self.validator:
                raise Changed(f"version {self.validator} became {named}")
            total = re.search(r"/(\d+)$", reply.headers.get("Content-Range", ""))
            total = int(total[1]) if total else self.total
        else:
            total = reply.headers.get("Content-Length")
            total = int(total) if total is not None and total.isdigit() else None
            chunked = "chunked" in reply.headers.get("Transfer-Encoding", "").lower()
            if total is None and not chunked and self.size is None:
                raise DownloadError(
                    f"{self.url}: sent without a length, so a truncated file could not be told from "
                    "a whole one; fetch it by hand or from a mirror that names lengths"
                )
            self.validator = named
        self.learn_linked(reply)
        if self.size is not None and total is not None and total != self.size:
            raise Retry(f"wanted {self.size} bytes, the server says {total}")
        if self.position and None not in (self.total, total) and total != self.total:
            raise Changed(f"{self.total} bytes became {total}")
        self.total = total if total is not None else self.total

    def learn_linked(self, reply):
        """Hugging Face's redirect to a large file names its sha256 and size, which no later hop can falsify."""
        for hop in [*reply.history, reply]:
            etag, size = hop.headers.get("X-Linked-ETag", "").strip('"'), hop.headers.get("X-Linked-Size", "")
            if self.sha256 is None and re.fullmatch(r"[0-9a-f]{64}", etag):
                self.sha256 = etag
            if self.size is None and size.isdigit():
                self.size = int(size)

    def new_bytes(self, reply, repeated):
        """Yield the answer's chunks after the first `repeated` bytes, which must be those we have already."""
        again = hashlib.sha256()
        for chunk in reply.raw.stream(1 << 16, decode_content=False):  # the bytes of the file, as they are
            if repeated:
                old, chunk = chunk[:repeated], chunk[repeated:]
                again.update(old)
                repeated -= len(old)
                if not repeated and again.digest() != self.hasher.digest():
                    raise Changed(f"the first {self.position} bytes are others than before")
            if chunk:
                if self.total is not None and self.position + len(chunk) > self.total:
                    raise Retry(f"more than the {self.total} bytes announced")
                self.hasher.update(chunk)
                self.position += len(chunk)
                yield chunk
        if repeated:
            raise Changed(f"the file ends {repeated} bytes before the {self.position} that were had")


def short_reason(e):
    """One line about a connection's failure, without the library's nested representation."""
    text = str(e)
    if isinstance(e, (requests.Timeout, urllib3.exceptions.TimeoutError)) or "timed out" in text:
        return f"nothing came for {TIMEOUT:g} s"
    if "resolve" in text or "getaddrinfo" in text:
        return "the host's name cannot be resolved (no network?)"
    if isinstance(e, requests.exceptions.ProxyError):
        return "the proxy refuses the connection"
    if "refused" in text:
        return "connection refused"
    return f"connection broken ({type(e).__name__})"


def retry_after(value):
    """Seconds to wait of a Retry-After header (a number or a date), or None."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def read_url(url, mirror=""):
    """The whole of a small file, in memory."""
    stream = Stream(mirrored(url, mirror))
    try:
        return b"".join(stream)
    except Changed as e:
        raise DownloadError(f"{stream.url}: {e}; run again") from e


# ----------------------------------------------------------------------------------------------------------------------
# To a file


RECORD = {"url": string(), "bytes": integer(0), "sha256": hash_rule, "published_sha256": boolean}  # beside a whole file
PART = {  # beside one that is being fetched
    "url": string(), "validator": string(), "total": null_or(integer(0)), "bytes": integer(0), "sha256": hash_rule,
    "whole_sha256": null_or(hash_rule),
}  # fmt: skip


def download(url, path, size=None, sha256=None, mirror=""):
    """Fetch url to path unless it is there and unaltered; returns {"url", "bytes", "sha256", "published_sha256"},
    the last saying whether the sha256 was compared with one known beforehand.

    Raises DownloadError, and NotOurs for a file at one of these names that is not ours. Whatever happens, `path` is
    either absent, or whole and checked; what was had of it stays as <path>.part, to be continued, but for a full disk,
    which leaves nothing. A file of ours is known by the <path>.json or <path>.part.json beside it.
    """
    record = read_record(path + ".json", RECORD)
    known = sha256 or (record and record["url"] == url and record["sha256"])
    if os.path.lexists(path):
        if known and os.path.isfile(path) and sha256_file(path) == known:  # it may also have been put there by hand
            return record or {"url": url, "bytes": os.path.getsize(path), "sha256": known, "published_sha256": True}
        owned.check_file(path, as_recorded)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    reasons = []
    while len(reasons) <= RESTARTS:
        try:
            record = fetch_part(mirrored(url, mirror), path + ".part", size, sha256) | {"url": url}
            break
        except Changed as e:
            reasons.append(str(e))
            remove(path + ".part", path + ".part.json")
    else:
        raise DownloadError(f"{mirrored(url, mirror)}: {reasons[-1]}; begun {len(reasons)} times; nothing was kept")
    owned.check_file(path, as_recorded)  # it took a while: somebody may have put one there
    os.replace(path + ".part", path)
    remove(path + ".part.json")
    owned.write_json(path + ".json", record, ours=lambda path: read_record(path, RECORD) is not None)
    owned.sync_folder(os.path.dirname(path) or ".")
    return record


def fetch_part(url, part, size, sha256):
    """Bring `part` to its full length, continuing what is there; returns its record."""
    have = usable_part(url, part)
    owned.check_file(part, lambda part: read_record(part + ".json", PART) is not None)
    sha256 = sha256 or have["whole_sha256"]
    stream = Stream(url, have["bytes"], have["hasher"], have["validator"], size, sha256, have["total"])
    try:
        if not have["bytes"]:
            note_progress(stream, None, part)  # first: by this it is known for ours
        with open(part, "r+b" if have["bytes"] else "wb", buffering=0) as f:
            f.truncate(have["bytes"])
            f.seek(have["bytes"])
            write_stream(stream, f, part)
            os.fsync(f.fileno())
    except OSError as e:  # the disk: full, over quota, gone
        remove(part, part + ".json")
        raise DownloadError(
            f"{part}: cannot be written: {e.strerror} (at {stream.position} of {stream.total} bytes of "
            f"{url}); nothing was left behind: make room or choose another folder"
        ) from e
    return {"bytes": stream.position, "sha256": stream.hasher.hexdigest(), "published_sha256": bool(stream.sha256)}


def write_stream(stream, f, part):
    """Write a stream to the open file f, noting from time to time, and when it ends early, how far it is safe."""
    synced, room_for = stream.position, None
    with tqdm(
        desc=os.path.basename(part)[:-5],
        initial=stream.position,
        total=stream.total,
        unit="B",
        unit_scale=True,
        disable=None,
    ) as bar:
        try:
            for chunk in stream:
                if stream.total != room_for:
                    bar.total = room_for = stream.total
                    check_room(stream, part)
                write_all(f, chunk)
                bar.update(len(chunk))
                if stream.position - synced >= SYNC_BYTES:
                    synced = note_progress(stream, f, part)
        except (DownloadError, KeyboardInterrupt):
            note_progress(stream, f, part)
            raise


def write_all(f, chunk):
    """An unbuffered write may write less than it was given; the next one then says why."""
    view = memoryview(chunk)
    while view:
        view = view[f.write(view) :]


def check_room(stream, part):
    """Raise OSError before a byte is written if the rest cannot fit on the disk."""
    free = shutil.disk_usage(os.path.dirname(part) or ".").free
    if stream.total is not None and stream.total - stream.position > free:
        raise OSError(errno.ENOSPC, f"No space left on device: wanted {stream.total} bytes, {free} are free")


def note_progress(stream, f, part):
    """Bring the part to the disk and note its length and sha256; returns the length.

    The stream counts a chunk before it is written, so after an interruption between the two the file may be shorter;
    usable_part sees that and throws the part away.
    """
    if f:
        os.fsync(f.fileno())
    owned.write_json(
        part + ".json",
        {
            "url": stream.url,
            "validator": stream.validator,
            "total": stream.total,
            "bytes": stream.position,
            "sha256": stream.hasher.hexdigest(),
            "whole_sha256": stream.sha256,
        },
        ours=is_part_record,
    )
    return stream.position


def usable_part(url, part):
    """What an earlier try left that can be trusted: bytes, hasher over them, validator, and total and whole_sha256 of
    the file if they were learnt; else zero bytes."""
    nothing = {"bytes": 0, "hasher": hashlib.sha256(), "validator": "", "total": None, "whole_sha256": None}
    record = read_record(part + ".json", PART)
    if not record or record["url"] != url or not os.path.exists(part) or os.path.getsize(part) < record["bytes"]:
        return nothing
    hasher, left = hashlib.sha256(), record["bytes"]
    with open(part, "rb") as f:
        while left and (chunk := f.read(min(left, 1 << 20))):
            hasher.update(chunk)
            left -= len(chunk)
    return record | {"hasher": hasher} if hasher.hexdigest() == record["sha256"] else nothing


# ----------------------------------------------------------------------------------------------------------------------
# Small files


def as_recorded(path):
    """Whether a file is as it was when we downloaded it."""
    record = read_record(path + ".json", RECORD)
    return record is not None and sha256_file(path) == record["sha256"]


def is_part_record(path):
    return read_record(path, PART) is not None


def read_record(path, kind=anything):
    """A JSON file of ours. None if there is none, or it is damaged or of another kind: then it is as good as none."""
    try:
        return read_json(path, kind)
    except Unreadable:
        raise
    except RecordError:
        return None


def remove(*paths):
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
