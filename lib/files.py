"""Reading and writing files safely: checksums, atomic writes, protection of inputs. Imports no torch.

Commands write files only through this module, which refuses to replace an input of the command (:func:`protect`).
Files that were named by the user also replace no file of another kind (:class:`Kind`).
"""

import codecs
import hashlib
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from lib.errors import UserError
from lib.locks import lock

METRICS_FILE = "metrics.jsonl"  # in the log folder of a training run
HEAD_BYTES = 1 << 20  # from which the kind of a file is determined
_inputs: set[Path] | None = None  # resolved paths of the inputs of the running command; None: no command is running


class Kind(Enum):
    """What a file contains, according to its first bytes."""

    PNG = "a PNG image"
    JSON_LIST = "a JSON list"
    JSON_OBJECT = "a JSON object"
    JSON_LINES = "a file of JSON lines"
    TEXT = "a text file"
    BINARY = "a binary file"
    FOLDER = "a folder"


def kind_of(path: str | Path) -> Kind | None:
    """Return the kind of an existing file or folder. None: there is no such file, or it is empty."""
    path = Path(path)
    if path.is_dir():
        return Kind.FOLDER
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        first_line = file.readline(HEAD_BYTES)
        head = first_line + file.read(4096)
    if not head:
        return None
    if head.startswith(b"\x89PNG"):
        return Kind.PNG
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # the last character may be cut off
    except UnicodeDecodeError:
        return Kind.BINARY
    if re.search("[\0-\x08\x0e-\x1a]", text) or text.startswith(("(lp0", "(dp0")):  # a pickle of protocol 0
        return Kind.BINARY
    if re.match(r'\s*\[\s*[]["{\d-]', text):
        return Kind.JSON_LIST
    if first_line.startswith(b'{"') and first_line.endswith((b"}\n", b"}\r\n")):
        return Kind.JSON_LINES
    return Kind.JSON_OBJECT if re.match(r'\s*\{\s*["}]', text) else Kind.TEXT


@contextmanager
def protecting_inputs() -> Iterator[None]:
    """Within the block, such as the run of a command, the files declared by :func:`protect` cannot be replaced."""
    global _inputs
    previous = _inputs
    _inputs = set(previous or ())
    try:
        yield
    finally:
        _inputs = previous


def protect(*paths: str | Path) -> None:
    """Declare files as inputs of the running command, which it must not replace. A folder stands for all files in it.

    The parser does this for the files given by flags (:meth:`lib.cli.Parser.add_input`), and functions that read other
    files do it themselves. Links to an input are protected as well. Outside of :func:`protecting_inputs`, as in a
    notebook, this has no effect.
    """
    if _inputs is not None:
        _inputs.update(Path(path).resolve() for path in paths)


def release(*folders: str | Path) -> None:
    """Allow the running command to replace the files in these folders, because it continues what wrote them."""
    if _inputs is not None:
        resolved = {Path(folder).resolve() for folder in folders}
        _inputs.difference_update([path for path in _inputs if path.parent in resolved and not path.is_dir()])


def _find_input(path: Path) -> Path | None:
    """Return the input that is the file ``path``, or the input folder with that file; None: there is neither."""
    try:
        status = path.stat()
    except OSError:  # it does not exist
        return None
    for item in _inputs or ():
        if item.is_dir():
            # Only images are linked from folders, and files that are no images are not replaced by images.
            if path.resolve().is_relative_to(item) or (kind_of(path) is Kind.PNG and _is_linked(item, status)):
                return item
        elif item.exists() and item.samefile(path):
            return item
    return None


def _is_linked(folder: str | Path, status: os.stat_result) -> bool:
    """Return whether a file in the folder is a symbolic or hard link to the file with this status."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if _is_linked(entry.path, status):
                    return True
            elif entry.is_symlink() or entry.inode() == status.st_ino:
                with suppress(OSError):
                    if os.path.samestat(entry.stat(), status):
                        return True
    return False


def check_replaceable(path: str | Path, kind: Kind | None = None) -> None:
    """Check that an output file or folder replaces nothing but an earlier output. Nothing is written.

    Args:
        path: the output.
        kind: what it will contain; None: not checked. The name of an image must end in .png.

    Raises:
        UserError: the name is wrong, or the path exists and is an input of the command or of another kind.
    """
    path = Path(path)
    with translate_write_errors(path):
        problem = _find_problem(path, kind)
    if problem:
        raise UserError(f"Cannot write {path}: {problem}.")


def _find_problem(path: Path, kind: Kind | None) -> str:
    existing = kind_of(path)
    if kind is Kind.FOLDER:
        is_file = path.exists() and existing is not Kind.FOLDER
        return "it is a file, not a folder. Choose another name" if is_file else ""
    if existing is Kind.FOLDER:
        return "it is a folder"
    source = _find_input(path)
    if source is not None:
        if source.is_dir():
            return f"it is one of the input files, which are all files in {source}. Choose another name"
        link = "" if path.resolve() == source else f", {source}, under another name"
        return f"it is one of the input files{link}. Choose another name"
    if kind is Kind.PNG and path.suffix.lower() != ".png":
        return "the name must end in .png"
    if path.exists() and not path.is_file():
        return "it is not a regular file"
    if kind and existing and existing is not kind:
        return f"it exists and is {existing.value}, not {kind.value}. Choose another name"
    return ""


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
        UserError: the folder is not writable, the disk is full, or ``path`` is an input of the command.
    """
    path = Path(path)
    check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with translate_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for stale in path.parent.glob(f".{path.name}.*.part"):  # left by a process that was killed while writing
                stale.unlink(missing_ok=True)
            yield temporary
            check_replaceable(path)  # again, because the block may have read further inputs
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
            ``path`` contains an input of the command.
    """
    path = Path(path)
    _check_contains_no_input(path)
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
            _check_contains_no_input(path)
            if path.exists():
                path.rename(old)
            new.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            _restore(path, old)
            shutil.rmtree(new, ignore_errors=True)
            raise


def _check_contains_no_input(folder: Path) -> None:
    for item in _inputs or ():
        if item.exists() and item.is_relative_to(folder.resolve()):
            raise UserError(f"{item} is in {folder}, which would be replaced. Move it first.")


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


@contextmanager
def open_to_append(path: str | Path, *, must_exist: bool = False) -> Iterator[BinaryIO]:
    """Yield a file opened for appending. A missing file is created, unless it ``must_exist``.

    Raises:
        UserError: the file cannot be written, or is an input of the command.
    """
    check_replaceable(path)
    with translate_write_errors(path), open(path, "r+b" if must_exist else "ab") as file:
        file.seek(0, os.SEEK_END)
        yield file


def check_writable(path: str | Path, kind: Kind | None = None) -> None:
    """Check before a long computation that its result can be written; its folder is created.

    Args:
        path: the output file or folder.
        kind: what it will contain.

    Raises:
        UserError: as for :func:`check_replaceable`, or the folder is not writable.
    """
    path = Path(path)
    check_replaceable(path, kind)
    folder = path if kind is Kind.FOLDER else path.parent
    with translate_write_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
