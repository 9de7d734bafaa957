"""Datasets and pretrained weights: names, split systems, published counts, download addresses. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lib.cli import did_you_mean
from lib.errors import UserError
from lib.variants import BERT, RELEASED_FILES, RELEASED_URL, SWIN_VARIANTS

DATASETS: dict[str, tuple[str, ...]] = {  # dataset: its splitBy values, the first of which is the default
    "refcoco": ("unc", "google"),
    "refcoco+": ("unc",),
    "refcocog": ("umd", "google"),
    "refshapes": ("unc",),
}
COCO_DATASETS = ("refcoco", "refcoco+", "refcocog")
PAPER_SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}  # default when datasets are mixed
ROOT = Path("./refer/data")
# Pillow's names. Only these formats are opened: Pillow knows others, some of which start programs (EPS: Ghostscript).
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
COCO_IMAGES = Path("images", "mscoco", "images", "train2014")  # below the data root

COCO_URL = "http://images.cocodataset.org/"
COCO_ZIP = "train2014.zip"
REFER_URL = "https://bvisionweb1.cs.unc.edu/licheng/referit/data/"  # this server no longer exists
ARCHIVE_SNAPSHOTS = {"refcoco": "20220413011718", "refcoco+": "20220413011656", "refcocog": "20220413012904"}
SWIN_URL = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
BERT_URL = f"https://huggingface.co/{BERT}/resolve/main/"
README_BERT = "google/bert_uncased_L-12_H-768_A-12"  # the BERT that the README of the authors' repository links
BERT_VOCABULARY = "vocab.txt"
WEIGHTS = (*(f"swin_{size}" for size in SWIN_VARIANTS), "bert", "bert_vocabulary", "crossvlt")  # names of --weights
BERT_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # either is accepted; the first is downloaded


class Counts(NamedTuple):
    """Size of one split. None: not published."""

    refs: int
    expressions: int
    images: int | None = None


# (dataset, splitBy): {split: counts}, from the papers of the datasets. There are none for RefCOCO (google).
PUBLISHED_COUNTS: dict[tuple[str, str], dict[str, Counts]] = {
    ("refcoco", "unc"): {
        "train": Counts(42404, 120624, 16994),
        "val": Counts(3811, 10834, 1500),
        "testA": Counts(1975, 5657, 750),
        "testB": Counts(1810, 5095, 750),
    },
    ("refcoco+", "unc"): {
        "train": Counts(42278, 120191, 16992),
        "val": Counts(3805, 10758, 1500),
        "testA": Counts(1975, 5726, 750),
        "testB": Counts(1798, 4889, 750),
    },
    ("refcocog", "umd"): {
        "train": Counts(42226, 80512, 21899),
        "val": Counts(2573, 4896, 1300),
        "test": Counts(5023, 9602, 2600),
    },
    ("refcocog", "google"): {"train": Counts(44822, 85474), "val": Counts(5000, 9536)},
}


def annotation_urls(dataset: str) -> list[str]:
    """Return the addresses of a COCO dataset's annotation archive, the most reliable first."""
    original = f"{REFER_URL}{dataset}.zip"
    return [f"https://web.archive.org/web/{ARCHIVE_SNAPSHOTS[dataset]}/{original}", original]


def weights_url(file_name: str) -> str:
    """Return the address of a file of pretrained or released weights, or of BERT's vocabulary."""
    if file_name in RELEASED_FILES.values():
        return f"{RELEASED_URL}/{file_name}"
    is_swin = any(file_name == variant["pretrained"] for variant in SWIN_VARIANTS.values())
    return (SWIN_URL if is_swin else BERT_URL) + file_name


class AmbiguousError(UserError):
    """A dataset has several split systems and no default."""


def installed_datasets(data_root: str | Path) -> list[str]:
    """Return the names of the datasets in ``data_root``. Hidden folders are skipped, since they are incomplete."""
    return sorted(path.parent.name for path in Path(data_root).glob("[!.]*/instances.json"))


def split_systems(data_root: str | Path, dataset: str) -> tuple[str, ...]:
    """Return the splitBy values of a known dataset, or those of the refs files of a user's dataset.

    Raises:
        UserError: the dataset is neither known nor below ``data_root``.
    """
    if dataset in DATASETS:
        return DATASETS[dataset]
    root, name = Path(data_root), str(dataset)
    if "," in name:
        raise UserError(f"{name!r} names several datasets. Pass one.")
    is_folder_name = name not in {"", ".", ".."} and not set("/\\\0") & set(name)
    if is_folder_name:
        found = tuple(sorted(path.name[5:-3] for path in (root / name).glob("refs(*).p")))
        if found:
            return found
        if (root / name / "instances.json").is_file():
            raise UserError(f"{root / name} has no refs(<splitBy>).p. See docs/custom_data.md.")
    names = list(dict.fromkeys([*DATASETS, *installed_datasets(root)]))
    raise UserError(
        f"No such dataset {dataset!r}.{did_you_mean(name, names)} Choose one of {', '.join(names)}, "
        f"or convert your own into {root} with `python -m data.convert`."
    )


def default_split_system(data_root: str | Path, dataset: str) -> str:
    """Return the splitBy value used if none is given.

    Raises:
        AmbiguousError: there are several and none is the default.
        UserError: no such dataset.
    """
    systems = split_systems(data_root, dataset)
    if dataset in DATASETS and "unc" in systems:
        return "unc"
    if len(systems) > 1:
        options = " or ".join(f"--splitBy {system}" for system in systems)
        raise AmbiguousError(f"--dataset {dataset} has several split systems. Pass {options}.")
    return systems[0]


def parse_datasets(data_root: str | Path, datasets: str, split_by: str) -> list[tuple[str, str]]:
    """Parse ``--dataset`` and ``--splitBy`` into pairs (dataset, splitBy), filling in defaults.

    Args:
        data_root: folder of the datasets.
        datasets: one name, or several separated by commas.
        split_by: as many values, or an empty string for the defaults.

    Raises:
        UserError: the numbers differ, a dataset is repeated, or a dataset has no default split system.
    """
    names = [name.strip() for name in datasets.split(",")]
    systems = [system.strip() for system in split_by.split(",")]
    if split_by and len(systems) != len(names):
        raise UserError(
            f"--splitBy {split_by} has {len(systems)} value(s), but --dataset {datasets} names {len(names)} "
            "dataset(s). Pass a split system for each dataset, in the same order."
        )
    if not split_by and len(names) > 1:
        try:
            systems = [PAPER_SPLIT_BY.get(name) or default_split_system(data_root, name) for name in names]
        except AmbiguousError as error:
            example = ",".join(PAPER_SPLIT_BY.get(name) or split_systems(data_root, name)[0] for name in names)
            raise UserError(f"{error} Pass one for each dataset, for example --splitBy {example}.") from error
    elif not split_by:
        systems = [default_split_system(data_root, names[0])]
    pairs = list(zip(names, systems, strict=True))
    if len(set(pairs)) < len(pairs):
        raise UserError(f"--dataset {datasets} names a dataset twice.")
    return pairs


def check_dataset(data_root: str | Path, dataset: str, splitBy: str) -> None:
    """Check that a dataset with this split system exists.

    Raises:
        UserError: it does not; the message lists those that do.
    """
    systems = split_systems(data_root, dataset)
    if splitBy not in systems:
        raise UserError(f"{dataset} has no splitBy {splitBy!r}. Choose {' or '.join(systems)}.")


def image_folder(data_root: str | Path, dataset: str) -> Path:
    """Return the folder of a dataset's images.

    The COCO datasets share one folder. Other datasets have their own ``images`` folder. A user's dataset without such a
    folder uses the COCO images.
    """
    folder = Path(data_root, dataset, "images")
    has_own = dataset == "refshapes" or (dataset not in DATASETS and folder.is_dir())
    return folder if has_own else Path(data_root, COCO_IMAGES)


def select_datasets(data_root: str | Path, datasets: str, split_by: str = "") -> list[tuple[str, str]]:
    """Return the (dataset, splitBy) pairs that the flags --dataset and --splitBy select.

    Args:
        data_root: folder of the datasets.
        datasets: names, separated by commas.
        split_by: one name for all datasets, one for each, or several for one dataset; empty: all that are installed.

    Raises:
        UserError: there is no such dataset or split system, or the numbers of names differ.
    """
    names, systems = ([name.strip() for name in text.split(",") if name.strip()] for text in (datasets, split_by))
    if not names:
        raise UserError(f"--dataset {datasets!r} contains no name.")
    if len(names) > 1 and len(systems) > 1:
        if len(names) != len(systems):
            raise UserError(f"--splitBy {split_by}: {len(systems)} names for {len(names)} datasets. Pass one for each.")
        pairs = list(zip(names, systems, strict=True))
    else:
        pairs = [(name, system) for name in names for system in systems or _installed_systems(data_root, name)]
    for name, system in pairs:
        check_dataset(data_root, name, system)
    return list(dict.fromkeys(pairs))


def _installed_systems(data_root: str | Path, dataset: str) -> Sequence[str]:
    """Return the installed split systems. If there is none, return the default, so that REFER raises how to get it."""
    known = split_systems(data_root, dataset)
    return [name for name in known if Path(data_root, dataset, f"refs({name}).p").is_file()] or known[:1]
