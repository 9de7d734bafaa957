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

    def answer(self, handler):
        path = handler.path
        byte_range, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        self.requests.append((path, byte_range, condition))
        faults = self.faults.get(path)
        fault = faults.pop(0) if faults else {}
        if "change" in fault:
            self.files[path], self.etags[path] = fault["change"], '"changed"'
        if "status" in fault or path not in self.files:
            handler.send_response(fault.get("status", 404))
            for name, value in fault.get("headers", {}).items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        data, etag = self.files[path], self.etags.get(path, '"first"')
        start = 0
        if byte_range and fault.get("range", True) and (condition == etag or fault.get("ignore_if_range")):
            start = int(re.fullmatch(r"bytes=(\d+)-", byte_range)[1])
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.send_header("Content-Length", str(len(data) - start))
        if fault.get("etag", True):
            handler.send_header("ETag", etag)
        for name, value in fault.get("headers", {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data[start : start + fault.get("bytes", len(data))])
        handler.wfile.flush()
        if fault.get("stall"):
            self.closing.wait(20)
        if fault.get("drip"):
            for _ in range(200):
                if self.closing.wait(0.02):
                    break
                handler.wfile.write(b"x")
                handler.wfile.flush()


def pack(path, members):
    """Write a zip file with members (name or ZipInfo, bytes) and return its path."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def link(name, target):
    """Return a member that is a symbolic link."""
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info, target
