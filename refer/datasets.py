"""Which datasets there are, by which split systems they are divided, and where their pictures are."""

import difflib
from pathlib import Path

from lib.errors import UserError

DATASETS: dict[str, tuple[str, ...]] = {  # known dataset: its splitBy values
    "refcoco": ("unc", "google"),
    "refcoco+": ("unc",),
    "refcocog": ("umd", "google"),
    "refshapes": ("unc",),
}
COCO_DATASETS = ("refcoco", "refcoco+", "refcocog")
PAPER_SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}  # what is meant in a mixture of datasets
ROOT = Path("./refer/data")  # where datasets are looked for, unless told otherwise
COCO_IMAGES = Path("images", "mscoco", "images", "train2014")


class AmbiguousError(UserError):
    """A dataset has several split systems, and none is the usual one."""


def datasets_there(data_root: str | Path) -> list[str]:
    """The datasets that have a folder here; hidden ones are still being written."""
    return sorted(path.parent.name for path in Path(data_root).glob("[!.]*/instances.json"))


def split_systems(data_root: str | Path, dataset: str) -> tuple[str, ...]:
    """The splitBy values of a dataset: a known one's, else those of the refs files in its folder under `data_root`.

    UserError: neither known nor found.
    """
    if dataset in DATASETS:
        return DATASETS[dataset]
    root, name = Path(data_root), str(dataset)
    if "," in name:
        raise UserError(f"{name!r} names several datasets: give one here")
    is_name = name not in {"", ".", ".."} and not set("/\\\0") & set(name)
    found = tuple(sorted(path.name[5:-3] for path in (root / name).glob("refs(*).p"))) if is_name else ()
    if not found and is_name and (root / name / "instances.json").is_file():
        raise UserError(f"{root / name} has no refs(<splitBy>).p: see docs/custom_data.md")
    if not found:
        names = list(dict.fromkeys([*DATASETS, *datasets_there(root)]))
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(
            f"unknown dataset {dataset!r}{hint}: choose one of {', '.join(names)}, or make your own in {root} "
            "by `python -m data.convert`"
        )
    return found


def default_split_system(data_root: str | Path, dataset: str) -> str:
    """The split system that is meant where none is named. UserError: there are several, and none is the usual one."""
    systems = split_systems(data_root, dataset)
    usual = dataset in DATASETS and "unc" in systems
    if len(systems) > 1 and not usual:
        raise AmbiguousError(
            f"--dataset {dataset} has several split systems: give --splitBy {' or --splitBy '.join(systems)}"
        )
    return "unc" if usual else systems[0]


def settle_split_systems(data_root: str | Path, datasets: str, split_by: str) -> list[tuple[str, str]]:
    """``refcoco,mine`` and ``unc,unc``, or nothing → (dataset, splitBy) of each, the usual splitBy where none is named.

    UserError: the numbers differ; a dataset is named twice; there is no usual split system.
    """
    names = [name.strip() for name in datasets.split(",")]
    systems = [system.strip() for system in split_by.split(",")]
    if split_by and len(systems) != len(names):
        raise UserError(
            f"--splitBy {split_by}: --dataset {datasets} names {len(names)} dataset(s); give a split system for each, "
            "in the same order"
        )
    if not split_by and len(names) > 1:
        try:
            systems = [PAPER_SPLIT_BY.get(name) or default_split_system(data_root, name) for name in names]
        except AmbiguousError as error:
            example = ",".join(PAPER_SPLIT_BY.get(name) or split_systems(data_root, name)[0] for name in names)
            raise UserError(f"{error}; of all in the same order, such as --splitBy {example}") from error
    elif not split_by:
        systems = [default_split_system(data_root, names[0])]
    pairs = list(zip(names, systems, strict=True))
    if len(set(pairs)) < len(pairs):
        raise UserError(f"--dataset {datasets}: names a dataset twice")
    return pairs


def check_dataset(data_root: str | Path, dataset: str, splitBy: str) -> None:
    """UserError, naming the right ones, unless there is such a dataset with such a split system."""
    systems = split_systems(data_root, dataset)
    if splitBy not in systems:
        raise UserError(f"unknown splitBy {splitBy!r}: {dataset} has {', '.join(systems)}")


def image_folder(data_root: str | Path, dataset: str) -> Path:
    """Where a dataset's pictures belong: the COCO sets share one folder, any other has its own `images`, and takes
    COCO's where it has none."""
    own = Path(data_root, dataset, "images")
    return own if dataset == "refshapes" or (dataset not in DATASETS and own.is_dir()) else Path(data_root, COCO_IMAGES)
