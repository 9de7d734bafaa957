"""Training on several datasets at once, without a single picture that one of them is evaluated on.

The COCO sets divide the same photos differently: RefCOCO's testA is largely in RefCOCO+'s or G-Ref's train split. Who
trains on their union as they are is tested on pictures that were trained on.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import ConcatDataset

from data.dataset_refer_bert import ReferDataset
from lib.errors import UserError
from lib.files import duplicate_files
from refer.refer import REFER


class Part(NamedTuple):
    """What a dataset contributes, and what was taken from it because of the others and of itself; counts."""

    title: str  # dataset (splitBy)
    refs: int
    expressions: int
    images: int
    removed_refs: int
    removed_expressions: int
    removed_images: int


class Proof(NamedTuple):
    """That no picture of an evaluation split is trained on."""

    parts: list[Part]
    trained: int  # different pictures in training
    evaluated: int  # different pictures in the evaluation splits of all datasets
    in_both: int
    by_name_only: int  # of those evaluated: their files aren't there, so that copies of them can't be recognised

    def lines(self) -> list[str]:
        """A table and the sum, for people."""
        width = max(len("dataset"), *(len(part.title) for part in self.parts))
        heads = ("refs", "expressions", "images")
        lines = [f"{'dataset':{width}}" + "".join(f"  {head:>11}  {'removed':>8}" for head in heads)]
        for part in self.parts:
            pairs = zip(part[1:4], part[4:7], strict=True)
            lines.append(f"{part.title:{width}}" + "".join(f"  {kept:>11}  {removed:>8}" for kept, removed in pairs))
        lines.append(
            f"{self.trained} pictures are trained on, {self.evaluated} are in an evaluation split, "
            f"{self.in_both} are in both (the same by file, by content or by COCO's number)"
        )
        if self.by_name_only:
            lines.append(
                f"but {self.by_name_only} of those evaluated aren't there: copies of them under other names are not "
                "recognised"
            )
        return lines


class MixedDataset(ConcatDataset):
    """Training splits one after another as one; what :class:`data.dataset_refer_bert.ReferDataset` has for training."""

    datasets: list[ReferDataset]

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next drawn sentences belong to."""
        for dataset in self.datasets:
            dataset.set_epoch(epoch)

    def check_images(self) -> None:
        """UserError where pictures are missing."""
        for dataset in self.datasets:
            dataset.check_images()

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """As of the dataset that ``index`` falls into, with the index in this one."""
        return {**super().__getitem__(index), "index": torch.tensor(index)}


def evaluation_images(refer: REFER) -> set[int]:
    """Ids of the images of every split but train."""
    return {ref["image_id"] for ref in refer.data["refs"] if ref["split"] != "train"}


def mix(refers: Sequence[REFER], make: Callable[[REFER, Collection[int]], ReferDataset]) -> tuple[MixedDataset, Proof]:
    """The union of the training splits, and the proof that nothing in it is evaluated on.

    Args:
        refers: the datasets.
        make: the training split of one, without the images of these ids.

    Raises:
        UserError: nothing is left to train on.
    """
    keys, absent = _keys_by_content(refers)
    evaluated = {of[one] for refer, of in zip(refers, keys, strict=True) for one in evaluation_images(refer)}
    datasets, parts, trained = [], [], set()
    for refer, key_of in zip(refers, keys, strict=True):
        train = [ref for ref in refer.data["refs"] if ref["split"] == "train"]
        excluded = {ref["image_id"] for ref in train if key_of[ref["image_id"]] in evaluated}
        dataset = make(refer, excluded)
        # Counted in what will be trained on, not in what was meant to be.
        images = {expression.image_id for expression in dataset.expressions}
        trained |= {key_of[image] for image in images}
        expressions, sentences = len(dataset.expressions), sum(len(ref["sentences"]) for ref in train)
        kept = (len(dataset), expressions, len(images))
        before = (len(train), sentences, len({ref["image_id"] for ref in train}))
        removed = (a - b for a, b in zip(before, kept, strict=True))
        parts.append(Part(f"{refer.dataset} ({refer.splitBy})", *kept, *removed))
        datasets.append(dataset)
    if not trained:
        raise UserError(
            "nothing is left to train on: every training picture of "
            f"{' and '.join(part.title for part in parts)} is in an evaluation split of one of them"
        )
    proof = Proof(parts, len(trained), len(evaluated), len(trained & evaluated), len(absent & evaluated))
    assert not proof.in_both, proof.lines()[-1]
    return MixedDataset(datasets), proof


def _keys_by_content(refers: Sequence[REFER]) -> tuple[list[dict[int, str]], set[str]]:
    """REFER.image_keys of each, where copies of one file under two names have one key, too; and the keys of files
    that would have been compared but aren't there.

    Two sets made of the same photos may each have copies of their own. COCO's pictures are told apart by their numbers,
    so only files of the size of another picture are read, and only where one of these may not be COCO's.
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
    same: dict[str, str] = {}

    def first_of(key: str) -> str:
        while key in same:
            key = same[key]
        return key

    for copies in duplicate_files(key_of_file, suspects=not_coco):
        first, *others = sorted({first_of(key_of_file[path]) for path in copies})
        same |= dict.fromkeys(others, first)
    merged = [{image_id: first_of(key) for image_id, key in key_of.items()} for key_of in keys]
    return merged, {first_of(key) for path, key in key_of_file.items() if not path.exists()}
