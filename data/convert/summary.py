"""Samples of a converted dataset for the contact sheet, and commands that use the dataset."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.transforms import read_image
from refer.datasets import ROOT
from refer.refer import REFER


class Sample(NamedTuple):
    """One expression of a dataset."""

    image: Image.Image  # RGB, H×W
    mask: np.ndarray  # bool [H, W]
    sentence: str
    note: str  # split, ref and file name


def samples(refer: REFER, indices: Sequence[int]) -> Iterator[Sample]:
    """Yield the expressions with these indices in the list of all sentences of all refs."""
    expressions = [(ref, sentence) for ref in refer.data["refs"] for sentence in ref["sentences"]]
    for index in indices:
        ref, sentence = expressions[index]
        image = read_image(refer.get_image_path(ref["image_id"]))
        note = f"{ref['split']}  ref {ref['ref_id']}  {refer.Imgs[ref['image_id']]['file_name']}"
        yield Sample(image, refer.getMask(ref)["mask"].astype(bool), sentence["raw"], note)


def next_commands(refer: REFER, splits: Sequence[str], data_root: Path) -> list[str]:
    """Return shell commands that use the dataset."""
    flags = ["--dataset", refer.dataset]
    flags += ["--splitBy", refer.splitBy] if refer.splitBy != "unc" else []
    flags += ["--refer_data_root", str(data_root)] if data_root != ROOT else []
    evaluation_splits = [split for split in splits if split != "train"]
    commands = [["python", "-m", "refer.stats", *flags]]
    if "train" in splits and evaluation_splits:
        validation = [] if "val" in splits else ["--split", evaluation_splits[0]]
        commands.append(["python", "train.py", *flags, *validation, "--model_id", refer.dataset])
    if evaluation_splits:
        checkpoint = f"./checkpoints/{refer.dataset}/best.pth"
        commands.append(["python", "test.py", *flags, "--split", "all", "--resume", checkpoint])
    return [shlex.join(command) for command in commands]
