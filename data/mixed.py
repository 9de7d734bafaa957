"""Training on several datasets, without the images of their evaluation splits.

The COCO datasets divide the same images differently: most images of RefCOCO's testA are in the train split of RefCOCO+
or G-Ref. A model trained on the plain union would be tested on images that it was trained on.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import ConcatDataset

from data.dataset_refer_bert import ReferDataset
from lib.errors import UserError
from lib.files import duplicate_files
from lib.tables import to_text
from refer.datasets import Counts
from refer.refer import REFER


class Part(NamedTuple):
    """One dataset's training split within a mixture."""

    title: str  # dataset (splitBy)
    kept: Counts
    removed: Counts  # because their images are in an evaluation split of this or another dataset


class MixReport(NamedTuple):
    """Size of a mixed training set, and evidence that it contains no image of an evaluation split."""

    parts: list[Part]
    trained: int  # distinct images in training
    evaluated: int  # distinct images in the evaluation splits of all datasets
    in_both: int  # images in training and in an evaluation split; always 0
    by_name_only: int  # evaluation images whose files are missing, so that copies of them cannot be recognized

    def lines(self) -> list[str]:
        """Return the report as a table, followed by one or two sentences."""
        rows = [["dataset"]]
        for name in Counts._fields:
            rows[0] += [name, "removed"]
        for part in self.parts:
            pairs = zip(part.kept, part.removed, strict=True)
            rows.append([part.title, *(str(count) for pair in pairs for count in pair)])
        lines = [
            *to_text(rows).splitlines(),
            f"{self.trained} images are in training, {self.evaluated} in an evaluation split, {self.in_both} in both "
            "(compared by file, content and COCO number).",
        ]
        if self.by_name_only:
            lines.append(
                f"The files of {self.by_name_only} evaluation images are missing, so copies of them under other names "
                "cannot be recognized."
            )
        return lines


class MixedDataset(ConcatDataset):
    """Concatenated training splits, with the methods of :class:`data.dataset_refer_bert.ReferDataset` for training."""

    datasets: list[ReferDataset]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the sentences that are drawn."""
        for dataset in self.datasets:
            dataset.set_epoch(epoch)

    def check_images(self) -> None:
        """Raise a UserError if image files are missing. Called before the first epoch."""
        for dataset in self.datasets:
            dataset.check_images()

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a sample; its ``index`` is the position in this dataset."""
        return {**super().__getitem__(index), "index": torch.tensor(index)}


def evaluation_images(refer: REFER) -> set[int]:
    """Return the ids of the images of all splits except train."""
    return {ref["image_id"] for ref in refer.data["refs"] if ref["split"] != "train"}


def mix(
    refers: Sequence[REFER], make_train: Callable[[REFER, Collection[int]], ReferDataset]
) -> tuple[MixedDataset, MixReport]:
    """Join the training splits of several datasets. Images of any evaluation split of these datasets are left out.

    Args:
        refers: the annotations of the datasets.
        make_train: builds the training split of a dataset without the images that have the given ids.

    Raises:
        UserError: no training image is left.
    """
    keys, missing = _image_keys(refers)
    evaluated = {
        key_of[image] for refer, key_of in zip(refers, keys, strict=True) for image in evaluation_images(refer)
    }
    datasets, parts, trained = [], [], set()
    for refer, key_of in zip(refers, keys, strict=True):
        refs = [ref for ref in refer.data["refs"] if ref["split"] == "train"]
        dataset = make_train(refer, {ref["image_id"] for ref in refs if key_of[ref["image_id"]] in evaluated})
        # These images are counted in the dataset, so that the report verifies that make_train left the others out.
        images = {expression.image_id for expression in dataset.expressions}
        trained |= {key_of[image] for image in images}
        kept = Counts(len(dataset), len(dataset.expressions), len(images))
        before = Counts(len(refs), sum(len(ref["sentences"]) for ref in refs), len({ref["image_id"] for ref in refs}))
        removed = Counts._make(total - count for total, count in zip(before, kept, strict=True))
        parts.append(Part(f"{refer.dataset} ({refer.splitBy})", kept, removed))
        datasets.append(dataset)
    if not trained:
        raise UserError(
            f"No training image is left: all training images of {' and '.join(part.title for part in parts)} are in an "
            "evaluation split of one of these datasets."
        )
    report = MixReport(parts, len(trained), len(evaluated), len(trained & evaluated), len(missing & evaluated))
    assert not report.in_both, report.lines()
    return MixedDataset(datasets), report


def _image_keys(refers: Sequence[REFER]) -> tuple[list[dict[int, str]], set[str]]:
    """Return REFER.image_keys of each dataset, with one key for all copies of a file, and the keys of missing files.

    Datasets made from the same images may each have their own copies, under other names. COCO images are recognized by
    their numbers. A file is therefore read only if another file has the same size and at least one of the two is not
    known to be a COCO image. Missing files are determined only if contents have to be compared.
    """
    keys = [refer.image_keys() for refer in refers]
    if all(refer.is_coco(image_id) for refer in refers for image_id in refer.imgToRefs):
        return keys, set()
    key_of_file: dict[Path, str] = {}
    not_coco: set[Path] = set()
    for refer, key_of in zip(refers, keys, strict=True):
        for image_id in refer.imgToRefs:
            path = refer.get_image_path(image_id)
            key_of_file[path] = key_of[image_id]
            if not refer.is_coco(image_id):
                not_coco.add(path)
    replaced_by: dict[str, str] = {}

    def resolve(key: str) -> str:
        while key in replaced_by:
            key = replaced_by[key]
        return key

    for copies in duplicate_files(key_of_file, suspects=not_coco):
        first, *others = sorted({resolve(key_of_file[path]) for path in copies})
        replaced_by |= dict.fromkeys(others, first)
    merged = [{image_id: resolve(key) for image_id, key in key_of.items()} for key_of in keys]
    return merged, {resolve(key) for path, key in key_of_file.items() if not path.exists()}
