"""Samples of a converted dataset for the contact sheet, and commands that use the dataset."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.transforms import read_image
from refer.datasets import BERT_VOCABULARY, ROOT
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


def next_commands(refer: REFER, splits: Sequence[str], data_root: Path) -> dict[str, list[str]]:
    """Return shell commands that use the dataset, below titles. Those of the last title download nothing."""
    flags = ["--dataset", refer.dataset]
    flags += ["--splitBy", refer.splitBy] if refer.splitBy != "unc" else []
    flags += ["--refer_data_root", str(data_root)] if data_root != ROOT else []
    evaluation_splits = [split for split in splits if split != "train"]
    commands = {"Next:": [["python", "-m", "refer.stats", *flags]]}
    if "train" in splits and evaluation_splits:
        validation = [] if "val" in splits else ["--split", evaluation_splits[0]]
        small = ["--cfg", "configs/try.yaml", "--bert_tokenizer", str(data_root / refer.dataset / BERT_VOCABULARY)]
        for title, options, run in (
            ("With pretrained weights (see docs/custom_data.md):", [], refer.dataset),
            ("Six steps of a small model, without any download:", small, f"{refer.dataset}_try"),
        ):
            training = ["python", "train.py", *options, *flags, *validation, "--model_id", run]
            checkpoint = f"./checkpoints/{run}/best.pth"
            commands[title] = [training, ["python", "test.py", *flags, "--split", "all", "--resume", checkpoint]]
    elif evaluation_splits:
        checkpoint = "./checkpoints/best_refcoco.pth"
        commands["Next:"].append(["python", "test.py", *flags, "--split", "all", "--resume", checkpoint])
    return {title: [shlex.join(command) for command in group] for title, group in commands.items()}
