"""lib.locks: one holder at a time, named in the message; a killed holder blocks nobody."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from lib.errors import UserError
from lib.locks import check_unlocked, lock

HOLD = """
import os, sys
from lib.locks import lock
with lock(sys.argv[1], "busy"):
    child = os.fork()
    if child == 0:  # like a data-loading worker, it outlives its killed parent
        sys.stdin.read()
        os._exit(0)
    print(child, flush=True)
    sys.stdin.read()
"""


def test_a_second_holder_is_refused_and_told_who_holds_the_lock(tmp_path):
    path = tmp_path / "new" / ".lock"
    with lock(path, "The folder is in use"):
        holder = rf"The folder is in use \(process {os.getpid()} on .*, started .*: .*\)\."
        with pytest.raises(UserError, match=holder), lock(path, "The folder is in use"):
            pass
        assert path.exists()
    assert not path.exists()
    with lock(path, "The folder is in use"):
        pass


def test_a_killed_holder_releases_the_lock_although_its_child_lives(tmp_path):
    path = tmp_path / ".lock"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, path], cwd=ROOT, text=True, **pipes) as holder:
        child = int(holder.stdout.readline())
        with pytest.raises(UserError, match=f"process {holder.pid} on "), lock(path, "busy"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)  # still alive
        with lock(path, "busy"):
            pass
        os.kill(child, signal.SIGKILL)


def test_a_deleted_lock_is_lost_and_the_next_holder_keeps_its_own(tmp_path):
    path = tmp_path / ".lock"
    with lock(path, "busy") as first:
        assert not first.is_lost()
        path.unlink()
        assert first.is_lost()
        with lock(path, "busy") as second:
            assert first.is_lost()
            assert not second.is_lost()
    with lock(path, "busy") as first:
        path.unlink()
        path.write_text("of another process")
    assert path.exists()


def test_checking_a_lock_changes_nothing(tmp_path):
    path = tmp_path / "folder" / ".lock"
    check_unlocked(path, "busy")
    assert not path.parent.exists()
    with lock(path, "busy"):
        content = path.read_text()
        with pytest.raises(UserError, match=rf"^busy \(process {os.getpid()} on .*\)\. Wait\.$"):
            check_unlocked(path, "busy", "Wait.")
        assert path.read_text() == content
    path.write_text("left by a killed process")
    check_unlocked(path, "busy")
    assert path.exists()


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"annot write .*file"), lock(tmp_path / "file" / ".lock", "busy"):
        pass
