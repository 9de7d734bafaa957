"""python -m data.refshapes: equal settings give identical files, and no dataset is left incomplete or lost."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import contents, run_in_process
from PIL import Image

from data.refshapes import __main__ as tool
from data.refshapes.dataset import write_refshapes
from lib.errors import UserError

TINY = {"train_images": 5, "val_images": 3, "testA_images": 2, "testB_images": 2}
TINY_FLAGS = [f"--{name.replace('_', '-')}={count}" for name, count in TINY.items()]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process."""
    return lambda *flags: run_in_process(tool.main, ["refshapes", *flags], monkeypatch, capsys)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small dataset that another process generated, and the output of the command."""
    root = tmp_path_factory.mktemp("tiny")
    command = [sys.executable, "-m", "data.refshapes", "--root", str(root / "new" / "root"), *TINY_FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return SimpleNamespace(folder=root / "new" / "root" / "refshapes", out=done.stdout, err=done.stderr)


def test_equal_settings_give_identical_files(tiny, tmp_path):
    first = contents(tiny.folder)
    assert len(first) == 12 + 4
    assert contents(write_refshapes(tmp_path / "a", **TINY)) == first
    other = contents(write_refshapes(tmp_path / "b", seed=1, **TINY))
    assert all(other[name] != first[name] for name in first if name != "vocab.txt")
    other_sizes = contents(write_refshapes(tmp_path / "c", **{**TINY, "train_images": 1, "val_images": 6}))
    assert {n: b for n, b in other_sizes.items() if n in first and n.endswith("jpg")}.items() <= first.items()


def test_the_command_reports_counts_and_path(tiny):
    info = json.loads((tiny.folder / "refshapes.json").read_text())
    lines = tiny.out.splitlines()
    for split, images in (("train", 5), ("val", 3), ("testA", 2), ("testB", 2)):
        assert (
            f"{split}: {images} images, {info['refs'][split]} refs, {info['expressions'][split]} expressions" in lines
        )
    assert lines[-1] == f"in {tiny.folder}"
    assert tiny.err == "", "no progress bar without a terminal"


def test_help_imports_neither_numpy_nor_pillow():
    code = "import sys; from data.refshapes import __main__; __main__.get_parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "PIL"} & set(done.stdout.split())


def test_a_complete_dataset_is_not_generated_again(tmp_path, run):
    folder = write_refshapes(tmp_path, **TINY)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = run("--root", tmp_path, *TINY_FLAGS)
    assert again.status == 0
    assert "nothing to do" in again.out.splitlines()[0]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    forced = run("--root", tmp_path, "--force", *TINY_FLAGS)
    assert forced.status == 0
    assert "nothing to do" not in forced.out
    assert (folder / "instances.json").stat().st_mtime_ns != before[folder / "instances.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["refshapes"]


def test_other_settings_or_a_missing_image_generate_it_again(tmp_path):
    folder = write_refshapes(tmp_path, **TINY)
    complete = contents(folder)
    next((folder / "images").iterdir()).unlink()
    assert contents(write_refshapes(tmp_path, **TINY)) == complete
    write_refshapes(tmp_path, level="full", **TINY)
    assert json.loads((folder / "refshapes.json").read_text())["level"] == "full"
    assert [path.name for path in tmp_path.iterdir()] == ["refshapes"]


def fail_at_the_fourth_image(monkeypatch, error):
    save, saved = Image.Image.save, []

    def failing_save(self, *args, **kwargs):
        saved.append(args)
        if len(saved) == 4:
            raise error
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", failing_save)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, run):
    fail_at_the_fourth_image(monkeypatch, KeyboardInterrupt())
    assert run("--root", tmp_path, *TINY_FLAGS) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_dataset(tmp_path, monkeypatch, run):
    folder = write_refshapes(tmp_path, **TINY)
    before = contents(folder)
    fail_at_the_fourth_image(monkeypatch, OSError(28, "No space left on device"))
    done = run("--root", tmp_path, "--seed", "1", *TINY_FLAGS)
    assert done.status == 2
    assert done.err == f"error: Cannot write {folder}: No space left on device.\n"
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["refshapes"]


def test_a_failed_rename_restores_the_old_dataset(tmp_path, monkeypatch):
    folder = write_refshapes(tmp_path, **TINY)
    before = contents(folder)
    rename = Path.rename

    def refuse(self, target):
        if target == folder and not self.name.endswith(".old"):
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        write_refshapes(tmp_path, seed=1, **TINY)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["refshapes"]


def test_the_old_dataset_is_restored_after_a_kill_between_two_renames(tmp_path, monkeypatch):
    folder = write_refshapes(tmp_path, **TINY)
    before = contents(folder)
    folder.rename(tmp_path / ".refshapes.old")  # what kill -9 leaves there
    (tmp_path / ".refshapes.part").mkdir()
    fail_at_the_fourth_image(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(UserError, match="No space left"):
        write_refshapes(tmp_path, seed=1, **TINY)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["refshapes"]


@pytest.mark.parametrize("flags", [[], ["--force"]])
def test_another_folder_of_that_name_is_not_replaced(tmp_path, run, flags):
    folder = tmp_path / "refshapes"
    folder.mkdir()
    (folder / "refshapes.json").write_text('{"name": "my holidays"}')
    assert "is not a RefShapes dataset" in run("--root", tmp_path, *TINY_FLAGS, *flags).err
    assert contents(folder) == {"refshapes.json": b'{"name": "my holidays"}'}


def test_other_files_in_the_folder_are_not_deleted(tmp_path):
    folder = write_refshapes(tmp_path, **TINY)
    (folder / "notes.txt").write_text("mine")
    assert write_refshapes(tmp_path, **TINY) == folder
    with pytest.raises(UserError, match=r"notes\.txt"):
        write_refshapes(tmp_path, seed=1, **TINY)
    (folder / "notes.txt").rename(folder / "images" / "notes.txt")
    with pytest.raises(UserError, match=r"notes\.txt"):
        write_refshapes(tmp_path, force=True, **TINY)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--level", "hard"], "argument --level: invalid choice: 'hard'"),
        (["--seed", "-1"], "--seed -1: must be 0 or more."),
        (["--val-images", "-3"], "--val-images -3: must be from 0 to 999999."),
        (["--testB-images", "1000000"], "--testB-images 1000000: must be from 0 to 999999."),
        ([f"--{split}-images=0" for split in ("train", "val", "testA", "testB")], "Nothing to write"),
        (["--root", "{file}"], "Cannot write"),
        (["--trian-images", "3"], "Unknown flag --trian-images. Did you mean --train-images?"),
        (["--lev", "basic"], "Unknown flag --lev"),
    ],
)
def test_mistakes_are_reported_in_one_line(tmp_path, run, flags, message):
    (tmp_path / "file").write_text("a file instead of a folder")
    done = run("--root", tmp_path, *(flag.format(file=tmp_path / "file") for flag in flags))
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith(f"error: {message}")
    assert done.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
