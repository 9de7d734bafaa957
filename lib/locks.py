"""Exclusive locks between processes, released by the kernel when the process that holds them dies. Imports no torch."""

import fcntl
import functools
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lib.errors import UserError

_descriptors: set[int] = set()  # of the locks that this process holds


class Lock(NamedTuple):
    """A lock that this process holds."""

    path: Path
    descriptor: int

    def is_lost(self) -> bool:
        """Return whether somebody has deleted the lock file, so that another process can hold a lock of that name."""
        return not _is_open_at(self.descriptor, self.path)


@contextmanager
def lock(path: str | Path, busy: str, advice: str = "") -> Iterator[Lock]:
    """Hold an exclusive lock; its file is deleted at the end.

    The lock belongs to this process only. Forked children, such as data-loading workers, close their copy of the
    descriptor: otherwise a worker that outlives its killed parent would keep the lock.

    Args:
        path: of the lock file. It contains who holds the lock.
        busy: start of the error message if another process holds it; the holder is appended in parentheses.
        advice: end of that message: what to do.

    Raises:
        UserError: another process holds the lock, or the file cannot be written.
    """
    path = Path(path)
    try:
        descriptor = _acquire(path, busy, advice)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error
    _descriptors.add(descriptor)
    _close_in_forked_children()
    try:
        holder = f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{holder}: {shlex.join(sys.argv)}\n".encode(errors="replace"), 0)
        yield Lock(path, descriptor)
    finally:
        if descriptor in _descriptors:  # not in a forked child
            if _is_open_at(descriptor, path):
                path.unlink()
            _descriptors.discard(descriptor)
            os.close(descriptor)


def check_unlocked(path: str | Path, busy: str, advice: str = "") -> None:
    """Raise the UserError of :func:`lock` if a process holds the lock. Changes and creates no file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # it does not exist, or lock() will raise the reason
    try:
        _flock(descriptor, fcntl.LOCK_SH, busy, advice)  # shared: two checks at the same time do not disturb each other
    finally:
        os.close(descriptor)


def _flock(descriptor: int, operation: int, busy: str, advice: str) -> None:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        raise UserError(f"{busy} ({holder or 'another process'}). {advice}".strip()) from error
    except OSError:  # a file system without locks
        pass


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file still exists at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _acquire(path: Path, busy: str, advice: str) -> int:
    """Open and lock the file; return its descriptor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _flock(descriptor, fcntl.LOCK_EX, busy, advice)
        except UserError:
            os.close(descriptor)
            raise
        if _is_open_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # deleted by its holder between open() and flock()


def _close_descriptors() -> None:
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


@functools.cache
def _close_in_forked_children() -> None:
    """Register the handler once per process."""
    os.register_at_fork(after_in_child=_close_descriptors)
