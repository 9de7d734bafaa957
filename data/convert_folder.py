"""The folder of a dataset: written beside under a hidden name and put in place when it is whole."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refer.datasets import DATASETS
from refer.files import read_instances
from utils import UserError, writing

INFO_FILE, SHEET_FILE = "convert.json", "samples.png"
MADE_BY = "python -m data.convert"
RESERVED = {"images": "COCO's pictures", "downloads": "what `python -m refer.prepare` is fetching"}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+.-]{0,99}")  # a folder's everywhere, and no flag of a shell


def check_names(name: str, split_by: str) -> None:
    """UserError unless a set and its split system can be called so."""
    if name in DATASETS or name in RESERVED:
        whose = RESERVED.get(name, "a published dataset")
        raise UserError(f"--name {name}: that folder is for {whose}; choose another")
    for flag, value in (("--name", name), ("--splitBy", split_by)):
        if not NAME.fullmatch(value):
            raise UserError(f"{flag} {value!r}: use letters, digits, _, -, + and ., and not - or . at the beginning")


@contextmanager
def made_aside(folder: Path) -> Iterator[Path]:
    """Yields a hidden folder beside, for the new content; without an error it becomes ``folder``.

    Whatever ends the process, ``folder`` holds all of the old content or all of the new one; only between two
    renames it is away, and then the next call puts the old one back first.

    Raises:
        UserError: it can't be written, or another process is doing the same.
    """
    new, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    with writing(folder):
        new.mkdir(parents=True, exist_ok=True)
        handle = os.open(new, os.O_RDONLY)
    try:
        _lock(handle, new)
        try:
            with writing(folder):
                if old.exists() and not os.path.lexists(folder):
                    old.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
                for path in new.iterdir():  # of a process that was killed
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            yield new
            with writing(folder):
                _put_in_place(new, folder, old)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _lock(handle: int, new: Path) -> None:
    taken = False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have put it in place since it was opened here.
        taken = not new.exists() or not os.path.samestat(os.fstat(handle), os.stat(new))
    except BlockingIOError:
        taken = True
    except OSError:
        pass  # a file system without locks
    if taken:
        raise UserError(f"another process is writing {new}: wait for it")


def _put_in_place(new: Path, folder: Path, old: Path) -> None:
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: Path, force: bool, sources: Iterable[Path]) -> None:
    """UserError where something is there already, unless it is a set of this tool's, is to be replaced, and none of
    the ``sources`` is in it."""
    if not os.path.lexists(folder):
        return
    info = _read_info(folder)
    if folder.is_symlink() or info is None:
        raise UserError(f"{folder} is there and wasn't made by `{MADE_BY}`: choose another --name, or move it")
    if not force:
        raise UserError(f"{folder} is there already: replace it with --force, or choose another --name")
    for source in sources:
        if source.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{source} is in {folder}, which is to be replaced: move it first")
    known = {INFO_FILE, SHEET_FILE, "instances.json", "images", f"refs({info.get('splitBy')}).p"}
    strangers = {path.name for path in folder.iterdir()} - known
    if (folder / "images").is_dir():
        pictures = {image["file_name"] for image in read_instances(folder / "instances.json")["images"]}
        files = (path for path in (folder / "images").rglob("*") if path.is_symlink() or not path.is_dir())
        strangers |= {
            f"images/{name}" for path in files if (name := str(path.relative_to(folder / "images"))) not in pictures
        }
    if strangers:
        raise UserError(f"{folder} also holds {min(strangers)}, which wasn't made by `{MADE_BY}`: move it first")


def _read_info(folder: Path) -> dict[str, Any] | None:
    """What was written about a set when it was made; None where the folder is none of this tool's."""
    try:
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) and info.get("made_by") == MADE_BY else None
