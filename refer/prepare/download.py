"""Download files and resume interrupted downloads.

Received bytes are written to ``<file>.part``, which is renamed to ``<file>`` when it is complete. ``<file>.part.json``
identifies the file on the server by its address, size and version (ETag or date); only bytes of the same version are
appended. It is deleted when the file has been installed. Until then it shows that refer.prepare downloaded the file and
may delete it.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.cli import LOGGER
from lib.errors import UserError
from lib.files import translate_write_errors
from refer.prepare.drive import DRIVE, download_from_drive
from refer.prepare.files import Hashes, Progress, RejectedError, check_free_space, replace_keeping
from refer.prepare.http import ConnectionLostError, VersionChangedError, open_url, parse_number, read_chunks

FIRST_PAUSE, MAX_PAUSE = 1.0, 60.0  # seconds before the next attempt; the pause doubles after each failure
RESET_BYTES = 1 << 20  # an attempt that advances the download by this much resets the count of failures
FIRST_BYTES = {  # by suffix; torch.save writes zip files, and wrote pickles before PyTorch 1.6
    ".zip": (b"PK\x03\x04",),
    ".jpg": (b"\xff\xd8",),
    ".pth": (b"PK\x03\x04", b"\x80\x02"),
    ".bin": (b"PK\x03\x04", b"\x80\x02"),
    ".txt": (b"[PAD]",),
}


@dataclass(frozen=True)
class Options:
    """Sources of files, and how to download."""

    local: tuple[Path, ...] = ()  # the user's files and folders (--from)
    download: bool = True
    mirrors: tuple[str, ...] = ()  # addresses without a trailing slash, tried before the published ones
    keep_archives: bool = False
    stall: float = 30.0  # seconds without data after which a connection is closed
    tries: int = 5  # consecutive failures after which an address is given up


class Partial:
    """A partial download: the bytes received so far and the identity of the file on the server."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f"{target.name}.part")
        self.state_path = target.with_name(f"{target.name}.part.json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def state(self) -> dict[str, Any]:
        """Return address, size and validator; empty if unknown."""
        try:
            state = json.loads(self.state_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) and isinstance(state.get("size"), int) else {}

    def start(self, url: str, size: int | None, validator: str | None) -> None:
        """Begin a new download."""
        # The state is deleted first and written last, so that a killed process never leaves a state and other bytes.
        self.state_path.unlink(missing_ok=True)
        self.path.write_bytes(b"")
        self.state_path.write_text(json.dumps({"address": url, "size": size, "validator": validator}, indent=1))

    def delete(self) -> None:
        self.state_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def install_from_sources(
    install: Callable[[Path], None],
    *,
    local: Iterable[Path],
    urls: Sequence[str],
    target: Path,
    hashes: Hashes,
    options: Options,
    unpack_factor: float = 0.0,
    by_hand: str = "Download it by hand and pass it with --from",
) -> None:
    """Install a file from the first valid source: one of the user's files, an earlier download, or an address.

    Args:
        install: verifies a file and installs it; raises RejectedError if the file is not valid.
        local: the user's files, tried first.
        urls: published addresses, tried after ``options.mirrors``.
        target: path of the downloaded file. An existing file is tried before the addresses, and is deleted only if an
            interrupted run of this function downloaded it.
        hashes: a downloaded file is compared with the entry of its name, or recorded if there is none.
        options: sources of files.
        unpack_factor: disk space needed for unpacking, relative to the size of the file.
        by_hand: for the error message, how to download the file without this command.

    Raises:
        UserError: no source has a valid file (the message names the reason for each), or the disk is full.
    """
    reasons = []
    for source in local:
        try:
            install(source)
        except RejectedError as error:
            reasons.append(f"{source}: {error}")
        else:
            LOGGER.info(f"Installed {target.stem} from {source}")
            return
    if not options.download:
        details = f" ({'; '.join(reasons)})" if reasons else ""
        raise UserError(f"--from contains no valid {target.name}{details}. Add --download to download it.")
    if target.is_file():
        try:
            return _install_download(target, install, hashes, options)
        except RejectedError as error:
            LOGGER.warning(f"{target}: {error}")
    partial_address = Partial(target).state().get("address")  # tried first, because only it can be resumed
    urls = [*(f"{mirror}/{target.name}" for mirror in options.mirrors), *urls]
    for url in sorted(urls, key=lambda url: url != partial_address):
        LOGGER.info(f"Downloading {target.name} from {url}")
        try:
            download(url, target, options, unpack_factor)
            return _install_download(target, install, hashes, options)
        except RejectedError as error:
            reasons.append(f"{url}: {error}")
            LOGGER.warning(reasons[-1])
        except KeyboardInterrupt:
            LOGGER.info("Run the same command again to resume the download.")
            raise
    raise UserError(
        f"Cannot download {target.name} ({'; '.join(reasons)}). {by_hand}, or pass another server with --mirror."
    )


def _install_download(target: Path, install: Callable[[Path], None], hashes: Hashes, options: Options) -> None:
    """Install and record ``target``. Then delete it if refer.prepare downloaded it.

    Raises:
        RejectedError: the file is not valid. If refer.prepare downloaded it, it is deleted.
        UserError: it differs from the recorded file. It is kept, because the record may be wrong.
    """
    part = Partial(target)
    is_downloaded = part.state_path.exists() and not part.path.exists()
    if difference := hashes.difference(target.name, target):
        raise UserError(f"{target} {difference}. Otherwise, delete {target.name}. Then run the same command again.")
    try:
        install(target)
    except RejectedError:
        if is_downloaded:
            target.unlink()
            part.delete()
        raise
    hashes.record({target.name: target})
    if is_downloaded and not (options.keep_archives and target.suffix == ".zip"):
        target.unlink()
    part.delete()


def download(url: str, target: Path, options: Options, unpack_factor: float = 0.0) -> None:
    """Download a file completely, resuming an earlier download from the same address.

    Raises:
        RejectedError: there is no such file at this address, or too many attempts failed in a row.
        UserError: the disk is full or not writable.
    """
    part = Partial(target)
    if url.startswith(DRIVE):
        part.delete()
        download_from_drive(url, part.path, stall=options.stall, tries=options.tries)
        part.state_path.write_text("{}")
        return replace_keeping(part.path, target)
    failures, most_received = 0, part.size()
    with translate_write_errors(part.path):
        part.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                _receive(url, part, options.stall, unpack_factor)
                break
            except ConnectionLostError as error:
                if isinstance(error, VersionChangedError):
                    part.delete()
                failures = 1 if part.size() >= most_received + RESET_BYTES else failures + 1
                most_received = max(most_received, part.size())
                if failures >= options.tries:
                    raise RejectedError(str(error)) from error
                pause = min(max(FIRST_PAUSE * 2 ** min(failures - 1, 6), error.wait), MAX_PAUSE)
                LOGGER.info(f"{url}: {error}. Retrying in {pause:g} s.")
                time.sleep(pause)
        replace_keeping(part.path, target)


def _receive(url: str, part: Partial, stall: float, unpack_factor: float) -> None:
    """Make one attempt to complete ``part``. Raises ConnectionLostError, RejectedError, UserError, OSError."""
    state = part.state()
    if state.get("address") != url:
        state = {}
    received, size = part.size(), state.get("size")
    if received and received == size:
        return
    headers = {}
    if size and 0 < received < size and state.get("validator"):
        headers = {"Range": f"bytes={received}-", "If-Range": state["validator"]}
    with open_url(url, headers, stall) as response:
        etag = response.headers.get("ETag", "")
        validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")  # a weak ETag is not enough
        chunks = read_chunks(response, stall)
        if response.status == 206:  # partial content; not all servers respect If-Range
            content_range = response.headers.get("Content-Range")
            if (
                not headers
                or content_range != f"bytes {received}-{size - 1}/{size}"
                or validator not in (None, state["validator"])
            ):
                raise VersionChangedError("the file on the server has changed")
        else:
            received, size = 0, parse_number(response.headers.get("Content-Length"))
            chunks = _check_first_bytes(chunks, part.path.stem, size)
        if size:
            check_free_space(part.path.parent, round(size - received + size * unpack_factor), part.path.stem)
        if not received:
            part.start(url, size, validator)
        # Unbuffered, so that a killed process loses no byte.
        with open(part.path, "ab", buffering=0) as file, Progress(part.path.stem, size, initial=received) as progress:
            for chunk in chunks:
                remaining = chunk[: None if size is None else size - received]
                while remaining:  # an unbuffered write may write only a part
                    written = file.write(remaining)
                    received, remaining = received + written, remaining[written:]
                    progress.update(written)
                if received == size:
                    break
    _check_length(received, size)


def _check_length(received: int, size: int | None) -> None:
    if size is not None and received < size:
        raise ConnectionLostError(f"connection closed after {received} of {size} bytes")


def _check_first_bytes(chunks: Iterator[bytes], name: str, size: int | None) -> Iterator[bytes]:
    """Return the chunks unchanged. RejectedError: the first bytes do not fit the suffix of the file name."""
    head = b""
    while len(head) < 8 and (chunk := next(chunks, b"")):
        head += chunk
    expected = FIRST_BYTES.get(Path(name).suffix, ())
    if expected and not head.startswith(expected):
        _check_length(len(head), min(8, size or 0))
        is_web_page = head.lstrip().lower().startswith((b"<!doc", b"<html", b"<head", b"<?xml"))
        content = "a web page" if is_web_page else f"data that starts with {head[:8]!r}" if head else "an empty file"
        raise RejectedError(f"the server sent {content} instead of {name}")
    return itertools.chain([head], chunks)
