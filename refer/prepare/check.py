"""Verify installed datasets and weights without network access and without writing anything."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from lib.cli import LOGGER
from lib.errors import UserError
from refer.datasets import COCO_DATASETS, COCO_ZIP, ROOT
from refer.prepare.counts import Summary, format_counts
from refer.prepare.files import DOWNLOADS, Hashes
from refer.prepare.images import describe_faults, find_image_faults
from refer.prepare.install import find_annotation_problems, missing_split_systems
from refer.prepare.weights import find_weight_faults


def check_datasets(root: Path, datasets: Sequence[str], *, check_images: bool = True) -> list[str]:
    """Print the counts of installed datasets. Return a message for each problem, with the command that fixes it."""
    hashes, problems, summaries = Hashes(root), [], []
    root_flag = f" --root {shlex.quote(str(root))}" if root != ROOT else ""
    for dataset in datasets:
        try:
            found, messages = find_annotation_problems(root, dataset, hashes)
        except UserError as error:  # a folder that is not a dataset
            found, messages = [], [str(error)]
        command = f"python -m refer.prepare --dataset {dataset}{root_flag}{'' if check_images else ' --images none'}"
        hint = f" To install the published files: `{command}`." if dataset in COCO_DATASETS else ""
        problems += [f"{message.rstrip('.')}.{hint}" for message in messages]
        summaries += found
        if found and (missing := missing_split_systems(root, dataset)):
            LOGGER.info(f"{Path(root, dataset)}: {missing}")
    faults: dict[Path, dict[str, str]] = {}
    for folder in dict.fromkeys(summary.image_dir for summary in summaries) if check_images else ():
        users = [summary for summary in summaries if summary.image_dir == folder]  # the COCO datasets share a folder
        faults[folder] = find_image_faults(folder, {name: size for user in users for name, size in user.sizes.items()})
        if faults[folder]:
            problems.append(describe_faults(folder, faults[folder]) + _repair_hint(users, faults[folder], root_flag))
    for name in (*(f"{dataset}.zip" for dataset in datasets), COCO_ZIP):
        archive = Path(root, DOWNLOADS, name)
        if archive.is_file() and (difference := hashes.difference(name, archive)):
            problems.append(f"{archive} {difference}. Otherwise, delete the file.")
    if summaries:
        print(format_counts(summaries, faults))
    return problems


def check_weights(names: Sequence[str], folder: Path) -> list[str]:
    """Return a message for each file of these ``refer.datasets.WEIGHTS`` that is missing or invalid."""
    flag = "--checkpoints" if "crossvlt" in names else "--pretrained"
    command = f"python -m refer.prepare --weights {' '.join(names)} {flag} {shlex.quote(str(folder))}"
    faults = find_weight_faults(names, folder, Hashes(folder))
    hint = f"To install the published file: `{command}`."
    return [f"{folder / file} {fault}. {hint}" for file, fault in faults.items() if fault]


def _repair_hint(summaries: Sequence[Summary], faults: Mapping[str, str], root_flag: str) -> str:
    """Return a hint with the command that downloads the images of the COCO datasets; empty for a user's own images."""
    coco = [
        summary for summary in summaries if summary.dataset in COCO_DATASETS and faults.keys() & summary.sizes.keys()
    ]
    if not coco:
        return ""
    names = " ".join(dict.fromkeys(summary.dataset for summary in coco))
    return (
        f" To download the images of {names}: `python -m refer.prepare --dataset {names}{root_flag} --images needed`."
    )
