"""data.convert: which folder it replaces, and that nothing is lost whatever ends it."""

import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from commands import contents
from own_data import ONLY_TRAIN, by_id, file_name, rows_by_id

from data.convert import __main__ as tool
from data.convert.__main__ import convert
from lib.errors import UserError
from lib.files import atomic_folder


def test_an_existing_set_stays_without_force(source):
    by_id(source, rows_by_id())
    before = contents(source / "data")
    with pytest.raises(UserError, match="data/mine is there already: replace it with --force"):
        by_id(source, rows_by_id([1, 2]))
    assert contents(source / "data") == before
    by_id(source, rows_by_id(range(1, 9)), force=True, split_by="own")
    assert len(list((source / "data/mine/images").iterdir())) == 8
    assert [path.name for path in (source / "data/mine").glob("refs*")] == ["refs(own).p"]
    assert [path.name for path in (source / "data").iterdir()] == ["mine"]


def test_only_what_this_tool_made_is_replaced(source):
    by_id(source, rows_by_id())
    for name in ("notes.txt", "images/more.jpg", "refs(other).p"):
        (source / "data/mine" / name).write_text("mine")
        with pytest.raises(UserError, match=r"also holds .*move it first"):
            by_id(source, force=True)
        (source / "data/mine" / name).unlink()
    (source / "data/mine/.samples.png.99.part").write_text("of a process that was killed while it drew the sheet")
    by_id(source, force=True)
    assert not (source / "data/mine/.samples.png.99.part").exists()
    with pytest.raises(UserError, match="data/mine/images is in data/mine, which is to be replaced"):
        convert("mine", "sentences.csv", "data/mine/images", instances="coco.json", data_root="data", force=True)
    (source / "data/other").mkdir()
    (source / "data/other/precious").write_text("mine")
    with pytest.raises(UserError, match="data/other is there and wasn't made by"):
        by_id(source, name="other", force=True)
    (source / "data/linked").symlink_to(source / "data/mine")
    with pytest.raises(UserError, match="data/linked is there and wasn't made by"):
        by_id(source, name="linked", force=True)
    by_id(source, force=True)


def test_links(source):
    refer = by_id(source, rows_by_id(), link=True).refer
    for i in refer.Imgs:
        path = refer.get_image_path(i)
        assert path.is_symlink()
        assert path.resolve() == (source / "photos" / file_name(i)).resolve()
    by_id(source, force=True)
    assert (source / "photos" / file_name(1)).is_file(), "replacing links leaves the pictures"


def spoilt_copy(error, after=3):
    done = []

    def copy(source, target):
        done.append(target)
        if len(done) > after:
            raise error
        return target.write_bytes(source.read_bytes())

    return copy


@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left on device"), UserError)],
)
def test_what_is_stopped_leaves_the_old_set_whole(source, monkeypatch, error, raised):
    by_id(source, rows_by_id())
    before = contents(source / "data")
    monkeypatch.setattr(tool.shutil, "copyfile", spoilt_copy(error))
    for how in ({"force": True}, {"name": "new"}):
        with pytest.raises(raised):
            by_id(source, rows_by_id([4, 5, 6, 7, 8]), **ONLY_TRAIN, **how)
    assert contents(source / "data") == before
    assert [path.name for path in (source / "data").iterdir()] == ["mine"]


def killed_while(source, owner, function, nth):
    """Convert again in a process that is killed, as by kill -9, in its nth call of a function."""

    def run():
        original, calls = getattr(owner, function), []

        def last(*args, **how):
            calls.append(args)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **how)

        setattr(owner, function, last)
        by_id(source, rows_by_id([4, 5]), **ONLY_TRAIN, force=True, link=True)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_killed_anywhere_the_old_set_is_whole_and_the_next_call_works(source):
    by_id(source, rows_by_id())
    whole = contents(source / "data/mine")
    assert killed_while(source, os, "symlink", 2) == -signal.SIGKILL
    assert contents(source / "data/mine") == whole
    assert (source / "data/.mine.part").is_dir()
    for nth in (1, 2):  # before the old one is moved away, and between that and the new one's coming
        assert killed_while(source, Path, "rename", nth) == -signal.SIGKILL
        if nth == 1:
            assert contents(source / "data/mine") == whole
    assert not (source / "data/mine").exists()
    with pytest.raises(UserError, match="is there already"):
        by_id(source)
    assert contents(source / "data") == {f"mine/{name}": content for name, content in whole.items()}, "it is back"
    by_id(source, rows_by_id([4, 5]), **ONLY_TRAIN, force=True)
    assert len(list((source / "data/mine/images").iterdir())) == 2
    assert [path.name for path in (source / "data").iterdir()] == ["mine"]


def test_two_processes_do_not_write_the_same_set(source):
    with atomic_folder(source / "data/mine") as new:
        with pytest.raises(UserError, match="another process is writing"):
            by_id(source, rows_by_id())
        assert new.is_dir()
        (new / "x").touch()
    assert (source / "data/mine/x").exists()
