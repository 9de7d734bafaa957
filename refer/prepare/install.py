"""Verify annotation files, and install those of the COCO datasets."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from lib.cli import LOGGER
from lib.errors import UserError
from lib.files import translate_write_errors
from refer.annotations import remedy
from refer.datasets import COCO_DATASETS, COCO_IMAGES, DATASETS, annotation_urls, split_systems
from refer.prepare.archives import open_archive
from refer.prepare.counts import Summary, format_counts, summarize
from refer.prepare.download import Options, install_from_sources
from refer.prepare.files import DOWNLOADS, Hashes, RejectedError, check_free_space, locked_hashes, replace_keeping
from refer.prepare.images import describe_faults, prepare_images

UNPACK_FACTOR = 8.0  # approximate size of unpacked annotations relative to their archive


def prepare_datasets(root: Path, datasets: Sequence[str], options: Options, *, images: str, again: bool) -> None:
    """Install annotations and images of COCO datasets and print the counts of their splits.

    Args:
        root: folder of the datasets.
        datasets: some of COCO_DATASETS.
        options: sources of files.
        images: as for :func:`refer.prepare.images.prepare_images`.
        again: install annotations even if valid ones exist.

    Raises:
        UserError: something cannot be installed.
    """
    with locked_hashes(root) as hashes:
        summaries = []
        for dataset in datasets:
            summaries += prepare_annotations(root, dataset, hashes, options, again=again)
        needed = {name: size for summary in summaries for name, size in summary.sizes.items()}
        faults = prepare_images(root, needed, hashes, options, images)
    folder = Path(root, COCO_IMAGES)
    print(format_counts(summaries, {folder: faults}))
    if faults and images != "none":
        hint = "" if options.download else " Add --download to download what is not in --from."
        raise UserError(f"{describe_faults(folder, faults)}{hint}")


def prepare_annotations(
    root: Path, dataset: str, hashes: Hashes, options: Options, *, again: bool = False
) -> list[Summary]:
    """Install a dataset's annotation files, unless valid ones exist, and return a summary per split system.

    Args and Raises: see :func:`prepare_datasets`.
    """
    folder = Path(root, dataset)
    summaries, problems = find_annotation_problems(root, dataset, hashes)
    if not problems and not again:
        files = {f"{dataset}/{name}": folder / name for name in annotation_files(root, dataset)}
        hashes.record({name: path for name, path in files.items() if path.is_file()})
        LOGGER.info(f"{folder}: annotations are already installed. {missing_split_systems(root, dataset)}".rstrip())
        return summaries
    for problem in problems:
        LOGGER.info(f"{problem.rstrip('.')}. Installing the annotations.")
    install_from_sources(
        lambda source: install_annotations(source, root, dataset, hashes),
        local=_local_sources(options.local, dataset),
        urls=annotation_urls(dataset),
        target=Path(root, DOWNLOADS, f"{dataset}.zip"),
        hashes=hashes,
        options=options,
        unpack_factor=UNPACK_FACTOR,
    )
    return summarize(root, dataset)


def annotation_files(root: Path, dataset: str) -> list[str]:
    """Return the names of all annotation files of a dataset. Only the first two are required."""
    return ["instances.json", *(f"refs({split_by}).p" for split_by in split_systems(root, dataset))]


def missing_split_systems(root: Path, dataset: str) -> str:
    """Return a hint about missing refs files of a COCO dataset that are optional; empty if none is missing."""
    names = annotation_files(root, dataset) if dataset in COCO_DATASETS else ()
    missing = [name for name in names if not Path(root, dataset, name).is_file()]
    return f"{', '.join(missing)} is not installed. To download it, use --again." if missing else ""


def find_annotation_problems(root: Path, dataset: str, hashes: Hashes) -> tuple[list[Summary], list[str]]:
    """Read the annotation files of a dataset, and compare them with the published counts and the recorded hashes.

    Returns:
        A summary per split system, none if a file cannot be read, and a message for each problem.
    """
    folder, changed = Path(root, dataset), {}
    paths = {f"{dataset}/{name}": folder / name for name in annotation_files(root, dataset)}
    missing = [path for path in list(paths.values())[:2] if not path.is_file()]
    if missing:
        return [], [f"{path} is missing.{'' if dataset in COCO_DATASETS else f' {remedy(path)}'}" for path in missing]
    for name, path in paths.items():
        if path.is_file() and (difference := hashes.difference(name, path)):
            changed[path] = f"{path} {difference}."
    try:
        summaries = summarize(root, dataset)
    except UserError as error:  # a changed file that cannot be read needs only one message
        return [], [str(error), *(message for path, message in changed.items() if str(path) not in str(error))]
    problems = []
    for summary in summaries:
        if difference := summary.difference():
            problems.append(f"{folder} does not have the published counts of {summary.name}: {difference}.")
    return summaries, problems + list(changed.values())


def _local_sources(paths: Sequence[Path], dataset: str) -> Iterator[Path]:
    """Yield those of the user's archives and folders that may contain a dataset's annotation files."""
    for path in paths:
        if path.suffix.lower() == ".zip" and path.is_file():
            yield path
        for folder in (path / dataset, path):
            # A folder with the name of another dataset contains that one.
            if (folder / "instances.json").is_file() and (folder.name == dataset or folder.name not in DATASETS):
                yield folder
        if (path / f"{dataset}.zip").is_file():
            yield path / f"{dataset}.zip"


def install_annotations(source: Path, root: Path, dataset: str, hashes: Hashes) -> None:
    """Copy annotation files from a folder or unpack them from an archive, verify them, and move them to ``root``.

    Replaced files are kept as ``<name>.replaced``.

    Raises:
        RejectedError: the archive is unsafe or corrupt, or the files are not those of the published dataset.
        UserError: the disk is full or not writable.
    """
    temporary = Path(root, DOWNLOADS, f"{dataset}.unpacked")
    folder = temporary / dataset
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with translate_write_errors(folder):
            folder.mkdir(parents=True)
            _copy_or_unpack(source, folder, set(annotation_files(root, dataset)))
        _, problems = find_annotation_problems(temporary, dataset, hashes)
        if problems:
            raise RejectedError(problems[0].replace(f"{temporary}/", "").rstrip("."))
        files = {f"{dataset}/{path.name}": path for path in sorted(folder.iterdir())}
        hashes.record(files)
        for name, path in files.items():
            replace_keeping(path, root / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_or_unpack(source: Path, folder: Path, names: set[str]) -> None:
    if source.is_dir():
        for name in names:
            if Path(source, name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    with open_archive(source) as archive:
        members = {name: member for name, member in archive.files(folder.name).items() if name in names}
        check_free_space(folder, sum(member.file_size for member in members.values()), f"Unpacking {source.name}")
        for name, member in members.items():
            archive.extract(member, folder / name)
