"""What all parts of refer.prepare use: recorded hashes, replacement of files, free space, progress."""

import filecmp
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib.cli import LOGGER
from lib.errors import UserError
from lib.files import check_writable, file_sha256, fsync, translate_write_errors, write_text
from lib.locks import lock
from lib.terminal import draws_bars

DOWNLOADS = "downloads"  # folder in the data root and in pretrained/, removed when it is empty
HASHES_FILE = "hashes.json"
MIN_PROGRESS_BYTES = 10_000_000
LOG_INTERVAL = 15.0  # seconds between progress lines if stderr is not a terminal


class RejectedError(Exception):
    """A source has no valid file and is not tried again. The next source is tried instead."""


class Hashes:
    """Sizes and SHA-256 sums of verified files, stored in ``hashes.json`` of a folder.

    No checksums of these files are published. Therefore the first file that passes all checks is recorded, and later
    downloads and the installed files are compared with it.

    Raises:
        UserError: ``hashes.json`` is corrupt.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder, HASHES_FILE)
        self.known: dict[str, dict[str, Any]] = {}
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8")).items()
            self.known = {name: {"size": int(entry["size"]), "sha256": str(entry["sha256"])} for name, entry in entries}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise UserError(f"{self.path} is corrupt. Delete it to record all hashes again.") from error

    def difference(self, name: str, path: Path) -> str:
        """Describe how a file differs from the entry ``name``; empty if it does not or if there is no entry."""
        recorded = self.known.get(name)
        if recorded is None:
            return ""
        size, hint = path.stat().st_size, f"If the file is right, delete the entry {name!r} in {self.path}"
        if size != recorded["size"]:
            return f"has {size} bytes instead of the recorded {recorded['size']}. {hint}"
        sha256 = file_sha256(path)
        if sha256 != recorded["sha256"]:
            return f"has SHA-256 {sha256[:12]}… instead of the recorded {recorded['sha256'][:12]}…. {hint}"
        return ""

    def record(self, files: Mapping[str, Path]) -> None:
        """Record the files {name: path} that have no entry yet. UserError: ``hashes.json`` cannot be written."""
        new = {name: path for name, path in files.items() if name not in self.known}
        for name, path in new.items():
            self.known[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        if new:
            write_text(self.path, json.dumps(self.known, indent=2, sort_keys=True) + "\n")


class Progress(tqdm):
    """A progress bar, or a log line every 15 seconds if stderr draws no bars. Files below 10 MB have neither."""

    def __init__(self, description: str, total: int | None, *, initial: int = 0, unit: str = "B") -> None:
        settings: dict[str, Any] = {"desc": description, "total": total, "initial": initial, "unit": unit}
        settings["unit_scale"] = unit == "B"
        settings["disable"] = unit == "B" and total is not None and total < MIN_PROGRESS_BYTES
        self.is_logged = not draws_bars()
        if self.is_logged:
            settings["bar_format"] = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}"
            settings |= {"mininterval": LOG_INTERVAL, "maxinterval": 2 * LOG_INTERVAL, "delay": LOG_INTERVAL}
            settings["file"] = io.StringIO()  # otherwise tqdm.write, which prints log lines, would call display again
        super().__init__(dynamic_ncols=True, **settings)

    def display(self, *args: Any, **kwargs: Any) -> None:
        """Draw the bar or log the line. tqdm calls this at most once per interval."""
        if self.is_logged:
            LOGGER.debug(str(self))
        else:
            super().display(*args, **kwargs)


def replace_keeping(source: Path, target: Path) -> None:
    """Flush ``source`` to the disk and rename it. Another file named ``target`` is kept as ``<target>.replaced``."""
    with translate_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        fsync(source)
        if target.exists() and not filecmp.cmp(source, target, shallow=False):
            names = (Path(f"{target}.replaced{number or ''}") for number in itertools.count())
            kept = next(path for path in names if not os.path.lexists(path))
            target.replace(kept)
            LOGGER.warning(f"{target} was replaced. The previous file was kept as {kept.name}.")
        source.replace(target)


def link_or_copy(source: Path, target: Path) -> None:
    """Create a hard link, or a copy if the paths are on different disks."""
    target.unlink(missing_ok=True)  # copying into an existing hard link would change the file it links to
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def check_free_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise a UserError if the disk of ``folder`` has less than ``needed`` free bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        needed_text, free_text = tqdm.format_sizeof(needed, "B"), tqdm.format_sizeof(free, "B")
        raise UserError(f"{purpose} needs {needed_text} in {folder}, but only {free_text} are free.")


@contextmanager
def locked_hashes(folder: Path) -> Iterator[Hashes]:
    """Create a folder, lock it during the block, and yield its hashes.

    Two processes would overwrite each other's files. The folder of downloads is removed afterwards if it is empty.

    Raises:
        UserError: another process holds the lock, the folder is not writable, or ``hashes.json`` is corrupt.
    """
    check_writable(folder / HASHES_FILE)
    with lock(folder / ".lock", f"Another process is writing {folder}"):
        try:
            yield Hashes(folder)
        finally:
            with suppress(OSError):
                Path(folder, DOWNLOADS).rmdir()
