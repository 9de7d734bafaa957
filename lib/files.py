"""Reading and writing files safely: checksums, atomic writes, checks before long computations. Imports no torch."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.errors import UserError


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def translate_write_errors(path: str | Path) -> Iterator[None]:
    """Raise an OSError of the block, such as a full disk, as a UserError that names ``path``."""
    try:
        yield
    except UserError:  # MissingFileError is an OSError too
        raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` if the block succeeds, so that ``path`` is never half written.

    Raises:
        UserError: the folder is not writable, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with translate_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for stale in path.parent.glob(f".{path.name}.*.part"):  # left by a process that was killed while writing
                stale.unlink(missing_ok=True)
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)  # otherwise a power failure could undo the rename
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically. UserError: it cannot be written."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: str | Path, *, suffix: str = "", inputs: Iterable[str | Path] = ()) -> None:
    """Check before a long computation that its result can be written.

    Args:
        path: of the output file.
        suffix: required ending of its name.
        inputs: files and folders that the command reads; none of them may be overwritten.

    Raises:
        UserError: ``path`` is a folder or an input, has another suffix, or its folder is not writable.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"cannot write {path}: the name must end in {suffix}")
    if path.exists() and any(path.resolve().is_relative_to(Path(item).resolve()) for item in inputs):
        raise UserError(f"cannot write {path}: it is one of the input files")
    with translate_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
