"""The rows of the tables of CrossVLT's and LAVT's papers, and the checkpoints to reproduce them with."""

from pathlib import Path
from typing import NamedTuple

from lib.cli import did_you_mean
from lib.config import read_yaml
from lib.errors import MissingFileError, UserError
from lib.metrics import METRIC_NAMES
from lib.variants import RELEASED_HINT
from refer.datasets import PUBLISHED_COUNTS


class PublishedRow(NamedTuple):
    """A row of a paper's table."""

    title: str
    dataset: str
    split_by: str
    split: str
    values: tuple[float, ...]  # in percent, in the order of METRIC_NAMES
    doubtful: tuple[str, ...] = ()  # metrics whose values equal those published for another method
    protocol: str = "paper"  # that of the published values

    @property
    def file_name(self) -> str:
        """Name of the row's result file, without suffix."""
        return f"{self.dataset}_{self.split_by}_{self.split}"

    @property
    def checkpoint_name(self) -> str:
        """Name of the row's checkpoint: the dataset, and G-Ref's splitBy unless it is umd."""
        return "refcocog_google" if self.split_by == "google" else self.dataset

    @property
    def num_expressions(self) -> int:
        """Number of expressions of the published split."""
        return PUBLISHED_COUNTS[self.dataset, self.split_by][self.split].expressions


# fmt: off
PUBLISHED = (
    PublishedRow("RefCOCO val", "refcoco", "unc", "val", (85.82, 82.80, 77.49, 67.21, 35.97, 75.48, 73.44)),
    PublishedRow("RefCOCO testA", "refcoco", "unc", "testA", (88.92, 86.25, 81.62, 69.79, 36.68, 77.54, 76.16)),
    PublishedRow("RefCOCO testB", "refcoco", "unc", "testB", (81.35, 77.74, 72.27, 62.63, 37.64, 72.69, 70.15)),
    PublishedRow("RefCOCO+ val", "refcoco+", "unc", "val", (76.41, 73.09, 68.49, 59.09, 31.39, 67.27, 63.60)),
    PublishedRow("RefCOCO+ testA", "refcoco+", "unc", "testA", (82.43, 79.57, 74.80, 64.65, 32.89, 72.00, 69.10)),
    PublishedRow("RefCOCO+ testB", "refcoco+", "unc", "testB", (67.19, 63.31, 58.89, 49.93, 29.15, 60.09, 55.23)),
    PublishedRow("G-Ref (umd) val", "refcocog", "umd", "val", (74.75, 70.45, 64.58, 54.21, 28.57, 66.21, 62.68)),
    PublishedRow("G-Ref (umd) test", "refcocog", "umd", "test", (71.54, 66.38, 59.00, 48.21, 23.10, 62.09, 63.75),
                 doubtful=METRIC_NAMES[:-1]),
)
# The first table of LAVT's paper; the second is of a loss that is in no published code.
PUBLISHED_LAVT = tuple(PublishedRow(*row, protocol="lavt") for row in (
    ("RefCOCO val", "refcoco", "unc", "val", (84.46, 80.90, 75.28, 64.71, 34.30, 74.46, 72.73)),
    ("RefCOCO testA", "refcoco", "unc", "testA", (88.07, 85.17, 79.90, 68.52, 35.69, 76.89, 75.82)),
    ("RefCOCO testB", "refcoco", "unc", "testB", (79.12, 74.94, 69.17, 59.37, 34.45, 70.94, 68.79)),
    ("RefCOCO+ val", "refcoco+", "unc", "val", (74.44, 70.91, 65.58, 56.34, 30.23, 65.81, 62.14)),
    ("RefCOCO+ testA", "refcoco+", "unc", "testA", (80.68, 77.96, 72.90, 62.21, 32.36, 70.97, 68.38)),
    ("RefCOCO+ testB", "refcoco+", "unc", "testB", (65.66, 61.85, 55.94, 47.56, 27.24, 59.23, 55.10)),
    ("G-Ref (umd) val", "refcocog", "umd", "val", (70.81, 65.28, 58.60, 47.49, 22.73, 63.34, 61.24)),
    ("G-Ref (umd) test", "refcocog", "umd", "test", (71.54, 66.38, 59.00, 48.21, 23.10, 63.62, 62.09)),
    ("G-Ref (google) val", "refcocog", "google", "val", (71.16, 67.21, 61.76, 51.98, 27.30, 63.66, 60.50)),
))
# fmt: on
TABLES = {"crossvlt": PUBLISHED, "lavt": PUBLISHED_LAVT, "lavt_one": PUBLISHED_LAVT}  # by network
RELEASED_NAMES = {"refcocog": "gref_umd", "refcocog_google": "gref_google"}  # of LAVT's files
DOUBTFUL_NOTE = (
    "† equals the value published for another method. In this row, only the overall IoU is a reliable reference."
)


def rows_of(model: str) -> tuple[PublishedRow, ...]:
    """Return the published rows of a network. UserError: there are none."""
    if model not in TABLES:
        raise UserError(f"--table has no published rows of --model {model}. Choose one of {', '.join(TABLES)}.")
    return TABLES[model]


def choose_rows(
    dataset: str | None, split_by: str | None, splits: str | None, model: str = "crossvlt"
) -> list[PublishedRow]:
    """Return the published rows that match the flags. A flag that was not given is None and matches all rows.

    Args:
        dataset, split_by, splits: as given by the flags.
        model: the network.

    Raises:
        UserError: no row matches, or none of the matching rows has one of the splits.
    """
    rows = [row for row in rows_of(model) if dataset in (None, row.dataset) and split_by in (None, row.split_by)]
    names = [name.strip() for name in (splits or "all").split(",") if name.strip()]
    for name in names:
        if name != "all" and name not in [row.split for row in rows]:
            raise UserError(f"--table: no published row has split {name!r} with this --dataset and --splitBy.")
    rows = [row for row in rows if "all" in names or row.split in names]
    if not rows:
        existing = ", ".join(dict.fromkeys(f"{row.dataset} ({row.split_by})" for row in rows_of(model)))
        raise UserError(f"--table has rows of {existing}, but none with this --dataset and --splitBy.")
    return rows


def find_checkpoints(source: str | Path, model: str = "crossvlt") -> dict[str, Path]:
    """Return the checkpoints of the table's rows by :attr:`PublishedRow.checkpoint_name`.

    Args:
        source: a folder with best_<dataset>.pth, <dataset>.pth or <dataset>/best.pth, or a YAML file with lines
            ``dataset: file``, whose paths are relative to the YAML file.
        model: the network.

    Raises:
        MissingFileError, UserError: there is no such folder or file, it names an unknown dataset or a missing file, or
            it contains no checkpoint.
    """
    source, datasets = Path(source), list(dict.fromkeys(row.checkpoint_name for row in rows_of(model)))
    if source.is_dir():
        found: dict[str, Path] = {}
        for name in datasets:
            candidates = (f"best_{name}.pth", f"{name}.pth", f"{name}/best.pth", f"{RELEASED_NAMES.get(name)}.pth")
            first = next((source / path for path in candidates if (source / path).is_file()), None)
            if first is not None:
                found[name] = first
        if not found:
            raise MissingFileError(
                f"--checkpoints {source}: no best_<dataset>.pth for any of {', '.join(datasets)}. {RELEASED_HINT}"
            )
        return found
    if not source.exists():
        raise MissingFileError(f"--checkpoints {source}: no such folder or file. {RELEASED_HINT}")
    kind = "a YAML file with lines `dataset: file`"
    entries = read_yaml(source, f"--checkpoints {source}", kind)
    if not isinstance(entries, dict) or not entries or not all(isinstance(path, str) for path in entries.values()):
        raise UserError(f"--checkpoints {source} is not {kind}.")
    for name, path in entries.items():
        if name not in datasets:
            raise UserError(f"--checkpoints {source}: unknown dataset {name!r}.{did_you_mean(str(name), datasets)}")
        if not (source.parent / path).is_file():
            raise MissingFileError(f"--checkpoints {source}: {name}: no file {source.parent / path}.")
    return {name: source.parent / path for name, path in entries.items()}
