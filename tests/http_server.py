"""A local HTTP server whose files misbehave on demand, for the tests of download.py and prepare_data.py.

    with serving() as server:
        file = server.add("/a/b.bin", content, faults=[status(500), broken(1000)])
        ... server.url + "/a/b.bin" ...
        file.requests      # the headers of every request, in order

A fault is taken by one request each, in order; when none is left the file is sent as it should be.
"""

import contextlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def status(code, **headers):
    """Answer with this status and nothing else."""
    return {"status": code, "headers": {k.replace("_", "-"): v for k, v in headers.items()}}


def broken(after):
    """Announce the whole length, send `after` bytes of the answer, close the connection."""
    return {"after": after}


def stalled(after, release):
    """Send `after` bytes of the answer, then nothing until the event `release` is set."""
    return {"after": after, "release": release}


def becomes(content, etag):
    """Be another file from this request on."""
    return {"content": content, "etag": etag}


class File:
    """etag '' sends none; ranges False ignores Range; length is what Content-Length says of a whole answer (None: no
    such header, the connection's end being the end; 'chunked')."""

    def __init__(self, content, faults=(), etag='"v1"', ranges=True, length=-1, headers=()):
        self.content, self.faults, self.etag, self.ranges = content, list(faults), etag, ranges
        self.length, self.headers, self.requests = length, dict(headers), []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def end_headers(self):
        self.send_header("Connection", "close")  # one request a connection, and the client is told so
        super().end_headers()

    def do_GET(self):
        file = self.server.files.get(self.path)
        self.close_connection = True
        if file is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        file.requests.append(dict(self.headers))
        fault = file.faults.pop(0) if file.faults else {}
        if "content" in fault:
            file.content, file.etag = fault["content"], fault["etag"]
        if "status" in fault:
            self.send_response(fault["status"])
            for name, value in ({"Content-Length": "0"} | fault["headers"]).items():
                self.send_header(name, value)
            self.end_headers()
            return
        self.send_file(file, fault)

    def send_file(self, file, fault):
        start = 0
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and file.ranges and self.headers.get("If-Range", file.etag) == file.etag:
            start = int(asked[1])
        if start >= max(len(file.content), 1):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(file.content) - 1}/{len(file.content)}")
        body = file.content[start:]
        if file.length == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        elif file.length is not None:
            self.send_header("Content-Length", str(len(body) if start or file.length == -1 else file.length))
        if file.etag:
            self.send_header("ETag", file.etag)
        for name, value in file.headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client may have had enough
            self.send_body(file, fault, body)

    def send_body(self, file, fault, body):
        body = body[: fault.get("after", len(body))]
        if file.length == "chunked":
            for i in range(0, len(body), 5000):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(body[i : i + 5000]), body[i : i + 5000]))
            if "after" not in fault:
                self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(body)
        self.wfile.flush()
        if "release" in fault:
            fault["release"].wait(10)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.url = {}, f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, path, content, **how):
        self.files[path] = File(content, **how)
        return self.files[path]


@contextlib.contextmanager
def serving():
    """A server on a free port of the loopback, in a thread that ends with the block."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
