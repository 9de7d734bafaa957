"""Unpacks zip archives from the internet: nothing in them is trusted.

An archive with a single member that could land outside the folder, a link, or sizes that cannot be is refused as a
whole, before anything is written. Then only the members asked for are written, each by the caller's choice of name.
"""

import lzma
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lib.files import translate_write_errors
from refer.prepare.progress import human
from refer.prepare.responses import RefusedError

CHUNK = 1 << 20  # bytes
MOST_MEMBERS = 500_000
MOST_BYTES = 64 * 10**9  # of a whole archive, unpacked
STRONGEST = 1100  # no byte of a deflated member can stand for more than about 1032
DAMAGES = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    EOFError, NotImplementedError, RuntimeError, ValueError,
)  # fmt: skip


class Archive:
    """A zip file that was found harmless; see :func:`open_archive`. `members`: {name: what zipfile knows of it}, files
    only and in the archive's order, without what macOS puts into archives."""

    def __init__(self, path: Path, file: zipfile.ZipFile) -> None:
        self.path, self._file = path, file
        _check_members(path, file.infolist())
        self.members = {
            one.filename: one
            for one in file.infolist()
            if not one.is_dir() and not {"__MACOSX", ".DS_Store"} & set(one.filename.split("/"))
        }

    def find(self, folder: str, is_wanted: Callable[[str], bool]) -> dict[str, zipfile.ZipInfo]:
        """{file name: member} of what lies directly in a ``folder`` of that name. RefusedError: two have one name."""
        found: dict[str, zipfile.ZipInfo] = {}
        for name, member in self.members.items():
            *_, parent, own = ("", *name.split("/"))
            if parent == folder and is_wanted(own):
                if own in found:
                    raise RefusedError(f"has two files {folder}/{own}")
                found[own] = member
        return found

    def write(self, member: zipfile.ZipInfo, target: Path, *, sync: bool = False) -> None:
        """Unpack a member to a file, checked by its CRC; sync: wait until the disk has it.

        Raises:
            RefusedError: it is damaged.
            UserError: it can't be written.
        """
        with translate_write_errors(target), open(target, "wb") as file:
            self._copy(member, file)
            if sync:
                file.flush()
                os.fsync(file.fileno())

    def _copy(self, member: zipfile.ZipInfo, file: BinaryIO) -> None:
        left = member.file_size
        with _refusing_damage(), self._file.open(member) as source:
            while chunk := source.read(min(CHUNK, left + 1)):  # to its end, where the CRC is compared
                left -= len(chunk)
                if left < 0:
                    raise RefusedError(f"{member.filename} is longer than it says")
                file.write(chunk)
        if left:
            raise RefusedError(f"{member.filename} is {left} bytes shorter than it says")


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Raises RefusedError: it is no zip file, is cut short, or one must not unpack it."""
    with _refusing_damage():
        try:
            file = zipfile.ZipFile(path)
        except OSError as error:
            raise RefusedError(f"cannot be read: {error.strerror or error}") from error
    with file:
        yield Archive(path, file)


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MOST_MEMBERS:
        raise RefusedError(f"has {len(members)} members")
    names: set[str] = set()
    for one in members:
        # orig_filename is what the archive says; zipfile has already cut filename at a zero byte
        name, kind = one.orig_filename, stat.S_IFMT(one.external_attr >> 16)
        if name.startswith("/") or re.match("[A-Za-z]:", name) or "\\" in name or "\0" in name:
            raise RefusedError(f"is not unpacked: a member is called {name!r}, which is not a plain relative name")
        if ".." in name.split("/"):
            raise RefusedError(f"is not unpacked: a member is called {name!r}, which leads out of the folder")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise RefusedError(f"is not unpacked: its member {name!r} is a link or a device")
        if one.flag_bits & 1:
            raise RefusedError(f"is not unpacked: its member {name!r} is encrypted")
        if name in names:
            raise RefusedError(f"is not unpacked: it has {name!r} twice")
        if one.file_size > STRONGEST * (one.compress_size + 1):
            sizes = f"{one.compress_size} bytes in it, {one.file_size} unpacked"
            raise RefusedError(f"is not unpacked: {name!r} says it has {sizes}")
        names.add(name)
    packed, unpacked = sum(one.compress_size for one in members), sum(one.file_size for one in members)
    if packed > path.stat().st_size or unpacked > MOST_BYTES:
        sizes = f"{human(packed)} in it, {human(unpacked)} unpacked"
        raise RefusedError(f"is not unpacked: its members say they have {sizes}")


@contextmanager
def _refusing_damage() -> Iterator[None]:
    try:
        yield
    except DAMAGES as error:
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise RefusedError(f"is a damaged zip file, or none ({told})") from error
