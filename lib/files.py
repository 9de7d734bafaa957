"""Reading and writing files safely: checksums, atomic writes, checks before long computations. Imports no torch."""

import hashlib
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lib.errors import UserError
from lib.locks import lock

METRICS_FILE = "metrics.jsonl"  # in the log folder of a training run


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def duplicate_files(paths: Iterable[Path], *, suspects: Collection[Path] | None = None) -> list[list[Path]]:
    """Return the groups of files with identical content. Only files of equal size are read.

    Args:
        paths: files to compare. Missing and unreadable files are in no group.
        suspects: return only groups in which a file of equal size is one of these; None: return all groups.
    """
    same_size = _group(paths, lambda path: path.stat().st_size)
    if suspects is not None:
        same_size = [group for group in same_size if any(path in suspects for path in group)]
    return [duplicates for group in same_size for duplicates in _group(group, file_sha256)]


def _group(paths: Iterable[Path], key: Callable[[Path], object]) -> list[list[Path]]:
    """Return the groups of two or more readable files with the same key."""
    groups: dict[object, list[Path]] = defaultdict(list)
    for path in paths:
        with suppress(OSError):
            groups[key(path)].append(path)
    return [group for group in groups.values() if len(group) > 1]


@contextmanager
def translate_write_errors(path: str | Path) -> Iterator[None]:
    """Raise an OSError of the block, such as a full disk, as a UserError that names ``path``."""
    try:
        yield
    except UserError:  # MissingFileError is an OSError too
        raise
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error


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
        if temporary.exists():
            temporary.unlink()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces the folder ``path`` if the block succeeds.

    ``path`` never has incomplete content, even if the process is killed. If it is killed between the two renames,
    ``path`` is missing until the next call, which restores the old folder.

    Raises:
        UserError: the folder is not writable, the disk is full, or another process is writing the same folder.
    """
    path = Path(path)
    new, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    busy = f"Another process is writing {path}"
    with translate_write_errors(path), lock(path.with_name(f".{path.name}.lock"), busy):
        new.mkdir(parents=True, exist_ok=True)
        try:
            _restore(path, old)
            shutil.rmtree(old, ignore_errors=True)
            for stale in new.iterdir():  # left by a process that was killed while writing
                shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()
            yield new
            if path.exists():
                path.rename(old)
            new.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            _restore(path, old)
            shutil.rmtree(new, ignore_errors=True)
            raise


def _restore(path: Path, old: Path) -> None:
    """Rename the old folder back if ``path`` does not exist."""
    if old.exists() and not os.path.lexists(path):
        old.rename(path)


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
        path: the output file.
        suffix: required ending of the file name.
        inputs: files and folders that the command reads; none of them may be overwritten.

    Raises:
        UserError: ``path`` is a folder or an input, has another suffix, or its folder is not writable.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"Cannot write {path}: it is a folder.")
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"Cannot write {path}: the name must end in {suffix}.")
    if path.exists() and any(path.resolve().is_relative_to(Path(item).resolve()) for item in inputs):
        raise UserError(f"Cannot write {path}: it is one of the input files.")
    with translate_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
