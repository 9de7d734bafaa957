"""refer.prepare.download, refer.prepare.archives: interrupted downloads resume, wrong archives are refused."""

import dataclasses
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
from conftest import ROOT
from download_server import Server, link, pack

import refer.prepare.download
import refer.prepare.responses
from lib.errors import UserError
from refer.prepare.archives import open_archive
from refer.prepare.download import Patience, fetch, obtain
from refer.prepare.responses import RefusedError

QUICK = Patience(stall=0.3, tries=3, pause=0.0)
DATA = os.urandom(300_000)


@pytest.fixture
def server():
    one = Server()
    yield one
    one.close()


@pytest.fixture
def get(server, tmp_path):
    """Fetch /file, which is DATA; gives back what is on the disk then."""
    server.files["/file"] = DATA
    target = tmp_path / "file"

    def run(**how):
        fetch(f"{server.url}/file", target, **{"patience": QUICK, **how})
        assert not list(tmp_path.glob("file.*"))  # neither .part nor what belongs to it
        return target.read_bytes()

    return run


def ranges(server):
    return [asked[1] for asked in server.asked]


# ---- going on ----


def test_a_file_is_fetched(server, get):
    assert get() == DATA
    assert ranges(server) == [None]


def test_a_connection_that_breaks_off_goes_on_where_it_was(server, get):
    server.does["/file"] = [{"bytes": 100_000}, {"bytes": 50_000}, {}]
    assert get() == DATA
    assert server.asked == [
        ("/file", None, None), ("/file", "bytes=100000-", '"first"'), ("/file", "bytes=150000-", '"first"')
    ]  # fmt: skip


def test_a_server_without_ranges_begins_again(server, get):
    server.does["/file"] = [{"bytes": 100_000}, {"range": False}, {}]
    assert get() == DATA
    assert ranges(server) == [None, "bytes=100000-"]


def test_without_a_version_nothing_is_appended(server, get):
    server.does["/file"] = [{"bytes": 100_000, "etag": False}, {}]
    assert get() == DATA
    assert ranges(server) == [None, None]


def test_a_weak_etag_does_not_do_and_a_date_does(server, get):
    date = "Wed, 13 Apr 2022 01:17:18 GMT"
    weak = {"etag": False, "headers": {"ETag": 'W/"first"', "Last-Modified": date}}
    server.etags["/file"] = date
    server.does["/file"] = [{"bytes": 100_000, **weak}, weak]
    assert get() == DATA
    assert server.asked[1] == ("/file", "bytes=100000-", date)


@pytest.mark.parametrize("careless", [False, True], ids=["heeds If-Range", "does not"])
def test_the_end_of_another_version_is_never_appended(server, get, careless):
    other = os.urandom(len(DATA) + (0 if careless else 10))
    server.does["/file"] = [{"bytes": 100_000}, {"change": other, "careless": careless}, {}]
    assert get() == other


def test_the_rest_of_a_file_of_another_length_is_not_taken(server, get):
    server.does["/file"] = [{"bytes": 100_000}, {"change": DATA + b"more", "careless": True, "etag": False}, {}]
    assert get() == DATA + b"more"


def test_a_range_that_cannot_be_begins_again(server, get):
    server.does["/file"] = [{"bytes": 100_000}, {"status": 416}, {}]
    assert get() == DATA
    assert ranges(server) == [None, "bytes=100000-", None]


@pytest.mark.parametrize("how", ["stall", "drip"])
def test_silence_ends_an_attempt(server, get, how):
    server.does["/file"] = [{"bytes": 100_000, how: True}, {}]
    if how == "drip":  # a few bytes now and then are as good as none
        server.files["/file"] = data = DATA[:100_000] + b"x" * 200_000
        assert get() == data
    else:
        assert get() == DATA
    assert len(server.asked) == 2
    assert 100_000 <= int(ranges(server)[1][6:-1]) < 100_150  # of the 200 that would have dripped


def test_a_server_that_is_busy_is_asked_again(server, get):
    server.does["/file"] = [{"status": 503}, {"status": 429, "headers": {"Retry-After": "0"}}, {}]
    assert get() == DATA


def test_it_ends_after_some_tries_and_the_next_command_goes_on(server, get, tmp_path):
    server.does["/file"] = [{"bytes": 1000, "stall": True} for _ in range(3)] + [{}]
    with pytest.raises(RefusedError, match=r"nothing came for 0\.3 s"):
        get()
    assert len(server.asked) == QUICK.tries
    assert (tmp_path / "file.part").read_bytes() == DATA[:3000]
    assert get() == DATA
    assert ranges(server)[-1] == "bytes=3000-"


def test_attempts_that_bring_much_do_not_count(server, get, monkeypatch):
    monkeypatch.setattr(refer.prepare.download, "PROGRESS", 20_000)
    server.does["/file"] = [{"bytes": 20_000} for _ in range(9)] + [{}]
    assert get() == DATA
    assert len(server.asked) == 10


def test_another_address_does_not_continue_a_file(server, get, tmp_path):
    server.does["/file"] = [{"bytes": 1000}, {"bytes": 1000}, {"bytes": 1000}, {}]
    server.files["/other"] = os.urandom(len(DATA))
    with pytest.raises(RefusedError, match="broke off at"):
        get()
    fetch(f"{server.url}/other", tmp_path / "file", patience=QUICK)
    assert (tmp_path / "file").read_bytes() == server.files["/other"]
    assert ranges(server)[-1] is None


def test_a_complete_part_is_not_asked_for_again(server, get, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(refer.prepare.download, "sync", lambda path: 1 / 0)  # ended just before it gets its name
        with pytest.raises(ZeroDivisionError):
            get()
    assert (tmp_path / "file.part").is_file()
    assert get() == DATA
    assert len(server.asked) == 1


def test_kill_9_loses_nothing(server, get, tmp_path):
    server.does["/file"] = [{"bytes": 123_456, "stall": True}, {}]
    code = "import sys, pathlib, refer.prepare.download as d; d.fetch(sys.argv[1], pathlib.Path(sys.argv[2]))"
    child = subprocess.Popen([sys.executable, "-c", code, f"{server.url}/file", tmp_path / "file"], cwd=ROOT)
    part, waiting = tmp_path / "file.part", threading.Event()
    while child.poll() is None and not (part.is_file() and part.stat().st_size == 123_456):
        waiting.wait(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "file").exists()
    assert get() == DATA
    assert ranges(server) == [None, "bytes=123456-"]


# ---- what is refused ----


def test_wrong_answers_are_refused_at_once(server, get, tmp_path):
    (tmp_path / "file.part").write_bytes(b"some")
    for do, reason in [
        ({"status": 404}, "404"),
        ({"status": 403}, "403"),
        ({"headers": {"Content-Encoding": "gzip"}}, "another encoding"),
        ({"status": 302, "headers": {"Location": "file:///etc/passwd"}}, "file:///etc/passwd"),
        ({"status": 302, "headers": {"Location": "ftp://127.0.0.1/x"}}, "ftp://127.0.0.1/x"),
    ]:
        server.does["/file"], server.asked = [do, {}], []
        with pytest.raises(RefusedError, match=reason):
            get()
        assert len(server.asked) == 1
        assert (tmp_path / "file.part").read_bytes() == b"some"


def test_another_kind_of_file_does_not_replace_what_has_come(server, get, tmp_path):
    zips = {"starts": (b"PK\x03\x04",)}
    server.files["/file"] = b"PK\x03\x04" + DATA
    server.does["/file"] = [{"bytes": 1000} for _ in range(3)] + [{}]
    with pytest.raises(RefusedError):
        get(**zips)
    good, server.files["/file"], server.etags["/file"] = server.files["/file"], b"<!DOCTYPE html><p>gone", '"page"'
    with pytest.raises(RefusedError, match="a web page"):
        get(**zips)
    server.files["/file"], server.etags["/file"] = good, '"first"'
    assert get(**zips) == good
    assert ranges(server)[-1] == "bytes=3000-"


def test_files_and_ftp_are_no_addresses(tmp_path):
    for address in ("file:///etc/passwd", "data:,x", "ftp://127.0.0.1/x"):
        with pytest.raises(RefusedError, match="unknown url type"):
            fetch(address, tmp_path / "file", patience=QUICK)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed(server, get, status):
    server.files["/elsewhere"] = DATA
    server.does["/file"] = [{"status": status, "headers": {"Location": "/elsewhere"}}]
    assert get() == DATA


def test_redirects_do_not_lean_on_pythons_version():
    assert "http_error_308" in vars(refer.prepare.responses._Redirects)  # Python 3.10's own handler has none


def test_numbers_in_headers():
    assert [refer.prepare.responses.number(text) for text in ("12", "", None, "-1", "1e3", "٣", "9" * 5000)] == [12] + [
        None
    ] * 6


def test_the_address_that_has_sent_a_part_goes_first(server, tmp_path):
    server.files.update({"/first": DATA, "/second": DATA})
    server.does["/first"] = [{"status": 404}]
    server.does["/second"] = [{"bytes": 100_000}] * 2 + [{}]
    addresses = [f"{server.url}/{name}" for name in ("first", "second")]
    once = dataclasses.replace(QUICK, tries=1)
    with pytest.raises(UserError, match="broke off"):
        obtain(addresses, tmp_path / "file", lambda path: None, patience=once)
    server.asked.clear()
    obtain(addresses, tmp_path / "file", lambda path: None, patience=QUICK)
    assert server.asked[0][:2] == ("/second", "bytes=100000-")
    assert (tmp_path / "file").read_bytes() == DATA


def test_from_https_nothing_leads_to_http():
    request = type("Request", (), {"full_url": "https://a.org/x"})()
    with pytest.raises(RefusedError, match=r"leads to http://a\.org/x"):
        refer.prepare.responses._Redirects().redirect_request(request, None, 302, "", {}, "http://a.org/x")


def test_mirrors_are_tried_in_order(server, tmp_path):
    server.files.update({"/wrong": b"wrong", "/right": b"right", "/too": b"right"})
    seen = []

    def accept(path):
        seen.append(path.read_bytes())
        if seen[-1] != b"right":
            raise RefusedError("is wrong")

    addresses = [f"{server.url}/{name}" for name in ("absent", "wrong", "right", "too")]
    obtain(addresses, tmp_path / "file", accept, patience=QUICK)
    assert [asked[0] for asked in server.asked] == ["/absent", "/wrong", "/right"]
    assert seen == [b"wrong", b"right"]
    with pytest.raises(UserError, match=r"/absent: 404.*; .*/wrong: is wrong\. Download it by hand .*--from"):
        obtain(addresses[:2], tmp_path / "other", accept, patience=QUICK)
    assert not (tmp_path / "other").exists()


def test_a_finished_archive_is_looked_at_before_asking(server, tmp_path):
    (tmp_path / "file").write_bytes(b"right")
    obtain([f"{server.url}/file"], tmp_path / "file", lambda path: None, patience=QUICK)
    assert server.asked == []


# ---- the disk ----


def test_a_full_disk_is_told_and_nothing_is_lost(server, get, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 70_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr(refer.prepare.download, "open", lambda path, mode, buffering=-1: Full(path, mode), raising=False)
        patch.setattr(refer.prepare.responses, "CHUNK", 10_000)
        with pytest.raises(UserError, match=r"can't write .*file\.part: No space left on device"):
            get()
    kept = (tmp_path / "file.part").read_bytes()
    assert 0 < len(kept) <= 70_000
    assert kept == DATA[: len(kept)]
    assert get() == DATA
    assert ranges(server) == [None, f"bytes={len(kept)}-"]


def test_room_is_looked_for_first(server, get, tmp_path):
    with pytest.raises(UserError, match=r"file needs \d+.* and .* are free"):
        get(room=1e12)
    assert not (tmp_path / "file.part").exists()


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="can't write"):
        fetch(f"{server.url}/file", tmp_path / "file" / "x", patience=QUICK)


def test_the_state_beside_a_part_may_be_rubbish(server, get, tmp_path):
    for text in ("", "[]", "{}", json.dumps({"address": f"{server.url}/file", "size": "many"}), "\xff"):
        (tmp_path / "file.part").write_bytes(b"rubbish")
        (tmp_path / "file.part.json").write_text(text, encoding="latin-1")
        assert get() == DATA


# ---- archives ----


def test_an_archive_is_unpacked(tmp_path):
    members = [("refcoco/", b""), ("refcoco/a", b"A" * 5000), ("__MACOSX/refcoco/a", b"x"), ("refcoco/.DS_Store", b"x")]
    with open_archive(pack(tmp_path / "x.zip", members)) as archive:
        assert list(archive.members) == ["refcoco/a"]
        archive.write(archive.find("refcoco", "a".__eq__)["a"], tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"A" * 5000


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (("../refcoco/b", b"x"), "leads out of the folder"),
        (("refcoco/../../b", b"x"), "leads out of the folder"),
        (("/tmp/b", b"x"), "not a plain relative name"),
        (("C:/b", b"x"), "not a plain relative name"),
        (("..\\b", b"x"), "not a plain relative name"),
        (link("refcoco/b", "/etc/passwd"), "link or a device"),
        (("refcoco/a", b"again"), "twice"),
        (("zeros", b"0" * 40_000_000), None),
    ],
)
def test_one_bad_member_refuses_an_archive(tmp_path, member, reason):
    with pytest.warns(UserWarning, match="Duplicate") if reason == "twice" else nullcontext():
        path = pack(tmp_path / "x.zip", [("refcoco/a", b"A"), member])
    if reason is None:  # the strongest that deflate can
        with open_archive(path) as archive:
            assert len(archive.members) == 2
        return
    with pytest.raises(RefusedError, match=reason), open_archive(path):
        pass


def field(data, signature, offset, value):
    """A copy of an archive's bytes with four bytes of the last record of this kind replaced."""
    at = data.rindex(signature) + offset
    return data[:at] + value.to_bytes(4, "little") + data[at + 4 :]


def test_sizes_that_cannot_be_refuse_an_archive(tmp_path):
    data = pack(tmp_path / "x.zip", [("a", os.urandom(1000))]).read_bytes()
    for offset, value, reason in ((24, 3_000_000_000, "says it has"), (20, 5000, "its members say they have")):
        (tmp_path / "y.zip").write_bytes(field(data, b"PK\x01\x02", offset, value))
        with pytest.raises(RefusedError, match=reason), open_archive(tmp_path / "y.zip"):
            pass


def test_no_more_is_written_than_a_member_says(tmp_path):
    data = pack(tmp_path / "x.zip", [("a", bytes(1000) + os.urandom(1000))]).read_bytes()
    for size in (1500, 2500):
        (tmp_path / "y.zip").write_bytes(field(data, b"PK\x01\x02", 24, size))
        with open_archive(tmp_path / "y.zip") as archive, pytest.raises(RefusedError):
            archive.write(archive.members["a"], tmp_path / "a")
        assert (tmp_path / "a").stat().st_size <= size


def test_damaged_archives_are_refused(tmp_path):
    data = pack(tmp_path / "x.zip", [("a", os.urandom(5000))]).read_bytes()
    for torn in (b"", data[:2500], data[:-10], b"no zip at all" * 50):
        (tmp_path / "y.zip").write_bytes(torn)
        with pytest.raises(RefusedError, match="damaged zip file, or none"), open_archive(tmp_path / "y.zip"):
            pass
    (tmp_path / "y.zip").write_bytes(data[:2500] + bytes([data[2500] ^ 1]) + data[2501:])
    with open_archive(tmp_path / "y.zip") as archive, pytest.raises(RefusedError, match="Bad CRC-32"):
        archive.write(archive.members["a"], tmp_path / "a")
