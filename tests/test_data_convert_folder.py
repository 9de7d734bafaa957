"""data.convert: which folders it replaces, and that no interruption loses data."""

import errno
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from commands import contents
from own_data import ONLY_TRAIN, SHARES, by_id, file_name, rows_by_id

from data.convert.dataset import Source, convert
from lib.errors import UserError
from lib.files import atomic_folder


def test_an_existing_dataset_is_replaced_only_with_force(source):
    by_id(source, rows_by_id())
    before = contents(source / "data")
    with pytest.raises(UserError, match=r"data/mine exists\. Replace it with --force"):
        by_id(source, rows_by_id([1, 2]))
    assert contents(source / "data") == before
    by_id(source, rows_by_id(range(1, 9)), force=True, split_by="own")
    assert len(list((source / "data/mine/images").iterdir())) == 8
    assert [path.name for path in (source / "data/mine").glob("refs*")] == ["refs(own).p"]
    assert [path.name for path in (source / "data").iterdir()] == ["mine"]


def test_only_converted_datasets_are_replaced(source):
    by_id(source, rows_by_id())
    for name in ("notes.txt", "images/more.jpg", "refs(other).p"):
        (source / "data/mine" / name).write_text("mine")
        with pytest.raises(UserError, match=r"also contains .*Move it first"):
            by_id(source, force=True)
        (source / "data/mine" / name).unlink()
    (source / "data/mine/.samples.png.99.part").write_text("left by a process that was killed")
    by_id(source, force=True)
    assert not (source / "data/mine/.samples.png.99.part").exists()
    files = Source(Path("sentences.csv"), Path("data/mine/images"), instances=Path("coco.json"))
    with pytest.raises(UserError, match="data/mine/images is in data/mine, which would be replaced"):
        convert("mine", files, SHARES, Path("data"), force=True)
    (source / "data/other").mkdir()
    (source / "data/other/precious").write_text("mine")
    with pytest.raises(UserError, match="data/other exists and was not made by"):
        by_id(source, name="other", force=True)
    (source / "data/linked").symlink_to(source / "data/mine")
    with pytest.raises(UserError, match="data/linked exists and was not made by"):
        by_id(source, name="linked", force=True)
    by_id(source, force=True)


def test_images_can_be_symbolic_links(source):
    refer = by_id(source, rows_by_id(), link=True).refer
    for image_id in refer.Imgs:
        path = refer.get_image_path(image_id)
        assert path.is_symlink()
        assert path.resolve() == (source / "photos" / file_name(image_id)).resolve()
    by_id(source, force=True)
    assert (source / "photos" / file_name(1)).is_file(), "replacing links does not delete the images"


@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left on device"), UserError)],
)
def test_an_interruption_keeps_the_old_dataset(source, monkeypatch, error, raised):
    by_id(source, rows_by_id())
    before = contents(source / "data")
    copied = []

    def failing_copy(source, target):
        copied.append(target)
        if len(copied) > 3:
            raise error
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(shutil, "copyfile", failing_copy)
    for options in ({"force": True}, {"name": "new"}):
        with pytest.raises(raised):
            by_id(source, rows_by_id([4, 5, 6, 7, 8]), shares=ONLY_TRAIN, **options)
    assert contents(source / "data") == before
    assert [path.name for path in (source / "data").iterdir()] == ["mine"]


def kill_during(source, owner, function, nth):
    """Convert in a process that is killed with SIGKILL in its nth call of ``owner.function``."""

    def run():
        original, calls = getattr(owner, function), []

        def killing(*args, **kwargs):
            calls.append(args)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, function, killing)
        by_id(source, rows_by_id([4, 5]), shares=ONLY_TRAIN, force=True, link=True)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_after_a_kill_the_old_dataset_is_complete_and_the_next_call_works(source):
    by_id(source, rows_by_id())
    old = contents(source / "data/mine")
    kill_during(source, os, "symlink", 2)
    assert contents(source / "data/mine") == old
    assert (source / "data/.mine.part").is_dir()
    kill_during(source, Path, "rename", 1)
    assert contents(source / "data/mine") == old
    kill_during(source, Path, "rename", 2)  # the old folder is renamed, the new one is not yet
    assert not (source / "data/mine").exists()
    with pytest.raises(UserError, match="data/mine exists"):
        by_id(source)
    assert contents(source / "data") == {f"mine/{name}": content for name, content in old.items()}, "restored"
    by_id(source, rows_by_id([4, 5]), shares=ONLY_TRAIN, force=True)
    assert len(list((source / "data/mine/images").iterdir())) == 2
    assert [path.name for path in (source / "data").iterdir()] == ["mine"]


def test_two_processes_do_not_write_the_same_dataset(source):
    with atomic_folder(source / "data/mine") as new:
        with pytest.raises(UserError, match="Another process is writing"):
            by_id(source, rows_by_id())
        assert new.is_dir()
        (new / "x").touch()
    assert (source / "data/mine/x").exists()
