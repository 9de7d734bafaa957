"""python -m data.refshapes: the same settings give the same bytes, and no folder is half made or lost."""

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from commands import contents, run_in_process

from data import refshapes
from data.refshapes.__main__ import render, write_refshapes
from lib.errors import UserError

TINY = {"train_images": 5, "val_images": 3, "testA_images": 2, "testB_images": 2}
TINY_FLAGS = [f"--{name.replace('_', '-')}={count}" for name, count in TINY.items()]


@pytest.fixture
def make(monkeypatch, capsys):
    """Run the command in this process."""
    return lambda *flags: run_in_process(refshapes.main, ["refshapes", *flags], monkeypatch, capsys)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small set made in another process, and what the command printed."""
    root = tmp_path_factory.mktemp("tiny")
    command = [sys.executable, "-m", "data.refshapes", "--root", str(root / "new" / "root"), *TINY_FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return SimpleNamespace(folder=root / "new" / "root" / "refshapes", out=done.stdout, err=done.stderr)


def test_same_settings_same_bytes(tiny, tmp_path):
    first = contents(tiny.folder)
    assert len(first) == 12 + 4
    assert contents(write_refshapes(tmp_path / "a", **TINY)) == first
    other = contents(write_refshapes(tmp_path / "b", seed=1, **TINY))
    assert all(other[name] != first[name] for name in first if name != "vocab.txt")
    more = contents(write_refshapes(tmp_path / "c", **{**TINY, "train_images": 1, "val_images": 6}))
    assert {n: b for n, b in more.items() if n in first and n.endswith("jpg")}.items() <= first.items()


def test_the_command_reports_counts_and_path(tiny):
    info = json.loads((tiny.folder / "refshapes.json").read_text())
    *_, last = tiny.out.splitlines()
    for split, images in (("train", 5), ("val", 3), ("testA", 2), ("testB", 2)):
        counts = f"{split} {images} images, {info['refs'][split]} refs, {info['expressions'][split]} expressions"
        assert counts in last
    assert last.endswith(str(tiny.folder))
    assert tiny.err == ""  # no bar where there is no terminal


def test_a_second_run_does_nothing(tmp_path, make):
    folder = write_refshapes(tmp_path, **TINY)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    again = make("--root", tmp_path, *TINY_FLAGS)
    assert again.status == 0
    told = again.out.splitlines()
    assert "nothing to do" in told[0]
    assert len(told) == 2
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    forced = make("--root", tmp_path, "--force", *TINY_FLAGS)
    assert forced.status == 0
    assert "nothing to do" not in forced.out
    assert (folder / "instances.json").stat().st_mtime_ns != before[folder / "instances.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["refshapes"]


def test_other_settings_and_damage_make_it_anew(tmp_path):
    folder = write_refshapes(tmp_path, **TINY)
    good = contents(folder)
    next((folder / "images").iterdir()).unlink()
    assert contents(write_refshapes(tmp_path, **TINY)) == good
    write_refshapes(tmp_path, level="full", **TINY)
    assert json.loads((folder / "refshapes.json").read_text())["level"] == "full"
    assert [p.name for p in tmp_path.iterdir()] == ["refshapes"]


def interrupt(monkeypatch, error):
    calls = itertools.count()

    def stop(scene):
        if next(calls) == 4:
            raise error
        return render(scene)

    monkeypatch.setattr(refshapes, "render", stop)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, make):
    interrupt(monkeypatch, KeyboardInterrupt())
    assert make("--root", tmp_path, *TINY_FLAGS) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_keeps_the_old_set(tmp_path, monkeypatch, make):
    folder = write_refshapes(tmp_path, **TINY)
    before = contents(folder)
    interrupt(monkeypatch, OSError(28, "No space left on device"))
    done = make("--root", tmp_path, "--seed", "1", *TINY_FLAGS)
    assert done.status == 2
    assert done.err == f"error: can't write {folder}: No space left on device\n"
    assert contents(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["refshapes"]


def test_a_failed_rename_brings_the_old_set_back(tmp_path, monkeypatch):
    folder = write_refshapes(tmp_path, **TINY)
    before = contents(folder)
    path_type, rename = type(folder), type(folder).rename

    def refuse(self, target):
        if target == folder and not self.name.endswith(".old"):
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(path_type, "rename", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        write_refshapes(tmp_path, seed=1, **TINY)
    assert contents(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["refshapes"]


def test_killed_between_two_renames_the_old_set_comes_back(tmp_path, monkeypatch):
    folder = write_refshapes(tmp_path, **TINY)
    before = contents(folder)
    folder.rename(tmp_path / ".refshapes.old")  # what kill -9 leaves there
    (tmp_path / ".refshapes.part").mkdir()
    interrupt(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(UserError, match="No space left"):
        write_refshapes(tmp_path, seed=1, **TINY)
    assert contents(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["refshapes"]


@pytest.mark.parametrize("flags", [[], ["--force"]])
def test_what_is_not_refshapes_is_left_alone(tmp_path, make, flags):
    folder = tmp_path / "refshapes"
    folder.mkdir()
    (folder / "refshapes.json").write_text('{"name": "my holidays"}')
    assert "not a RefShapes set" in make("--root", tmp_path, *TINY_FLAGS, *flags).err
    assert contents(folder) == {"refshapes.json": b'{"name": "my holidays"}'}


def test_strangers_in_the_folder_are_not_deleted(tmp_path):
    folder = write_refshapes(tmp_path, **TINY)
    (folder / "notes.txt").write_text("mine")
    assert write_refshapes(tmp_path, **TINY) == folder
    with pytest.raises(UserError, match=r"notes\.txt"):
        write_refshapes(tmp_path, seed=1, **TINY)
    (folder / "notes.txt").rename(folder / "images" / "notes.txt")
    with pytest.raises(UserError, match=r"notes\.txt"):
        write_refshapes(tmp_path, force=True, **TINY)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--level", "hard"], "unknown level 'hard': choose basic or full"),
        (["--seed", "-1"], "the seed must be 0 or more"),
        (["--val-images", "-3"], "number of val images must be from 0"),
        (["--testB-images", "1000000"], "number of testB images must be from 0"),
        ([f"--{split}-images=0" for split in ("train", "val", "testA", "testB")], "nothing to write"),
        (["--root", "{file}"], "can't write"),
        (["--trian-images", "3"], "unknown flag --trian-images; did you mean --train-images?"),
        (["--lev", "basic"], "unknown flag --lev"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, make, flags, told):
    (tmp_path / "file").write_text("in the way")
    flags = [flag.format(file=tmp_path / "file") for flag in flags]
    shown = make("--root", tmp_path, *flags)
    assert shown.status == 2
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert told in shown.err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
