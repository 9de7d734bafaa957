"""Puts a dataset's annotation files in their place, if they are the right ones, and tells what is in them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lib.errors import UserError
from lib.files import translate_write_errors
from refer.counts import PUBLISHED_COUNTS, Counts, counts_of, difference
from refer.datasets import split_systems
from refer.prepare.archives import open_archive
from refer.prepare.hashes import Hashes, keep_replaced
from refer.prepare.progress import check_room
from refer.prepare.responses import OtherFileError, RefusedError
from refer.refer import REFER
from utils import LOGGER

DOWNLOADS = "downloads"  # folder below the root: what is being fetched and unpacked
ZIP_STARTS = (b"PK\x03\x04",)


class AnnotationSet(NamedTuple):
    """What a dataset has under one split system."""

    dataset: str
    split_by: str
    counts: dict[str, Counts]
    published: dict[str, Counts]  # the same splits, as far as they were published
    difference: str  # from what was published, in a few words; empty: none
    pictures: dict[str, set[str]]  # split: file names
    sizes: dict[str, tuple[int, int]]  # file name: (width, height) in pixels
    image_dir: Path

    @property
    def name(self) -> str:
        return f"{self.dataset} ({self.split_by})"


def wanted_files(root: Path, dataset: str) -> list[str]:
    """The annotation files a dataset can have; only its first split system is needed."""
    return ["instances.json", *(f"refs({splitBy}).p" for splitBy in split_systems(root, dataset))]


def is_there(root: Path, dataset: str) -> bool:
    """Whether the files are there that a dataset can't do without."""
    return all(Path(root, dataset, name).is_file() for name in wanted_files(root, dataset)[:2])


def read_set(root: Path, dataset: str, splitBy: str) -> AnnotationSet:
    """Read one split system in full. UserError: as REFER."""
    refer = REFER(root, dataset, splitBy)
    counts = counts_of(refer)
    names = {}
    for split in counts:
        ids = {ref["image_id"] for ref in refer.loadRefs(refer.getRefIds(split=split))}
        names[split] = {refer.Imgs[one]["file_name"] for one in ids}
    needed = set().union(*names.values())
    sizes = {
        image["file_name"]: (image["width"], image["height"])
        for image in refer.data["images"]
        if image["file_name"] in needed
    }
    published = PUBLISHED_COUNTS.get((dataset, splitBy), {})
    return AnnotationSet(dataset, splitBy, counts, published, difference(refer), names, sizes, refer.image_dir)


def read_sets(root: Path, dataset: str) -> list[AnnotationSet]:
    """Every split system whose refs file is there, the first in any case. UserError: as REFER."""
    systems = split_systems(root, dataset)
    return [
        read_set(root, dataset, one)
        for one in systems
        if one == systems[0] or Path(root, dataset, f"refs({one}).p").exists()
    ]


def take_zip(path: Path, root: Path, dataset: str, hashes: Hashes, *, record_zip: bool) -> None:
    """Unpack a dataset's annotation files from an archive, check them and put them in their place.

    record_zip: the archive is the published one, and its own hash is compared and recorded too.

    Raises:
        RefusedError: the archive is unsafe or damaged, or what is in it are not this dataset's files.
        UserError: the disk is full, …
    """
    if record_zip and (told := hashes.difference(path.name, path)):
        raise OtherFileError(told)
    with open_archive(path) as archive, _aside(root, dataset) as folder:
        members = archive.find(dataset, set(wanted_files(root, dataset)).__contains__)
        check_room(folder, sum(one.file_size for one in members.values()), f"unpacking {path.name}")
        for name, member in members.items():
            archive.write(member, folder / name, sync=True)
        _accept(folder, root, dataset, hashes)
    if record_zip:
        hashes.record({path.name: path})


def take_folder(path: Path, root: Path, dataset: str, hashes: Hashes) -> None:
    """Copy a dataset's annotation files from a folder; otherwise as :func:`take_zip`."""
    with _aside(root, dataset) as folder:
        for name in wanted_files(root, dataset):
            if Path(path, name).is_file():
                with translate_write_errors(folder / name):
                    shutil.copyfile(path / name, folder / name)
        _accept(folder, root, dataset, hashes)


@contextmanager
def _aside(root: Path, dataset: str) -> Iterator[Path]:
    """An empty folder for a dataset's files, on the disk of the root, that goes away again."""
    above = Path(root, DOWNLOADS, f"{dataset}.unpacked")
    shutil.rmtree(above, ignore_errors=True)
    with translate_write_errors(above):
        Path(above, dataset).mkdir(parents=True)
    try:
        yield above / dataset
    finally:
        shutil.rmtree(above, ignore_errors=True)


def _accept(folder: Path, root: Path, dataset: str, hashes: Hashes) -> None:
    """Look at the files in ``folder``; the right ones go to their place and are recorded. RefusedError: they aren't."""
    try:
        sets = read_sets(folder.parent, dataset)
    except UserError as error:
        raise RefusedError(str(error).replace(f"{folder.parent}/", "")) from error
    for one in sets:
        if one.difference:
            raise RefusedError(f"is not the published {one.name}: {one.difference}")
    files = {f"{dataset}/{path.name}": path for path in sorted(folder.iterdir())}
    for name, path in files.items():
        if told := hashes.difference(name, path):
            raise OtherFileError(f"{name} {told}")
    hashes.record(files)
    place = Path(root, dataset)
    with translate_write_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        for path in files.values():
            target = place / path.name
            if target.is_file() and target.read_bytes() != path.read_bytes():
                LOGGER.warning(f"{target} was another file: it is kept as {keep_replaced(target).name}")
            path.replace(target)


def holds_annotations(path: Path, dataset: str) -> bool:
    """Whether an archive has the dataset's folder. RefusedError: it is no zip file, or one must not unpack it."""
    with open_archive(path) as archive:
        return bool(archive.find(dataset, "instances.json".__eq__))
