"""A local HTTP server that can close connections, stall, change its files and answer with errors."""

import re
import stat
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """An HTTP server with ranges and ETags.

    files: {path: bytes}. faults: {path: [behavior at the next requests]}; afterwards, the server behaves normally.
    requests: (path, Range, If-Range) of every request.
    """

    def __init__(self):
        self.files, self.faults, self.requests, self.etags = {}, {}, [], {}
        self.closing = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, to):
        path = to.path
        byte_range, condition = to.headers.get("Range"), to.headers.get("If-Range")
        self.requests.append((path, byte_range, condition))
        faults = self.faults.get(path)
        do = faults.pop(0) if faults else {}
        if "change" in do:
            self.files[path], self.etags[path] = do["change"], '"changed"'
        if "status" in do or path not in self.files:
            to.send_response(do.get("status", 404))
            for name, value in do.get("headers", {}).items():
                to.send_header(name, value)
            to.send_header("Content-Length", "0")
            to.end_headers()
            return
        data, etag = self.files[path], self.etags.get(path, '"first"')
        start = 0
        if byte_range and do.get("range", True) and (condition == etag or do.get("ignore_if_range")):
            start = int(re.fullmatch(r"bytes=(\d+)-", byte_range)[1])
        to.send_response(206 if start else 200)
        if start:
            to.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if not do.get("chunked"):
            to.send_header("Content-Length", str(len(data) - start))
        if do.get("etag", True):
            to.send_header("ETag", etag)
        for name, value in do.get("headers", {}).items():
            to.send_header(name, value)
        to.end_headers()
        to.wfile.write(data[start : start + do.get("bytes", len(data))])
        to.wfile.flush()
        if do.get("stall"):
            self.closing.wait(20)
        if do.get("drip"):
            for _ in range(200):
                if self.closing.wait(0.02):
                    break
                to.wfile.write(b"x")
                to.wfile.flush()


def pack(path, members, **how):
    """A zip of {name or ZipInfo: bytes}."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **how) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def link(name, to):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info, to
