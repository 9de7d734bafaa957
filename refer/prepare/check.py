"""Looks at what there is of a dataset, annotations and pictures, and says what is wrong and how many there are of what.
Nothing is written."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lib.errors import UserError
from refer.annotations import remedy
from refer.counts import Counts, differs
from refer.datasets import COCO_DATASETS, ROOT
from refer.prepare.annotations import DOWNLOADS, AnnotationSet, is_there, read_sets, wanted_files
from refer.prepare.hashes import Hashes
from refer.prepare.images import picture_faults
from refer.sources import COCO_ZIP
from utils import LOGGER


def annotation_problems(root: Path, dataset: str, hashes: Hashes) -> tuple[list[AnnotationSet], list[str]]:
    """What a dataset's annotation files have, as far as they can be read, and what is wrong with them."""
    folder = Path(root, dataset)
    if not is_there(root, dataset):
        missing = [name for name in wanted_files(root, dataset)[:2] if not (folder / name).is_file()]
        own = dataset not in COCO_DATASETS
        return [], [f"{folder / name} is missing" + f". {remedy(folder / name)}" * own for name in missing]
    differing = {}
    for name in wanted_files(root, dataset):
        if (folder / name).is_file() and (difference := hashes.difference(f"{dataset}/{name}", folder / name)):
            differing[str(folder / name)] = difference
    try:
        sets = read_sets(root, dataset)
    except UserError as error:  # of a file that can't be read this says enough
        return [], [str(error), *(f"{path} {told}" for path, told in differing.items() if path not in str(error))]
    problems = [f"{path} {told}" for path, told in differing.items()]
    problems += [f"{folder} is not the published {one.name}: {one.difference}" for one in sets if one.difference]
    return sets, problems


def lacking_told(root: Path, dataset: str) -> str:
    """Which split systems a COCO set's folder lacks, in a few words; empty: none. That is no fault: only the first is
    needed, and not every archive has the second."""
    names = wanted_files(root, dataset) if dataset in COCO_DATASETS else ()
    lacking = [name for name in names if not Path(root, dataset, name).is_file()]
    return f"without {', '.join(lacking)}: --again gets them anew" if lacking else ""


def check_datasets(root: Path, datasets: Sequence[str], *, pictures: bool = True) -> list[str]:
    """Print the table of what is there; returns what is wrong, each with the command that repairs it if there is one.

    pictures: look at them, too.
    """
    hashes, problems, sets = Hashes(root), [], []
    without = "" if pictures else " --pictures none"
    at = f" --root {shlex.quote(str(root))}" if root != ROOT else ""
    for dataset in datasets:
        try:
            found, wrong = annotation_problems(root, dataset, hashes)
        except UserError as error:  # a folder that is no dataset
            found, wrong = [], [str(error)]
        repair = f". To get it again: `python -m refer.prepare --dataset {dataset}{at}{without}`"
        problems += [f"{one}{repair if dataset in COCO_DATASETS else ''}" for one in wrong]
        sets += found
        if found and (lacking := lacking_told(root, dataset)):
            LOGGER.info(f"{Path(root, dataset)}: {lacking}")
    all_faults: dict[Path, dict[str, str]] = {}
    for folder in dict.fromkeys(one.image_dir for one in sets) if pictures else ():
        there = [one for one in sets if one.image_dir == folder]  # the COCO sets share one
        faults = picture_faults(folder, {name: size for one in there for name, size in one.sizes.items()})
        all_faults[folder] = faults
        if faults:
            # Own sets may share COCO's folder: the command brings what the published ones have.
            had = [one for one in there if one.dataset in COCO_DATASETS and faults.keys() & one.sizes.keys()]
            names = " ".join(dict.fromkeys(one.dataset for one in had))
            which = "them" if faults.keys() <= set().union(*(one.sizes for one in had)) else f"those of {names}"
            command = f"python -m refer.prepare --dataset {names}{at} --pictures needed"
            problems.append(pictures_told(folder, faults) + (f". To get {which}: `{command}`" if had else ""))
    for name in (*(f"{one}.zip" for one in datasets), COCO_ZIP):
        kept = Path(root, DOWNLOADS, name)
        if kept.is_file() and (difference := hashes.difference(name, kept)):
            problems.append(f"{kept} {difference}, else delete the file")
    if sets:
        print(format_counts(sets, all_faults))
    return problems


def pictures_told(folder: Path, faults: Mapping[str, str]) -> str:
    """What is wrong with the pictures of a folder, in one line; faults: {file name: what is wrong}, not empty."""
    missing = sum(fault == "is missing" for fault in faults.values())
    name = next((name for name, fault in faults.items() if fault != "is missing"), next(iter(faults)))
    kinds = [f"{missing} pictures are missing"] * (missing > 0)
    kinds += [f"{len(faults) - missing} are not right"] * (missing < len(faults))
    why = f", which {faults[name]}" if faults[name] != "is missing" else ""
    return f"{folder}: {' and '.join(kinds)}, such as {name}{why}"


def format_counts(sets: Sequence[AnnotationSet], faults: Mapping[Path, Collection[str]]) -> str:
    """The table of counts per split, beside the published ones where they differ; faults: {folder: names of pictures
    that are not there or not right}."""
    rows = [("dataset", "split", "refs", "expressions", "images", "pictures there", "")]
    for one in sets:
        for split in dict.fromkeys([*one.counts, *one.published]):
            counts, published = one.counts.get(split), one.published.get(split)
            wrong, names = faults.get(one.image_dir), one.pictures.get(split, set())
            there = "not looked at" if wrong is None else str(len(names - set(wrong)))
            note = "as published" if published else "no published counts"
            if differs(counts, published):
                numbers = zip(Counts._fields, published, strict=True)
                note = "published: " + ", ".join(f"{number} {name}" for name, number in numbers if number is not None)
            rows.append((one.name, split, *(str(n) for n in counts or (0, 0, 0)), there, note))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join([*cells, row[6]]).rstrip())
    return "\n".join(lines)
