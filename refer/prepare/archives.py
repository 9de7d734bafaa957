"""Unpack zip archives from the internet safely.

If any member could be written outside the target folder, is a link, or has an impossible size, the whole archive is
rejected before anything is written. The caller chooses the path of each unpacked member.
"""

import lzma
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.files import translate_write_errors
from refer.prepare.files import RejectedError

CHUNK = 1 << 20  # bytes
MAX_BYTES = 64 * 10**9  # total size of the unpacked members
MAX_RATIO = 1100  # deflate compresses at most by a factor of about 1032
ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    EOFError, NotImplementedError, RuntimeError, ValueError,
)  # fmt: skip


class Archive:
    """A zip file whose members have been checked; see :func:`open_archive`."""

    def __init__(self, path: Path, file: zipfile.ZipFile) -> None:
        _check_members(path, file.infolist())
        self._file = file

    def files(self, folder: str) -> dict[str, zipfile.ZipInfo]:
        """Return {file name: member} of the files directly inside folders of this name, at any depth.

        Raises:
            RejectedError: two files have the same name.
        """
        found: dict[str, zipfile.ZipInfo] = {}
        for member in self._file.infolist():
            *parents, name = member.filename.split("/")
            if parents[-1:] != [folder] or member.is_dir() or "__MACOSX" in parents or name == ".DS_Store":
                continue
            if name in found:
                raise RejectedError(f"two files are named {folder}/{name}")
            found[name] = member
        return found

    def extract(self, member: zipfile.ZipInfo, target: Path) -> None:
        """Write a member's content to a file.

        Raises:
            RejectedError: the member is corrupt.
            UserError: the file cannot be written.
        """
        remaining = member.file_size
        with (
            translate_write_errors(target),
            open(target, "wb") as file,
            _reject_corrupt(),
            self._file.open(member) as source,
        ):
            while chunk := source.read(min(CHUNK, remaining + 1)):  # reads to the end, where zipfile compares the CRC
                remaining -= len(chunk)
                if remaining < 0:
                    break
                file.write(chunk)
        if remaining:
            raise RejectedError(f"{member.filename} does not have the size given in the archive")


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open and check a zip file. RejectedError: it is corrupt or unsafe."""
    with _reject_corrupt():
        try:
            file = zipfile.ZipFile(path)
        except OSError as error:
            raise RejectedError(f"cannot be read: {error.strerror or error}") from error
    with file:
        yield Archive(path, file)


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    names: set[str] = set()
    for member in members:
        name = member.orig_filename  # as stored; zipfile truncates ``filename`` at a zero byte
        reason = ""
        if name.startswith("/") or re.match("[A-Za-z]:", name) or "\\" in name or "\0" in name:
            reason = "is not a plain relative name"
        elif ".." in name.split("/"):
            reason = "is outside the folder"
        elif stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            reason = "is a link or a device"
        elif member.flag_bits & 1:
            reason = "is encrypted"
        elif name in names:
            reason = "occurs twice"
        elif member.file_size > MAX_RATIO * (member.compress_size + 1):
            reason = f"claims to unpack {member.compress_size} bytes to {member.file_size}"
        if reason:
            raise RejectedError(f"unsafe archive: member {name!r} {reason}")
        names.add(name)
    packed, unpacked = sum(member.compress_size for member in members), sum(member.file_size for member in members)
    if packed > path.stat().st_size or unpacked > MAX_BYTES:
        raise RejectedError(f"unsafe archive: its members claim to unpack {packed} bytes to {unpacked}")


@contextmanager
def _reject_corrupt() -> Iterator[None]:
    try:
        yield
    except ZIP_ERRORS as error:
        details = " ".join(str(error).split())[:200] or type(error).__name__
        raise RejectedError(f"corrupt or not a zip file ({details})") from error
