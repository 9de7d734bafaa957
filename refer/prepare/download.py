"""Downloads a file so that it may break off at any moment and goes on later.

What has come is in ``<file>.part``; beside it ``<file>.part.json`` says of which file it is the beginning: the address,
its size in bytes, and the ETag or date by which the server tells versions apart. Only the rest of that same version is
ever appended. A complete file is flushed to the disk and gets its name; so a file with its name is complete.
"""

import contextlib
import http.client
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.files import fsync, translate_write_errors, write_text
from refer.prepare.hashes import free_name
from refer.prepare.progress import Progress, check_room, human
from refer.prepare.responses import (
    AGENT,
    BrokenOffError,
    OtherFileError,
    RefusedError,
    answer,
    chunks,
    number,
    validator,
)
from utils import LOGGER

PROGRESS = 1 << 20  # an attempt that brings as many bytes more than any before makes up for the failed ones

LONGEST_PAUSE = 60.0  # seconds


@dataclass(frozen=True)
class Patience:
    """stall: seconds of silence that end an attempt; tries: failed ones in a row that are the end of it; pause: seconds
    before the second, twice as long before each further one."""

    stall: float = 30.0
    tries: int = 5
    pause: float = 1.0


def remove_if_empty(folder: Path) -> None:
    """Remove a folder of downloads that is not needed any more."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def obtain(
    addresses: Sequence[str],
    target: Path,
    accept: Callable[[Path], None],
    *,
    starts: Sequence[bytes] = (),
    room: float = 0.0,
    patience: Patience | None = None,
    keep: bool = True,
) -> None:
    """Download ``target`` from the first address that gives what ``accept`` takes; go on where it broke off.

    Args:
        accept: looks at the complete file, and raises RefusedError if it is not the right one.
        keep: leave it when it is accepted. A file that was there, and no earlier call has downloaded it to be deleted
            afterwards, is left in any case.
        starts: the first bytes of a file of this kind, any of these; a response with others is not even begun.
        room: bytes on the disk that a byte of the file needs once it is unpacked.

    Raises:
        UserError: no address gives it (each is named with its reason), or the disk is full.
    """
    patience = patience or Patience()
    if target.is_file():
        try:
            accept(target)
        except RefusedError as refused:
            LOGGER.warning(f"{target}: {refused}{_keep_other(target, refused)}")
        else:
            return _tidy(target, keep)
    reasons = []
    begun = _state_of(target.with_name(f"{target.name}.part")).get("address")
    for address in sorted(addresses, key=lambda one: one != begun):  # first the one that has sent a part already
        try:
            fetch(address, target, starts=starts, room=room, patience=patience)
        except RefusedError as refused:
            reasons.append(f"{address}: {refused}")
        else:
            try:
                with translate_write_errors(target):
                    _own(target).touch()
                accept(target)
            except RefusedError as refused:
                reasons.append(f"{address}: {refused}{_keep_other(target, refused)}")
                target.unlink(missing_ok=True)
                _own(target).unlink(missing_ok=True)
            else:
                return _tidy(target, keep)
        LOGGER.warning(reasons[-1])
    raise UserError(
        f"can't get {target.name}: {'; '.join(reasons)}. Download it by hand and give it by --from FILE_OR_FOLDER, "
        "or name another place by --mirror URL"
    )


def is_refused_name(name: str, target: Path) -> bool:
    """Whether a complete download of ``target`` that differs only from the recorded hash is kept by such a name."""
    return re.fullmatch(rf"{re.escape(target.stem)}\.refused\d*{re.escape(target.suffix)}", name) is not None


def _keep_other(target: Path, refused: RefusedError) -> str:
    """Keep a file that may be the right one after all, and took long; returns what to tell of it."""
    if not isinstance(refused, OtherFileError):
        return ""
    kept = free_name(str(target.with_name(f"{target.stem}.refused")), target.suffix)
    with translate_write_errors(kept):
        target.replace(kept)
        _own(target).unlink(missing_ok=True)
    return f" (it is kept as {kept}, to be given by --from)"


def _own(target: Path) -> Path:
    """There is such a file where ``target`` was downloaded: what a user has put there is never deleted."""
    return target.with_name(f"{target.name}.downloaded")


def _tidy(target: Path, keep: bool) -> None:
    with translate_write_errors(target):
        if _own(target).exists():
            if not keep:
                target.unlink(missing_ok=True)
            _own(target).unlink()


def fetch(
    address: str,
    target: Path,
    *,
    starts: Sequence[bytes] = (),
    room: float = 0.0,
    patience: Patience | None = None,
    quiet: bool = False,
) -> None:
    """Download one address to ``target``, complete, with as many attempts as ``patience`` has.

    Args: as :func:`obtain`; quiet: for one of many small files, without progress and without going on later.
    Raises: RefusedError; UserError: the disk is full or can't be written.
    """
    patience = patience or Patience()
    part = target.with_name(f"{target.name}.part")
    with translate_write_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
    if not quiet:
        LOGGER.info(f"{target.name} from {address}")
    try:
        _receive_patiently(address, part, starts, room, patience, quiet)
    except KeyboardInterrupt:
        if not quiet and _size(part):
            LOGGER.info(f"{part} is kept: the same command goes on from there")
        raise
    with translate_write_errors(target):
        if not quiet:
            fsync(part)
        os.replace(part, target)
        if not quiet:
            fsync(target.parent)
            _state_file(part).unlink(missing_ok=True)


def _receive_patiently(
    address: str, part: Path, starts: Sequence[bytes], room: float, patience: Patience, quiet: bool
) -> None:
    """Attempts until ``part`` is complete. Raises RefusedError, UserError."""
    failed, furthest, answered = 0, _size(part), False
    while True:
        try:
            return _receive(address, part, starts, room, patience.stall, quiet)
        except BrokenOffError as broken:
            if broken.is_stale:
                _forget(part)
            reached = _size(part)
            failed = 1 if reached >= furthest + PROGRESS else failed + 1
            answered |= reached > furthest
            furthest = max(reached, furthest)
            # Without a network there is nothing to wait for, unless it was there a moment ago.
            unreachable = isinstance(broken.__cause__, socket.gaierror) and not answered
            if failed >= patience.tries or unreachable:
                raise RefusedError(str(broken)) from broken
            pause = min(max(patience.pause * 2 ** min(failed - 1, 10), broken.wait), LONGEST_PAUSE)
            if not quiet:
                LOGGER.info(f"{address}: {broken}; again in {pause:g} s")
            time.sleep(pause)


def _receive(address: str, part: Path, starts: Sequence[bytes], room: float, stall: float, quiet: bool) -> None:
    """One attempt: afterwards ``part`` is complete. Raises BrokenOffError, RefusedError, UserError."""
    state = {} if quiet else _read_state(part, address)
    have, size = _size(part), state.get("size")
    if have and have == size:
        return
    headers = {"User-Agent": AGENT, "Accept": "*/*"}
    if size and 0 < have < size and state.get("validator"):
        headers |= {"Range": f"bytes={have}-", "If-Range": state["validator"]}
    with answer(address, headers, stall) as response:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise RefusedError("sends it in another encoding")
        incoming = chunks(response, stall)
        head = b""
        if response.status == 206:
            _check_same(response, state, have)
        else:
            have, size = 0, number(response.headers.get("Content-Length"))
            while len(head) < 8 and (chunk := next(incoming, b"")):
                head += chunk
            if starts and not head.startswith(tuple(starts)):
                if size is not None and len(head) < min(8, size):
                    raise BrokenOffError(f"broke off at {len(head)} of {size} bytes")
                raise RefusedError(f"not the file, but {_what(head)}")
        if size:
            check_room(part.parent, round((size - have) + size * room), part.name.removesuffix(".part"))
        if not have:
            # In this order: a kill between two of them leaves nothing that could be taken for this file's beginning.
            _state_file(part).unlink(missing_ok=True)
            _write(part, b"", "wb")
            if not quiet:
                write_text(_state_file(part), json.dumps(
                    {"address": address, "size": size, "validator": validator(response)}, indent=1))  # fmt: skip
        have = _append(part, head, incoming, have, size, quiet)
    if size is not None and have < size:
        raise BrokenOffError(f"broke off at {human(have)} of {human(size)}")


def _append(part: Path, head: bytes, incoming: Iterator[bytes], have: int, size: int | None, quiet: bool) -> int:
    """Write what comes, up to ``size`` bytes in all, to the end of ``part``; returns its size in bytes."""
    name = part.name.removesuffix(".part")
    with Progress(name, size, start=have) if not quiet else _Silent() as progress, _unbuffered(part) as file:
        chunk = head
        while chunk or (chunk := next(incoming, b"")):
            chunk = memoryview(chunk)[: None if size is None else size - have]
            have += len(chunk)
            progress.add(len(chunk))
            with translate_write_errors(part):
                while chunk:  # each byte goes to the system at once, so that a kill loses none
                    chunk = chunk[file.write(chunk) :]
            if have == size:
                break
    return have


class _Silent:
    def add(self, count: int) -> None:
        pass

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def _unbuffered(part: Path):  # noqa: ANN202  (a context manager)
    with translate_write_errors(part):
        file = open(part, "ab", buffering=0)  # noqa: SIM115
    try:
        yield file
    finally:
        file.close()


def _check_same(response: http.client.HTTPResponse, state: dict[str, Any], have: int) -> None:
    """BrokenOffError, to begin again, unless a partial response is the rest of the same version: not every server
    heeds If-Range."""
    span = response.headers.get("Content-Range", "").removeprefix("bytes ")
    same = bool(state) and span == f"{have}-{state['size'] - 1}/{state['size']}"
    if not same or validator(response) not in (None, state["validator"]):
        raise BrokenOffError("the file there has changed: from the beginning", is_stale=True)


def _read_state(part: Path, address: str) -> dict[str, Any]:
    state = _state_of(part)
    return state if state.get("address") == address and isinstance(state.get("size"), int) else {}


def _state_of(part: Path) -> dict[str, Any]:
    try:
        state = json.loads(_state_file(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _state_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _forget(part: Path) -> None:
    _state_file(part).unlink(missing_ok=True)
    part.unlink(missing_ok=True)


def _write(path: Path, data: bytes, mode: str) -> None:
    with translate_write_errors(path), open(path, mode) as file:
        file.write(data)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _what(head: bytes) -> str:
    page = head.lstrip().lower().startswith((b"<!doc", b"<html", b"<head", b"<?xml"))
    return "a web page" if page else "nothing" if not head else f"something that begins with {head[:8]!r}"
