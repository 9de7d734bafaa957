"""refer.prepare.download: interrupted downloads resume, wrong responses are rejected."""

import dataclasses
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest
from conftest import ROOT
from download_server import Server

from lib.errors import UserError
from refer.prepare.download import Options, Partial, download, install_from_sources
from refer.prepare.files import Hashes, RejectedError
from refer.prepare.http import RedirectHandler, parse_number

OPTIONS = Options(stall=0.3, tries=3)
DATA = os.urandom(300_000)


@pytest.fixture
def server(monkeypatch):
    """A local server with one file."""
    monkeypatch.setattr("refer.prepare.download.MAX_PAUSE", 0.0)
    server = Server()
    server.files["/file"] = DATA
    yield server
    server.close()


@pytest.fixture
def get(server, tmp_path):
    """Download /file to <tmp>/file and return its content."""

    def run(name="file", **kwargs):
        download(f"{server.url}/file", tmp_path / name, OPTIONS, **kwargs)
        assert not (tmp_path / f"{name}.part").exists()
        return (tmp_path / name).read_bytes()

    return run


@pytest.fixture
def install(server, tmp_path):
    """Run install_from_sources with paths of the server; return the contents that were offered to ``accept``."""

    def run(*paths, accept=lambda data: True, options=OPTIONS):
        seen = []

        def install(path):
            seen.append(path.read_bytes())
            if not accept(seen[-1]):
                raise RejectedError("wrong content")

        urls = [f"{server.url}/{path}" for path in paths]
        target, hashes = tmp_path / "file", Hashes(tmp_path)
        install_from_sources(install, local=(), urls=urls, target=target, hashes=hashes, options=options)
        return seen

    return run


def ranges(server):
    return [request[1] for request in server.requests]


# ---- resuming ----


def test_a_file_is_downloaded(server, get):
    assert get() == DATA
    assert ranges(server) == [None]


def test_a_closed_connection_is_resumed_at_the_same_byte(server, get):
    server.faults["/file"] = [{"bytes": 100_000}, {"bytes": 50_000}]
    assert get() == DATA
    assert server.requests == [
        ("/file", None, None), ("/file", "bytes=100000-", '"first"'), ("/file", "bytes=150000-", '"first"')
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ([{"bytes": 100_000}, {"range": False}], [None, "bytes=100000-"]),
        ([{"bytes": 100_000, "etag": False}], [None, None]),
        ([{"bytes": 100_000}, {"status": 416}], [None, "bytes=100000-", None]),
    ],
    ids=["server without ranges", "file without version", "range not satisfiable"],
)
def test_a_download_that_cannot_be_resumed_starts_again(server, get, faults, expected):
    server.faults["/file"] = faults
    assert get() == DATA
    assert ranges(server) == expected


def test_a_date_identifies_the_version_if_the_etag_is_weak(server, get):
    date = "Wed, 13 Apr 2022 01:17:18 GMT"
    weak = {"etag": False, "headers": {"ETag": 'W/"first"', "Last-Modified": date}}
    server.etags["/file"] = date
    server.faults["/file"] = [{"bytes": 100_000, **weak}, weak]
    assert get() == DATA
    assert server.requests[1] == ("/file", "bytes=100000-", date)


@pytest.mark.parametrize(
    ("fault", "extra"),
    [
        ({}, 10),
        ({"ignore_if_range": True}, 0),
        ({"ignore_if_range": True}, 10),
        ({"ignore_if_range": True, "etag": False}, 10),
    ],
    ids=["another version", "If-Range ignored", "If-Range ignored, another size", "another size without version"],
)
def test_the_rest_of_another_version_is_never_appended(server, get, fault, extra):
    other = os.urandom(len(DATA) + extra)
    server.faults["/file"] = [{"bytes": 100_000}, {"change": other, **fault}]
    assert get() == other


@pytest.mark.parametrize("fault", ["stall", "drip"])
def test_a_stalled_connection_is_closed(server, get, fault):
    server.faults["/file"] = [{"bytes": 100_000, fault: True}]
    server.files["/file"] = data = DATA[:100_000] + b"x" * 200_000
    assert get() == data
    assert len(server.requests) == 2
    assert 100_000 <= int(ranges(server)[1][6:-1]) < 100_150  # less than the 200 bytes that would have dripped


def test_a_busy_server_is_tried_again(server, get):
    server.faults["/file"] = [{"status": 503}, {"status": 429, "headers": {"Retry-After": "0"}}]
    assert get() == DATA


def test_a_download_ends_after_some_failures_and_resumes_with_the_next_command(server, get, tmp_path):
    server.faults["/file"] = [{"bytes": 1000, "stall": True} for _ in range(3)]
    with pytest.raises(RejectedError, match=r"no data for 0\.3 s"):
        get()
    assert len(server.requests) == OPTIONS.tries
    assert (tmp_path / "file.part").read_bytes() == DATA[:3000]
    assert get() == DATA
    assert ranges(server)[-1] == "bytes=3000-"


def test_attempts_with_much_progress_do_not_count_as_failures(server, get, monkeypatch):
    monkeypatch.setattr("refer.prepare.download.RESET_BYTES", 20_000)
    server.faults["/file"] = [{"bytes": 20_000} for _ in range(9)]
    assert get() == DATA
    assert len(server.requests) == 10


def test_a_part_is_not_continued_from_another_address(server, get, tmp_path):
    server.faults["/file"] = [{"bytes": 1000}] * 3
    server.files["/other"] = os.urandom(len(DATA))
    with pytest.raises(RejectedError, match="connection closed after 3000 of 300000 bytes"):
        get()
    download(f"{server.url}/other", tmp_path / "file", OPTIONS)
    assert (tmp_path / "file").read_bytes() == server.files["/other"]
    assert ranges(server)[-1] is None


def test_a_complete_part_is_not_requested_again(server, get, tmp_path):
    part = Partial(tmp_path / "file")
    part.start(f"{server.url}/file", len(DATA), '"first"')
    part.path.write_bytes(DATA)
    assert get() == DATA
    assert server.requests == []


def test_a_killed_process_loses_nothing(server, get, tmp_path):
    server.faults["/file"] = [{"bytes": 123_456, "stall": True}]
    code = "import sys; from pathlib import Path; from refer.prepare.download import Options, download\n"
    code += "download(sys.argv[1], Path(sys.argv[2]), Options())"
    child = subprocess.Popen([sys.executable, "-c", code, f"{server.url}/file", tmp_path / "file"], cwd=ROOT)
    part, pause = tmp_path / "file.part", threading.Event()
    while child.poll() is None and not (part.is_file() and part.stat().st_size == 123_456):
        pause.wait(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "file").exists()
    assert get() == DATA
    assert ranges(server) == [None, "bytes=123456-"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"address": "URL", "size": "many"}', "\xff"])
def test_a_corrupt_state_file_is_ignored(server, get, tmp_path, text):
    (tmp_path / "file.part").write_bytes(b"rubbish")
    (tmp_path / "file.part.json").write_text(text.replace("URL", f"{server.url}/file"), encoding="latin-1")
    assert get() == DATA


def test_parts_of_earlier_versions_of_this_code_are_continued(server, get, tmp_path):
    (tmp_path / "file.part").write_bytes(DATA[:1000])
    state = {"address": f"{server.url}/file", "size": len(DATA), "validator": '"first"'}
    (tmp_path / "file.part.json").write_text(json.dumps(state))
    assert get() == DATA
    assert ranges(server) == ["bytes=1000-"]


# ---- responses ----


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"status": 404}, "404"),
        ({"status": 403}, "403"),
        ({"status": 302, "headers": {"Location": "file:///etc/passwd"}}, "file:///etc/passwd"),
        ({"status": 302, "headers": {"Location": "ftp://127.0.0.1/x"}}, "ftp://127.0.0.1/x"),
    ],
)
def test_permanent_errors_are_not_tried_again(server, get, tmp_path, fault, reason):
    (tmp_path / "file.part").write_bytes(b"some")
    server.faults["/file"] = [fault]
    with pytest.raises(RejectedError, match=reason):
        get()
    assert len(server.requests) == 1
    assert (tmp_path / "file.part").read_bytes() == b"some"


def test_a_web_page_does_not_replace_a_part(server, get):
    server.files["/file"] = zipped = b"PK\x03\x04" + DATA
    server.faults["/file"] = [{"bytes": 1000}] * 3
    with pytest.raises(RejectedError):
        get("file.zip")
    server.files["/file"], server.etags["/file"] = b"<!DOCTYPE html><p>gone", '"page"'
    with pytest.raises(RejectedError, match=r"the server sent a web page instead of file\.zip"):
        get("file.zip")
    server.files["/file"], server.etags["/file"] = zipped, '"first"'
    assert get("file.zip") == zipped
    assert ranges(server)[-1] == "bytes=3000-"


def test_only_http_and_https_are_opened(tmp_path):
    for url in ("file:///etc/passwd", "data:,x", "ftp://127.0.0.1/x"):
        with pytest.raises(RejectedError, match="not an http or https address"):
            download(url, tmp_path / "file", OPTIONS)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server, get, status):
    server.files["/elsewhere"] = DATA
    server.faults["/file"] = [{"status": status, "headers": {"Location": "/elsewhere"}}]
    assert get() == DATA


def test_redirects_from_https_to_http_are_rejected():
    request = urllib.request.Request("https://a.org/x")
    with pytest.raises(RejectedError, match=r"redirects to http://a\.org/x"):
        RedirectHandler().redirect_request(request, None, 302, "", {}, "http://a.org/x")


def test_progress_is_logged_if_there_is_no_terminal(server, get, monkeypatch, caplog):
    monkeypatch.setattr("refer.prepare.files.LOG_INTERVAL", 0.0)
    monkeypatch.setattr("refer.prepare.files.MIN_PROGRESS_BYTES", 0)
    with caplog.at_level("DEBUG", logger="crossvlt"):
        get()
    assert "file: 300k of 300k" in caplog.text


def test_only_whole_numbers_are_accepted_in_headers():
    values = ("12", "", None, "-1", "1e3", "٣", "9" * 5000)
    assert [parse_number(value) for value in values] == [12] + [None] * 6


# ---- several addresses ----


def test_the_first_valid_file_is_installed(server, install, tmp_path):
    server.files.update({"/wrong": b"wrong", "/right": b"right", "/unused": b"right"})
    assert install("absent", "wrong", "right", "unused", accept=b"right".__eq__) == [b"wrong", b"right"]
    assert [request[0] for request in server.requests] == ["/absent", "/wrong", "/right"]
    (tmp_path / "hashes.json").unlink()
    with pytest.raises(UserError, match=r"/absent: 404.*; .*/wrong: wrong content\)\. Download it by hand .*--from"):
        install("absent", "wrong", accept=b"right".__eq__)
    assert not (tmp_path / "file").exists()


def test_the_address_of_a_part_is_tried_first(server, install):
    server.files.update({"/first": DATA, "/second": DATA})
    server.faults = {"/first": [{"status": 404}], "/second": [{"bytes": 100_000}]}
    with pytest.raises(UserError, match="connection closed"):
        install("first", "second", options=dataclasses.replace(OPTIONS, tries=1))
    server.requests.clear()
    assert install("first", "second") == [DATA]
    assert server.requests[0][:2] == ("/second", "bytes=100000-")


def test_an_existing_file_is_used_and_not_deleted(server, install, tmp_path):
    (tmp_path / "file").write_bytes(b"right")
    assert install("file") == [b"right"]
    assert server.requests == []
    assert (tmp_path / "file").exists()


def test_a_file_that_was_put_beside_an_interrupted_download_is_not_deleted(server, install, tmp_path):
    server.faults["/file"] = [{"bytes": 100_000}] * 3
    with pytest.raises(UserError, match="connection closed"):
        install("file", options=dataclasses.replace(OPTIONS, tries=1))
    (tmp_path / "file").write_bytes(b"right")
    install("file")
    assert (tmp_path / "file").read_bytes() == b"right"
    assert not (tmp_path / "file.part").exists()


def test_an_invalid_file_of_the_user_is_kept_under_another_name(server, install, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    assert install("file", accept=DATA.__eq__) == [b"mine", DATA]
    assert (tmp_path / "file.replaced").read_bytes() == b"mine"


# ---- the disk ----


def test_a_full_disk_is_reported_and_nothing_is_lost(server, get, tmp_path, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 70_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr("refer.prepare.download.open", lambda path, mode, buffering: FullDisk(path, mode), raising=False)
        patch.setattr("refer.prepare.http.CHUNK", 10_000)
        with pytest.raises(UserError, match=r"Cannot write .*file\.part: No space left on device"):
            get()
    kept = (tmp_path / "file.part").read_bytes()
    assert 0 < len(kept) <= 70_000
    assert get() == DATA
    assert ranges(server) == [None, f"bytes={len(kept)}-"]


def test_free_space_is_checked_first(server, get, tmp_path):
    with pytest.raises(UserError, match=r"file needs 300TB in .*, but only .* are free"):
        get(unpack_factor=1e9)
    assert not (tmp_path / "file.part").exists()


def test_a_folder_that_cannot_be_written_is_reported(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"Cannot write .*/file/x\.part"):
        download(f"{server.url}/file", tmp_path / "file" / "x", OPTIONS)
