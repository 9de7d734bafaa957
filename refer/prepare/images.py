"""Puts the pictures that annotations ask for in their place, and finds those that are missing, cut short or others.

Sizes are (width, height) in pixels.
"""

import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from PIL import Image, UnidentifiedImageError

from lib.errors import UserError
from lib.files import translate_write_errors
from refer.datasets import COCO_IMAGES
from refer.prepare.annotations import DOWNLOADS
from refer.prepare.archives import open_archive
from refer.prepare.download import Patience, fetch
from refer.prepare.hashes import keep_replaced
from refer.prepare.progress import Progress, check_room
from refer.prepare.responses import RefusedError
from refer.sources import COCO_ZIP, picture_address
from utils import LOGGER

Sizes = Mapping[str, tuple[int, int]]  # file name: width, height

FOLDER = COCO_IMAGES.name  # train2014
PICTURES_ASIDE = "pictures"  # folder of single pictures that are being downloaded
FETCHERS = 8  # pictures that are downloaded at the same time
TYPICAL = 170_000  # bytes of a picture, to see beforehand whether there is room
FRUITLESS = 5  # pictures a place may fail to give before it is asked no more, if it hasn't given any
HOPELESS = 20  # pictures in a row that no place gives, after which the rest isn't tried


def picture_fault(path: Path, size: tuple[int, int] | None = None) -> str:
    """What is wrong with a picture, empty if nothing is: missing, no picture, cut short, of another size (if given).

    A JPEG that ends as JPEGs end is taken to be whole; any other is decoded in full.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            if size is not None and image.size != size:
                (W, H), (right_W, right_H) = image.size, size
                return f"is {W}x{H}, the annotations say {right_W}x{right_H}"
            file.seek(-2, os.SEEK_END)
            if image.format == "JPEG" and file.read() == b"\xff\xd9":
                return ""
            file.seek(0)
            image.load()
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except UnidentifiedImageError:
        return "is no picture"
    except Exception as error:  # Pillow's decoders raise many kinds
        return f"is cut short or damaged ({' '.join(str(error).split())[:100]})"
    return ""


def picture_faults(folder: Path, sizes: Sizes) -> dict[str, str]:
    """{file name: what is wrong} of those that are not right."""
    faults = {}
    with Progress("looking at pictures", len(sizes), unit="pictures") as progress, ThreadPoolExecutor(4) as threads:
        looked = threads.map(lambda item: picture_fault(folder / item[0], item[1]), sizes.items())
        try:
            for name, fault in zip(sizes, looked, strict=True):
                if fault:
                    faults[name] = fault
                progress.add(1)
        except KeyboardInterrupt:  # without looking at the rest first
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return faults


def take_picture_zip(
    path: Path, root: Path, needed: Sizes, faulty: Collection[str], *, everything: bool, insist: bool
) -> None:
    """Unpack pictures from an archive like train2014.zip.

    Args:
        faulty: names of needed pictures that are not there or not right: of those, only these.
        everything: also take COCO's other pictures, those that are not there, or damaged.
        insist: an archive that lacks a needed picture is refused.

    Raises:
        RefusedError: the archive is unsafe or damaged, or lacks pictures; what is unpacked by then stays.
        UserError: the disk is full, …
    """
    folder = Path(root, COCO_IMAGES)
    with open_archive(path) as archive:
        members = archive.find(FOLDER, lambda name: name in needed or (everything and is_coco_name(name)))
        if insist and (lacking := sorted(needed.keys() - members.keys())):
            raise RefusedError(f"lacks {len(lacking)} of the pictures that the annotations need, such as {lacking[0]}")
        with translate_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            there = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
        missing = {name: one for name, one in members.items() if name in faulty}
        for name, one in members.items():  # of the same size in bytes as in the archive: taken to be whole
            if name not in needed and there.get(name) != one.file_size and picture_fault(folder / name):
                missing[name] = one
        check_room(folder, sum(one.file_size for one in missing.values()), f"unpacking {path.name}")
        if not members:
            return
        start = len(members) - len(missing)
        with Progress(f"unpacking {path.name}", len(members), start=start, unit="pictures") as progress:
            for name, member in missing.items():
                aside = folder / f".{name}.part"
                try:
                    archive.write(member, aside)
                    _put(aside, folder / name)
                finally:
                    aside.unlink(missing_ok=True)
                progress.add(1)
    os.sync()  # once for all: the archive may be deleted after this


def take_picture_folder(source: Path, root: Path, needed: Sizes, *, everything: bool) -> None:
    """Hard link pictures from a folder, or copy them where it is on another disk; those in place and whole stay.

    Raises: UserError: the disk is full, …
    """
    folder = Path(root, COCO_IMAGES)
    with translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if folder.samefile(source):
        return
    names = [one.name for one in os.scandir(source) if is_picture_name(one.name) and one.is_file()]
    names = [one for one in names if one in needed or (everything and is_coco_name(one))]
    with Progress(f"taking pictures from {source}", len(names), unit="pictures") as progress:
        for name in names:
            progress.add(1)
            if name not in needed:
                if not (folder / name).exists():
                    _link(source / name, folder / name)
            elif picture_fault(folder / name, needed[name]):
                if fault := picture_fault(source / name, needed[name]):
                    LOGGER.warning(f"{source / name} {fault}: not taken")
                else:
                    _link(source / name, folder / name)


def _link(source: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.part")
    aside.unlink(missing_ok=True)
    with translate_write_errors(target):
        try:
            os.link(source.resolve(), aside)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, aside)
    _put(aside, target)


def _put(aside: Path, target: Path) -> None:
    """Give a picture its name; a whole one that has it, a user's own perhaps, is kept under another."""
    with translate_write_errors(target):
        if target.exists() and not picture_fault(target):
            LOGGER.warning(f"{target} is replaced; what was there is kept as {keep_replaced(target).name}")
        aside.replace(target)


def fetch_pictures(missing: Sizes, root: Path, mirrors: Sequence[str], patience: Patience) -> None:
    """Download single pictures, several at a time; each is looked at before it gets its name.

    Raises:
        UserError: some can't be had (those that can are there by then), or the disk is full.
    """
    for name in missing:
        if not is_picture_name(name):
            raise UserError(f"{name!r} is not the name of a COCO picture: it is not downloaded")
    folder, aside = Path(root, COCO_IMAGES), Path(root, DOWNLOADS, PICTURES_ASIDE)
    check_room(folder, len(missing) * TYPICAL, f"downloading {len(missing)} pictures")
    with translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    places = [_Place(lambda name, mirror=mirror: f"{mirror}/{FOLDER}/{quote(name)}") for mirror in mirrors]
    places += [_Place(picture_address)]

    def get(name: str) -> str:
        reasons = []
        for place in places:
            if place.is_fruitless():
                continue
            try:
                fetch(place.address(name), aside / name, starts=(b"\xff\xd8",), patience=patience, quiet=True)
                if fault := picture_fault(aside / name, missing[name]):
                    raise RefusedError(fault)
                _put(aside / name, folder / name)
                place.given += 1
                return ""
            except RefusedError as refused:
                place.failed += 1
                reasons.append(f"{place.address(name)}: {refused}")
        return "; ".join(reasons) or "not tried any more"

    failed: dict[str, str] = {}
    in_a_row = 0
    with Progress("downloading pictures", len(missing), unit="pictures") as progress:
        for name, reason in _in_threads(get, missing):
            in_a_row = in_a_row + 1 if reason else 0
            if reason:
                failed[name] = reason
            if in_a_row >= HOPELESS:
                break
            progress.add(1)
    shutil.rmtree(aside, ignore_errors=True)
    if failed:
        rest = ", and the rest was not tried" if in_a_row >= HOPELESS else ""
        first = next(failed[name] for name in missing if name in failed)  # whichever thread was the quickest
        raise UserError(
            f"{len(failed)} of {len(missing)} pictures can't be had{rest}: {first}. "
            "The same command goes on from here; or give them by --from FOLDER"
        )


class _Place:
    """Where pictures may be had, and how often they were."""

    def __init__(self, address: Callable[[str], str]) -> None:
        self.address, self.given, self.failed = address, 0, 0

    def is_fruitless(self) -> bool:
        return not self.given and self.failed >= FRUITLESS


def _in_threads(work: Callable[[str], str], names: Iterable[str]) -> Iterable[tuple[str, str]]:
    """(name, result) as they come. Of daemon threads, so that Ctrl-C need not wait for servers."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[str, str | BaseException]] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    count, stopped = waiting.qsize(), threading.Event()

    def run() -> None:
        while not stopped.is_set():
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                results.put((name, work(name)))
            except BaseException as error:
                results.put((name, error))

    for _ in range(min(FETCHERS, count)):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in range(count):
            name, result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield name, result
    finally:
        stopped.set()


def is_picture_name(name: str) -> bool:
    """Whether it is a plain file name of a JPEG, and no hidden file's."""
    return name.endswith(".jpg") and name[0] != "." and not set("/\\:\0") & set(name)


def is_coco_name(name: str) -> bool:
    """Whether COCO train2014 may have a picture of this name; a folder of downloads also has others."""
    return re.fullmatch(r"COCO_train2014_\d{12}\.jpg", name, re.ASCII) is not None


def picture_folders(place: Path) -> list[Path]:
    """The folders of pictures that a folder given by the user can mean, those that are there and hold one."""
    found = [place, *(place / below for below in (FOLDER, f"images/{FOLDER}", COCO_IMAGES))]
    return [one for one in found if one.is_dir() and any(is_picture_name(entry.name) for entry in os.scandir(one))]


def picture_zips(place: Path) -> list[Path]:
    """The archive of pictures that a folder or file given by the user can mean, if it is there."""
    zips = (place / COCO_ZIP,) if place.is_dir() else (place,)
    return [one for one in zips if one.is_file() and one.suffix.lower() == ".zip"]
