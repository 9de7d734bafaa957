"""Make a dataset in the REFER layout of your own pictures, objects and sentences.

    # objects of COCO instances; the columns of sentences.csv: image, annotation_id, sentence[, split]
    python -m data.convert --name mine --sentences sentences.csv --images photos --instances instances.json

    # objects drawn as masks, PNG files; the columns: image, sentence[, mask][, split][, category]
    python -m data.convert --name mine --sentences sentences.jsonl --images photos --masks masks

checks everything, writes <refer_data_root>/mine, reads it back, says what is in it, draws a sheet of samples, and
prints the commands to go on with. Then `train.py --dataset mine` and `test.py --dataset mine` work. docs/custom_data.md
walks through it.
"""

import json
import os
import pickle
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.convert.folder import INFO_FILE, MADE_BY, SHEET_FILE, check_names, check_replaceable
from data.convert.objects import Objects, Pictures, coco_objects, mask_objects
from data.convert.refs import Refs, group, splits_of
from data.convert.sentences import read_sentences
from data.dataset_refer_bert import open_image
from lib.cli import run_command
from lib.errors import MissingFileError, UserError
from lib.files import atomic_folder, atomic_write, check_writable, duplicate_files, translate_write_errors, write_text
from refer.counts import Counts, counts_of
from refer.datasets import COCO_IMAGES
from refer.refer import REFER


class Converted(NamedTuple):
    """A finished set."""

    refer: REFER
    folder: Path
    counts: dict[str, Counts]
    warnings: list[str]


def convert(
    name: str,
    sentences: str | Path,
    images: str | Path,
    *,
    instances: str | Path | None = None,
    masks: str | Path | None = None,
    data_root: str | Path = "./refer/data",
    split_by: str = "unc",
    link: bool = False,
    val_share: float = 0.1,
    test_share: float = 0.1,
    seed: int = 0,
    force: bool = False,
) -> Converted:
    """Write the set <data_root>/<name>, checked; nothing of it is to be seen before all is there.

    Args:
        name: of the set.
        sentences: the sentence file, see :mod:`data.convert.sentences`.
        images: the folder of the pictures. Where it is the root's COCO folder, they stay there and are read there.
        instances, masks: a COCO file with the objects, or the folder of their masks: one of the two.
        data_root: folder of the REFER layout.
        split_by: the split system's name.
        link: make symbolic links to the pictures instead of copies.
        val_share, test_share, seed: of the splits, see :func:`data.convert.refs.splits_of`.
        force: replace a set of this name that was made here.

    Raises:
        UserError: anything is wrong with the files or the folder; that of a row names file and line.
    """
    check_names(name, split_by)
    if (instances is None) == (masks is None):
        raise UserError("say with --instances FILE or with --masks DIR what the objects are: one of the two")
    if not (0 <= val_share < 1 and 0 <= test_share < 1 and val_share + test_share < 1):
        raise UserError(f"--val-share {val_share} and --test-share {test_share}: shares of 1, together below it")
    sentences, images, root = Path(sentences), Path(images), Path(data_root)
    objects_in = Path(instances if masks is None else masks)
    for flag, source in (("--images", images), *([("--masks", objects_in)] if instances is None else [])):
        if not source.is_dir():
            raise MissingFileError(f"{flag} {source}: no such folder")
    folder = root / name
    with atomic_folder(folder) as new:
        check_replaceable(folder, force, (sentences, images, objects_in))
        rows, warnings = read_sentences(sentences, "mask" if instances is None else "annotation_id")
        pictures = Pictures(images)
        objects = (mask_objects if instances is None else coco_objects)(rows, objects_in, pictures)
        names = _picture_names(objects)
        splits = splits_of(rows, names, val_share=val_share, test_share=test_share, seed=seed)
        refs = group(rows, objects.keys, splits, objects.instances, first_names(images, names))
        description = {"description": f"{name}, made by {MADE_BY}"}
        write_text(new / "instances.json", json.dumps({"info": description, **objects.instances}))
        with atomic_write(new / f"refs({split_by}).p") as aside:
            aside.write_bytes(pickle.dumps(refs.refs, protocol=2))
        _check_masks(REFER(root, new.name, split_by), refs, objects_in)
        if (root / COCO_IMAGES).resolve() != images.resolve():
            with translate_write_errors(folder):
                _take_pictures(list(dict.fromkeys(names)), images, new / "images", link)
        settings = {"made_by": MADE_BY, "splitBy": split_by, "sentences": str(sentences), "objects": str(objects_in)}
        if not rows[0].split:
            settings |= {"val_share": val_share, "test_share": test_share, "seed": seed}
        write_text(new / INFO_FILE, json.dumps(settings, indent=1) + "\n")
    refer = REFER(root, name, split_by)
    return Converted(refer, folder, counts_of(refer), [*warnings, *objects.warnings, *refs.warnings])


def first_names(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """{file name: the first name of the same content}; only files of equal size are read."""
    first = {name: name for name in names}
    for copies in duplicate_files(folder / name for name in first):
        same = [str(path.relative_to(folder)) for path in copies]
        first |= dict.fromkeys(same, same[0])
    return first


def _picture_names(objects: Objects) -> list[str]:
    """The file name of each row's picture."""
    names = {image["id"]: image["file_name"] for image in objects.instances["images"]}
    return [names[image_id] for image_id, _ in objects.keys]


def _check_masks(refer: REFER, refs: Refs, source: Path) -> None:
    """Draw every mask from what was written. UserError, naming the row: one can't be drawn, or is empty."""
    for ref, where in zip(tqdm(refer.data["refs"], "reading back", unit="ref", disable=None), refs.places, strict=True):
        what = f"{where}: annotation {ref['ann_id']} of {source}"
        try:
            area = refer.getMask(ref)["area"]
        except UserError as error:
            raise UserError(f"{what}: {error.__cause__ or error}") from error
        if not area:
            raise UserError(f"{what}: its mask is empty (where two of its polygons overlap is a hole)")


def _take_pictures(names: Sequence[str], source: Path, target: Path, link: bool) -> None:
    """Copies of pictures, or links to them, under the same names."""
    for name in tqdm(names, "linking" if link else "copying", unit="picture", disable=None):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if link:
            os.symlink(os.path.abspath(source / name), target / name)
        else:
            shutil.copyfile(source / name, target / name)


def samples(refer: REFER, indices: Sequence[int]) -> Iterator[tuple[Image.Image, np.ndarray, str, str]]:
    """Picture, true mask (bool [H, W]), sentence and where it is from, of some of a set's expressions."""
    expressions = [(ref, sentence) for ref in refer.data["refs"] for sentence in ref["sentences"]]
    for index in indices:
        ref, sentence = expressions[index]
        picture = open_image(refer.get_image_path(ref["image_id"]))
        note = f"{ref['split']}  ref {ref['ref_id']}  {refer.Imgs[ref['image_id']]['file_name']}"
        yield picture, refer.getMask(ref)["mask"].astype(bool), sentence["raw"], note


def next_commands(converted: Converted, root: str, default_root: str) -> list[str]:
    """What to run next, as it can be pasted into a shell."""
    refer, splits = converted.refer, list(converted.counts)
    flags = ["--dataset", refer.dataset]
    flags += ["--splitBy", refer.splitBy] if refer.splitBy != "unc" else []
    flags += ["--refer_data_root", root] if Path(root) != Path(default_root) else []
    judged = [split for split in splits if split != "train"]
    checkpoint = f"./checkpoints/{refer.dataset}/best.pth"
    commands = [["python", "-m", "refer.stats", *flags]]
    if "train" in splits and judged:
        split = [] if "val" in splits else ["--split", judged[0]]
        commands.append(["python", "train.py", *flags, *split, "--model_id", refer.dataset])
    if judged:
        commands.append(["python", "test.py", *flags, "--split", "all", "--resume", checkpoint])
    return [shlex.join(command) for command in commands]


def _table(counts: dict[str, Counts]) -> str:
    lines = [("split", *Counts._fields), *((split, *one) for split, one in counts.items())]
    width = max(len(split) for split, *_ in lines)
    return "\n".join(f"{split:{width}}" + "".join(f"  {one:>11}" for one in rest) for split, *rest in lines)


def get_parser() -> "Parser":  # noqa: F821
    from lib.cli import Parser
    from lib.config import DEFAULTS

    parser = Parser(prog="python -m data.convert", description=__doc__)
    add = parser.add_argument
    add("--name", help="of the new dataset: what --dataset takes then")
    add("--sentences", metavar="FILE", help="a .csv, .tsv or .jsonl with a row per sentence")
    add("--images", metavar="DIR", help="folder of the pictures")
    add("--instances", metavar="FILE", help="the objects as COCO instances, json")
    add("--masks", metavar="DIR", help="or: the objects as masks, PNG files with 0 outside")
    add("--refer_data_root", default=DEFAULTS.DATA.ROOT, metavar="DIR", help="folder of the REFER layout (%(default)s)")
    add("--splitBy", default="unc", metavar="NAME", help="name of the split system (%(default)s)")
    add("--link", action="store_true", help="make symbolic links to the pictures instead of copies")
    add(
        "--val-share",
        type=float,
        default=0.1,
        metavar="X",
        help="share of the pictures for val, where the file has no split (%(default)s)",
    )
    add("--test-share", type=float, default=0.1, metavar="X", help="the same for test (%(default)s)")
    add("--seed", type=int, default=0, help="of the division into splits (%(default)s)")
    add("--force", action="store_true", help="replace a set of this name that was made by this tool")
    add("--sheet", metavar="PNG", help=f"the sheet of samples (default: {SHEET_FILE} in the set's folder)")
    add("--samples", type=int, default=12, metavar="N", help="expressions on the sheet, 0: no sheet (%(default)s)")
    return parser  # fmt: skip


def main() -> None:
    from lib.config import DEFAULTS
    from lib.report.figures import MAX_PANELS, save_image, spread
    from lib.visualize import expression_panel, sheet

    args = get_parser().parse_args(sys.argv[1:])
    for flag in ("name", "sentences", "images"):  # not argparse's own check, which comes before the one for typos
        if not getattr(args, flag):
            raise UserError(f"--{flag} is needed; see --help")
    if not 0 <= args.samples <= MAX_PANELS:
        raise UserError(f"--samples {args.samples}: from 0 to {MAX_PANELS}")
    if args.sheet:
        if Path(args.sheet).resolve().is_relative_to(Path(args.refer_data_root, args.name).resolve()):
            raise UserError(f"--sheet {args.sheet}: not into the set's own folder, where it is {SHEET_FILE} by default")
        if not args.samples:
            raise UserError(f"--sheet {args.sheet} does nothing with --samples 0: leave one of them out")
        inputs = filter(None, (args.sentences, args.images, args.instances, args.masks))
        check_writable(args.sheet, suffix=".png", inputs=inputs)
    converted = convert(
        args.name,
        args.sentences,
        args.images,
        instances=args.instances,
        masks=args.masks,
        data_root=args.refer_data_root,
        split_by=args.splitBy,
        link=args.link,
        val_share=args.val_share,
        test_share=args.test_share,
        seed=args.seed,
        force=args.force,
    )
    print(_table(converted.counts))
    for warning in converted.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"\n{converted.folder} is whole: every mask drawn, none empty")
    if args.samples:
        chosen = spread(len(converted.refer.Sents), args.samples)
        path = Path(args.sheet or converted.folder / SHEET_FILE)
        drawn = samples(converted.refer, chosen)
        panels = [expression_panel(image, mask, [], text, note) for image, mask, text, note in drawn]
        save_image(sheet(panels), path)
        print(f"look at {path}: do the sentences fit the masks?")
    print("\nnext:")
    for command in next_commands(converted, args.refer_data_root, DEFAULTS.DATA.ROOT):
        print(f"    {command}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up then, too
    run_command(main)
