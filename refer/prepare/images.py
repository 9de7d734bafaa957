"""Find missing and corrupt images, and install them from folders, from archives or from the internet.

Image sizes are (width, height) in pixels.
"""

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import quote

from PIL import Image, UnidentifiedImageError

from lib.cli import LOGGER
from lib.errors import UserError
from lib.files import translate_write_errors
from refer.datasets import COCO_IMAGES, COCO_URL, COCO_ZIP, IMAGE_FORMATS
from refer.prepare.archives import open_archive
from refer.prepare.download import Options, download, install_from_sources
from refer.prepare.files import (
    DOWNLOADS,
    Hashes,
    Progress,
    RejectedError,
    check_free_space,
    link_or_copy,
    replace_keeping,
)

FOLDER = COCO_IMAGES.name  # train2014
UNPACK_FACTOR = 1.02  # size of the unpacked images relative to their archive
MEAN_BYTES = 170_000  # mean size of an image, to estimate the disk space needed
THREADS = 8
MAX_FAILURES = 20  # a server is no longer used after failing to deliver this number of images in a row

Sizes = Mapping[str, tuple[int, int]]  # file name: width, height
Files = dict[
    str, tuple[int, Callable[[Path], object]]
]  # file name: size in bytes, function that writes the file to a path


def prepare_images(root: Path, needed: Sizes, hashes: Hashes, options: Options, images: str) -> dict[str, str]:
    """Install COCO images from the user's files or from the internet.

    Args:
        root: folder of the datasets.
        needed: sizes of the images that the annotations need.
        hashes: recorded hashes of ``root``.
        options: sources of the images.
        images: ``zip``: all of train2014; ``needed``: only the needed images; ``none``.

    Returns:
        {file name: what is wrong} for the needed images that are not installed.

    Raises:
        UserError: a download fails, or the disk is full.
    """
    folder, target, incomplete = Path(root, COCO_IMAGES), Path(root, DOWNLOADS, COCO_ZIP), Path(root, DOWNLOADS, FOLDER)
    shutil.rmtree(incomplete, ignore_errors=True)  # from an interrupted run
    faults = find_image_faults(folder, needed)
    if images == "none":
        return faults
    with translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)

    def install(source: Path) -> None:
        with open_source(source) as files:
            if source == target and (missing := sorted(needed.keys() - files.keys())):
                raise RejectedError(f"{len(missing)} needed images are not in it, for example {missing[0]}")
            if images == "needed":
                files = {name: file for name, file in files.items() if name in needed}
            install_images(files, folder, needed, faults, source=source)

    for source in _local_sources(options.local) if faults else ():
        try:
            install(source)
        except RejectedError as error:
            LOGGER.warning(f"{source}: {error}")
        faults = find_image_faults(folder, needed)
    # An existing archive without a recorded hash was not unpacked completely.
    is_interrupted = images == "zip" and target.is_file() and COCO_ZIP not in hashes.known
    if not faults and not is_interrupted:
        LOGGER.info(f"{folder}: all {len(needed)} needed images are installed.")
        return faults
    if not options.download:
        return faults
    if images == "needed":
        download_images({name: needed[name] for name in faults}, folder, incomplete, options)
    else:
        urls = [f"{COCO_URL}zips/{COCO_ZIP}"]
        install_from_sources(
            install, local=(), urls=urls, target=target, hashes=hashes, options=options, unpack_factor=UNPACK_FACTOR
        )
    return find_image_faults(folder, needed)


def find_image_faults(folder: Path, sizes: Sizes) -> dict[str, str]:
    """Return {file name: what is wrong} for the images that are missing, corrupt or of another size."""
    return _map_in_threads(lambda name: image_fault(folder / name, sizes[name]), sizes, "Checking images")


def _map_in_threads(function: Callable[[str], str], names: Iterable[str], description: str) -> dict[str, str]:
    """Return {name: function(name)} in order, without the names whose result is empty."""
    # Ctrl-C does not wait for the threads of a ThreadPool, which are daemons.
    names = list(names)
    with ThreadPool(THREADS) as pool, Progress(description, len(names), unit="images") as progress:
        results = {}
        for name, result in zip(names, pool.imap(function, names), strict=True):
            progress.update()
            if result:
                results[name] = result
    return results


def image_fault(path: Path, size: tuple[int, int] | None = None) -> str:
    """Return what is wrong with an image file; empty if it is valid.

    A JPEG that ends with the end marker is taken to be complete; any other image is decoded.

    Args:
        path: of the image.
        size: expected width and height, if known.
    """
    try:
        if not path.is_file() and path.exists():  # opening a FIFO would wait for a writer
            return "is not a regular file"
        with open(path, "rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            if size is not None and image.size != size:
                return "has {}x{} pixels instead of {}x{}".format(*image.size, *size)
            file.seek(-2, os.SEEK_END)
            if image.format == "JPEG" and file.read() == b"\xff\xd9":
                return ""
            file.seek(0)
            image.load()
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except UnidentifiedImageError:
        return f"is not an image ({', '.join(IMAGE_FORMATS)})"
    except Exception as error:  # Pillow's decoders raise many types
        return f"is truncated or corrupt ({' '.join(str(error).split())[:100]})"
    return ""


def describe_faults(folder: Path, faults: Mapping[str, str]) -> str:
    """Return a one-line summary of faults from :func:`find_image_faults`. There must be at least one fault."""
    invalid = [name for name, fault in faults.items() if fault != "is missing"]
    missing = len(faults) - len(invalid)
    counts = [f"{missing} missing"] * bool(missing) + [f"{len(invalid)} invalid"] * bool(invalid)
    name = (invalid or list(faults))[0]
    return f"{folder}: {' and '.join(counts)} image(s); for example, {name} {faults[name]}."


def _local_sources(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the user's folders and archives that may contain images."""
    for path in paths:
        for folder in (path, path / FOLDER, path / "images" / FOLDER, path / COCO_IMAGES):
            if folder.is_dir() and any(is_coco_name(entry.name) for entry in os.scandir(folder)):
                yield folder
        archive = path / COCO_ZIP if path.is_dir() else path
        if archive.suffix.lower() == ".zip" and archive.is_file():
            yield archive


@contextmanager
def open_source(source: Path) -> Iterator[Files]:
    """Yield the COCO images in a folder, or those in the folder ``train2014`` of an archive.

    Raises:
        RejectedError: the archive is corrupt or unsafe.
    """
    if source.is_dir():
        entries = [entry for entry in os.scandir(source) if is_coco_name(entry.name) and entry.is_file()]
        yield {entry.name: (entry.stat().st_size, partial(link_or_copy, Path(entry.path))) for entry in entries}
        return
    with open_archive(source) as archive:
        members = {name: member for name, member in archive.files(FOLDER).items() if is_coco_name(name)}
        yield {name: (member.file_size, partial(archive.extract, member)) for name, member in members.items()}


def install_images(files: Files, folder: Path, needed: Sizes, faults: Collection[str], *, source: Path) -> None:
    """Install the images of a source that are missing or invalid in ``folder``.

    Args:
        files: images of the source, from :func:`open_source`.
        folder: of the installed images.
        needed: sizes of the needed images; an image of another size is not installed.
        faults: names of the needed images that are missing or invalid.
        source: where the files come from, for messages.

    Raises:
        RejectedError: the archive is corrupt. The images installed until then remain.
        UserError: the disk is full or not writable.
    """
    existing = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
    # An image that is not needed is taken to be valid if the existing file has the same size.
    selected = [
        name
        for name, (size, _) in files.items()
        if name in faults or (name not in needed and existing.get(name) != size and image_fault(folder / name))
    ]
    if not source.is_dir():
        check_free_space(folder, sum(files[name][0] for name in selected), f"Unpacking {source.name}")
    with Progress(f"Images from {source}", len(selected), unit="images") as progress:
        for name in selected:
            if fault := install_image(folder / name, files[name][1], needed.get(name)):
                LOGGER.warning(f"{source}: {name} {fault} and was not installed.")
            progress.update()
    os.sync()  # the archive may be deleted after this


def install_image(path: Path, write: Callable[[Path], object], size: tuple[int, int] | None = None) -> str:
    """Write an image under a temporary name, check it and rename it to ``path``.

    If ``path`` is another intact image, that one is kept as ``<name>.replaced``.

    Args:
        path: of the installed image.
        write: function that writes the image to a path.
        size: expected width and height; None: do not check the image.

    Returns:
        What is wrong with the image; empty if it was installed.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with translate_write_errors(path):
            write(temporary)
            if size is not None and (fault := image_fault(temporary, size)):
                return fault
            if path.exists() and not image_fault(path):
                replace_keeping(temporary, path)
            else:
                temporary.replace(path)
            return ""
    finally:
        temporary.unlink(missing_ok=True)


def download_images(missing: Sizes, folder: Path, downloads: Path, options: Options) -> None:
    """Download single images, several at a time.

    Args:
        missing: sizes of the images.
        folder: of the installed images.
        downloads: folder for partial downloads, removed at the end.
        options: mirrors and retries.

    Raises:
        UserError: some cannot be downloaded (the others have been installed), or the disk is full.
    """
    for name in missing:
        if not is_coco_name(name):
            raise UserError(f"{name!r} is not the name of a COCO image and cannot be downloaded.")
    check_free_space(folder, len(missing) * MEAN_BYTES, f"Downloading {len(missing)} images")
    servers = [f"{mirror}/" for mirror in options.mirrors] + [COCO_URL]
    failures = dict.fromkeys(servers, 0)  # in a row

    def install(name: str) -> str:
        """Install an image from the first server that has it. Return why none has it, or an empty string."""
        reasons, target = [], downloads / name
        for server in servers:
            if failures[server] >= MAX_FAILURES:
                continue
            url = f"{server}{FOLDER}/{quote(name)}"
            try:
                download(url, target, options)
                if fault := install_image(folder / name, target.replace, missing[name]):
                    raise RejectedError(fault)
                failures[server] = 0
                return ""
            except RejectedError as error:
                failures[server] += 1
                reasons.append(f"{url}: {error}")
        return "; ".join(reasons) or "skipped"

    failed = _map_in_threads(install, missing, "Downloading images")
    shutil.rmtree(downloads, ignore_errors=True)
    if failed:
        skipped = sum(reason == "skipped" for reason in failed.values())
        note = f", {skipped} of them not tried after {MAX_FAILURES} failures in a row" if skipped else ""
        raise UserError(
            f"{len(failed)} of {len(missing)} images could not be downloaded{note}. {next(iter(failed.values()))}. "
            "Run the same command again to continue, or pass a folder that has them with --from."
        )


def is_coco_name(name: str) -> bool:
    """Return whether this is a file name of COCO train2014."""
    return re.fullmatch(r"COCO_train2014_\d{12}\.jpg", name, re.ASCII) is not None
