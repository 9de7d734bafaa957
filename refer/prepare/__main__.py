"""Download the annotations, pictures and weights, check them, and show what is in them:

    python -m refer.prepare --dataset refcoco refcoco+ refcocog      # everything, with all of COCO train2014 (13 GB)
    python -m refer.prepare --dataset refcoco --pictures needed      # only the pictures that RefCOCO has
    python -m refer.prepare --weights swin_base bert                 # what training begins with, into pretrained/
    python -m refer.prepare --dataset refcoco --from ~/Downloads/refcoco.zip --from /data/coco/train2014
    python -m refer.prepare --dataset refcoco --check                # only look: no network, nothing is written

The same command goes on wherever an earlier one was interrupted, and leaves alone what is there and right. What it
finds right it remembers by its SHA-256 in <root>/hashes.json, and compares with that later. refer/README.md says more.
"""

import difflib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lib.cli import run_command
from lib.errors import MissingFileError, UserError
from lib.files import check_writable, translate_write_errors
from refer.datasets import COCO_DATASETS, COCO_IMAGES, DATASETS, ROOT, datasets_there, split_systems
from refer.prepare.annotations import (
    DOWNLOADS,
    ZIP_STARTS,
    AnnotationSet,
    holds_annotations,
    read_sets,
    take_folder,
    take_zip,
    wanted_files,
)
from refer.prepare.check import annotation_problems, check_datasets, format_counts, lacking_told, pictures_told
from refer.prepare.download import Patience, obtain, remove_if_empty
from refer.prepare.hashes import HASHES_FILE, Hashes
from refer.prepare.images import (
    PICTURES_ASIDE,
    Sizes,
    fetch_pictures,
    picture_faults,
    picture_folders,
    picture_zips,
    take_picture_folder,
    take_picture_zip,
)
from refer.prepare.responses import OtherFileError, RefusedError
from refer.prepare.weights import WEIGHTS, prepare_weights, weights_problems
from refer.sources import COCO_ADDRESS, COCO_ZIP, annotation_addresses
from utils import LOGGER, set_up_logging

PRETRAINED = Path("./pretrained")
PICTURES = ("zip", "needed", "none")
LONGEST_STALL = 86400  # seconds, a day
ANNOTATION_ROOM, PICTURE_ROOM = 8.0, 1.02  # bytes unpacked of a byte in the archive, about


class Wishes(NamedTuple):
    """Where things may come from, and how much of them."""

    given: tuple[Path, ...] = ()  # the user's own files and folders
    download: bool = True
    mirrors: tuple[str, ...] = ()  # addresses without a / at the end
    pictures: str = "zip"
    keep_zips: bool = False
    again: bool = False  # annotations also where right ones are there
    patience: Patience = Patience()


def prepare_annotations(root: Path, dataset: str, hashes: Hashes, wishes: Wishes) -> list[AnnotationSet]:
    """Bring a COCO set's annotation files; right ones that are there stay. UserError: they can't be had."""
    sets, problems = annotation_problems(root, dataset, hashes)
    folder = Path(root, dataset)
    if not problems and not wishes.again:
        hashes.record({f"{dataset}/{name}": folder / name for name in wanted_files(root, dataset)
                       if (folder / name).is_file()})  # fmt: skip
        without = lacking_told(root, dataset)
        LOGGER.info(f"{folder}: the annotations are there already{', ' * bool(without)}{without}")
        return sets
    for problem in problems:
        LOGGER.log(20 if problem.endswith("is missing") else 30, f"{problem}: getting it")
    reasons = []
    for place in annotation_places(wishes.given, dataset):
        try:
            if place.is_dir():
                take_folder(place, root, dataset, hashes)
            elif holds_annotations(place, dataset):
                take_zip(place, root, dataset, hashes, record_zip=False)
            else:
                continue
        except RefusedError as refused:
            reasons.append(f"; {place}: {refused}")
            continue
        LOGGER.info(f"{folder}: annotations from {place}")
        return read_sets(root, dataset)
    target = Path(root, DOWNLOADS, f"{dataset}.zip")
    if not wishes.download:
        raise UserError(
            f"what --from names has no right annotations of {dataset}{''.join(reasons)}; "
            "--download downloads what is lacking"
        )
    addresses = [f"{mirror}/{dataset}.zip" for mirror in wishes.mirrors] + annotation_addresses(dataset)
    obtain(
        addresses,
        target,
        lambda path: take_zip(path, root, dataset, hashes, record_zip=True),
        starts=ZIP_STARTS,
        room=ANNOTATION_ROOM,
        patience=wishes.patience,
        keep=wishes.keep_zips,
    )
    return read_sets(root, dataset)


def annotation_places(given: Sequence[Path], dataset: str) -> Iterator[Path]:
    """Folders that have a dataset's files, and archives that may, in what the user has named."""
    for place in given:
        if place.suffix.lower() == ".zip" and place.is_file():
            yield place
        for folder in (place / dataset, place):
            # A folder called as another dataset is that one's.
            if (folder / "instances.json").is_file() and (folder.name == dataset or folder.name not in DATASETS):
                yield folder
        if (place / f"{dataset}.zip").is_file():
            yield place / f"{dataset}.zip"


def prepare_pictures(root: Path, needed: Sizes, hashes: Hashes, wishes: Wishes) -> dict[str, str]:
    """Bring the pictures; returns {file name: what is wrong} of the needed ones that could not be had.

    UserError: a download fails, or the disk is full.
    """
    folder, target = Path(root, COCO_IMAGES), Path(root, DOWNLOADS, COCO_ZIP)
    everything = wishes.pictures == "zip"
    shutil.rmtree(Path(root, DOWNLOADS, PICTURES_ASIDE), ignore_errors=True)  # of a run that was killed
    faults = picture_faults(folder, needed)
    for place in wishes.given if faults and wishes.pictures != "none" else ():
        for source in picture_folders(place) if place.is_dir() else ():
            take_picture_folder(source, root, needed, everything=everything)
        for source in picture_zips(place):
            try:
                take_picture_zip(source, root, needed, faults, everything=everything, insist=False)
            except RefusedError as refused:
                LOGGER.warning(f"{source}: {refused}")
        faults = picture_faults(folder, needed)
    # An archive that is here and not recorded may have been half unpacked.
    is_halfway = everything and target.is_file() and COCO_ZIP not in hashes.known
    if not wishes.download or wishes.pictures == "none" or not (faults or is_halfway):
        if wishes.pictures != "none" and not faults:
            LOGGER.info(f"{folder}: the {len(needed)} pictures that are needed are there")
        return faults
    if not everything:
        fetch_pictures({name: needed[name] for name in faults}, root, wishes.mirrors, wishes.patience)
        return picture_faults(folder, needed)

    def accept(path: Path) -> None:
        if difference := hashes.difference(COCO_ZIP, path):
            raise OtherFileError(difference)
        take_picture_zip(path, root, needed, faults, everything=True, insist=True)
        hashes.record({COCO_ZIP: path})

    addresses = [f"{mirror}/{COCO_ZIP}" for mirror in wishes.mirrors] + [f"{COCO_ADDRESS}zips/{COCO_ZIP}"]
    obtain(
        addresses, target, accept, starts=ZIP_STARTS, room=PICTURE_ROOM, patience=wishes.patience, keep=wishes.keep_zips
    )
    return picture_faults(folder, needed)


def prepare_datasets(root: Path, datasets: Sequence[str], wishes: Wishes) -> None:
    """Bring these COCO sets and print their table. UserError: not everything is there, or right, at the end."""
    check_writable(root / DOWNLOADS / "x")
    try:
        with only_one(root):
            hashes = Hashes(root)
            sets = [one for name in datasets for one in prepare_annotations(root, name, hashes, wishes)]
            needed = {name: size for one in sets for name, size in one.sizes.items()}
            faults = prepare_pictures(root, needed, hashes, wishes)
    finally:
        remove_if_empty(root / DOWNLOADS)
    print(format_counts(sets, {root / COCO_IMAGES: faults}))
    if faults and wishes.pictures != "none":
        hint = "" if wishes.download else "; --download downloads what --from lacks"
        raise UserError(pictures_told(root / COCO_IMAGES, faults) + hint)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Two that download into the same folder would spoil each other's files. UserError: another one is at work."""
    with translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another `python -m refer.prepare` is at work in {folder}: wait for it") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def names_of(values: Sequence[str], known: Sequence[str], flag: str) -> list[str]:
    """Names given with spaces or commas, each once. UserError: an unknown one."""
    names = list(dict.fromkeys(name for value in values for name in value.split(",") if name))
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            generated = "; RefShapes is made by `python -m data.refshapes`" if name == "refshapes" else ""
            raise UserError(f"{flag} {name}: choose from {', '.join(known)}{generated or hint}")
    return names


def get_parser() -> "Parser":  # noqa: F821
    """The flags of `python -m refer.prepare`."""
    from lib.cli import Parser

    parser = Parser(prog="python -m refer.prepare", description=__doc__)
    add = parser.add_argument
    add(
        "--dataset",
        nargs="+",
        metavar="NAME",
        default=[],
        help=f"{', '.join(COCO_DATASETS)}; with --check also your own (--check alone: all that are there)",
    )
    add("--root", "--refer_data_root", type=Path, default=ROOT, metavar="DIR", help="of the datasets (%(default)s)")
    add(
        "--pictures",
        choices=PICTURES,
        default="zip",
        help="zip: if any that the datasets need is missing, all of train2014.zip, 13 GB and as much again to unpack "
        "it; needed: one by one, only those that are needed and missing; none (%(default)s)",
    )
    add("--weights", nargs="+", metavar="NAME", default=[], help=f"{', '.join(WEIGHTS)}")
    add("--pretrained", type=Path, default=PRETRAINED, metavar="DIR", help="of the weights (%(default)s)")
    add(
        "--check",
        action="store_true",
        help="only look at what is there: annotations, counts, hashes, every picture; status 2 if anything is wrong",
    )
    add(
        "--from",
        dest="given",
        action="append",
        type=Path,
        default=[],
        metavar="DIR_OR_ZIP",
        help="take files from here (again for more): annotation archives or folders, train2014.zip, a folder of "
        "pictures (hard links where possible), weights; nothing is downloaded then, unless by --download",
    )
    add("--again", action="store_true", help="get annotations anew, even where right ones are there")
    add("--download", action="store_true", help="download what --from lacks")
    add(
        "--mirror",
        action="append",
        default=[],
        metavar="URL",
        help="try URL/refcoco.zip, URL/train2014.zip, URL/train2014/<picture>, URL/<file of weights> first (again for "
        "more)",
    )
    add("--keep_zips", action="store_true", help="keep downloaded archives in <root>/downloads/")
    add(
        "--stall",
        type=float,
        default=Patience.stall,
        metavar="SECONDS",
        help="without data after which a connection is given up and taken up again (%(default)g)",
    )
    add("--tries", type=int, default=Patience.tries, metavar="N",
        help="failing ones in a row after which an address is given up (%(default)s)")  # fmt: skip
    return parser


def main() -> None:
    args = get_parser().parse_args(sys.argv[1:])
    set_up_logging()
    weights = names_of(args.weights, WEIGHTS, "--weights")
    if args.check:
        unused = ("given", "mirror", "download", "again", "keep_zips", "stall", "tries")
        unused = [name for name in unused if getattr(args, name) != get_parser().get_default(name)]
        if unused or args.pictures == "needed":
            flag = {"given": "from"}.get(unused[0], unused[0]) if unused else "pictures needed"
            raise UserError(f"--{flag} does nothing with --check, which only looks: leave one of them out")
        datasets = list(dict.fromkeys(name for value in args.dataset for name in value.split(",") if name))
        for name in datasets:
            if not Path(args.root, name, "instances.json").is_file():
                split_systems(args.root, name)  # tells a name that is none
        if not datasets and not weights:
            datasets = datasets_there(args.root)
            if not datasets:
                raise MissingFileError(f"no dataset in {args.root}: choose one by --dataset, or another --root")
        problems = check_datasets(args.root, datasets, pictures=args.pictures != "none") if datasets else []
        problems += weights_problems(weights, args.pretrained)
        for problem in problems[:-1] if len(problems) > 1 else ():
            LOGGER.warning(problem)
        if problems:
            count = f"{len(problems)} things are wrong, the last: " if len(problems) > 1 else ""
            raise UserError(f"{count}{problems[-1]}")
        LOGGER.info("everything is there and right")
        return
    datasets = names_of(args.dataset, COCO_DATASETS, "--dataset")
    if not datasets and not weights:
        raise UserError("say what is wanted: --dataset refcoco refcoco+ refcocog, --weights swin_base bert; see --help")
    if not 0 < args.stall <= LONGEST_STALL or args.tries < 1:
        raise UserError(f"--stall has to be above 0 and at most {LONGEST_STALL}, --tries at least 1")
    without = [flag for flag, value in (("again", args.again), ("keep_zips", args.keep_zips)) if value]
    without += ["pictures"] * (args.pictures != get_parser().get_default("pictures"))
    if without and not datasets:
        raise UserError(f"--{without[0]} does nothing without --dataset: name one, or leave it out")
    for mirror in args.mirror:
        if not mirror.startswith(("http://", "https://")):
            raise UserError(f"--mirror {mirror}: should begin with http:// or https://; files on this disk: --from")
    given = tuple(path.expanduser() for path in args.given)
    for place in given:
        if not place.exists():
            raise MissingFileError(f"--from {place}: no such file or folder")
    wishes = Wishes(
        given, args.download or not given, tuple(one.rstrip("/") for one in args.mirror), args.pictures,
        args.keep_zips, args.again, Patience(args.stall, args.tries),
    )  # fmt: skip
    if weights:
        check_writable(args.pretrained / HASHES_FILE)
        with only_one(args.pretrained):
            for path in prepare_weights(
                weights, args.pretrained, given=given, download=wishes.download, mirrors=wishes.mirrors,
                patience=wishes.patience,
            ):  # fmt: skip
                print(path)
    if datasets:
        prepare_datasets(args.root, datasets, wishes)


if __name__ == "__main__":
    run_command(main)
