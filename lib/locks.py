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

from lib.errors import UserError

_descriptors: set[int] = set()  # of the locks that this process holds


@contextmanager
def lock(path: str | Path, busy: str) -> Iterator[None]:
    """Hold an exclusive lock; its file is deleted at the end.

    The lock belongs to this process only. Forked children, such as data-loading workers, close their copy of the
    descriptor: otherwise a worker that outlives its killed parent would keep the lock.

    Args:
        path: of the lock file. It contains who holds the lock.
        busy: start of the error message if another process holds it; the holder is appended in parentheses.

    Raises:
        UserError: another process holds the lock, or the file cannot be written.
    """
    path = Path(path)
    try:
        descriptor = _acquire(path, busy)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error
    _descriptors.add(descriptor)
    _close_in_forked_children()
    try:
        holder = f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{holder}: {shlex.join(sys.argv)}\n".encode(errors="replace"), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        _descriptors.discard(descriptor)
        os.close(descriptor)


def _acquire(path: Path, busy: str) -> int:
    """Open and lock the file; return its descriptor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(f"{busy} ({holder or 'another process'}).") from error
        except OSError:  # a file system without locks
            return descriptor
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # deleted by its holder between open() and flock()


def _close_descriptors() -> None:
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


@functools.cache
def _close_in_forked_children() -> None:
    """Register the handler once per process."""
    os.register_at_fork(after_in_child=_close_descriptors)
