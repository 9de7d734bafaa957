"""The folder of a dataset: written beside under a hidden name and put in place when it is whole."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.errors import UserError
from lib.files import translate_write_errors


@contextmanager
def made_aside(folder: Path) -> Iterator[Path]:
    """Yields a hidden folder beside, for the new content; without an error it becomes ``folder``.

    Whatever ends the process, ``folder`` holds all of the old content or all of the new one; only between two
    renames it is away, and then the next call puts the old one back first.

    Raises:
        UserError: it can't be written, or another process is doing the same.
    """
    new, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    with translate_write_errors(folder):
        new.mkdir(parents=True, exist_ok=True)
        handle = os.open(new, os.O_RDONLY)
    try:
        _lock(handle, new)
        try:
            with translate_write_errors(folder):
                if old.exists() and not os.path.lexists(folder):
                    old.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
                for path in new.iterdir():  # of a process that was killed
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            yield new
            with translate_write_errors(folder):
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
    """Rename ``new`` to ``folder``; what was there is ``old`` in the meantime, and comes back where that fails."""
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
