"""What a converted dataset may be called, and which folder it may replace."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lib.errors import UserError
from refer.annotations import read_instances
from refer.datasets import DATASETS

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
    # What a process that was killed while it drew the sheet has left is this tool's, too.
    half = f".{SHEET_FILE}.*.part"
    strangers = {path.name for path in folder.iterdir() if not path.match(half)} - known
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
