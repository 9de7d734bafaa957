"""Download annotations, images and weights, verify them, and print what they contain.

    python -m refer.prepare --dataset refcoco refcoco+ refcocog      # everything, with all of COCO train2014 (13 GB)
    python -m refer.prepare --dataset refcoco --images needed        # only the images of RefCOCO
    python -m refer.prepare --weights swin_base bert                 # initial weights, into pretrained/
    python -m refer.prepare --weights crossvlt                       # the authors' trained weights, into checkpoints/
    python -m refer.prepare --dataset refcoco --from ~/Downloads/refcoco.zip --from /data/coco/train2014
    python -m refer.prepare --check                                  # verify the installed datasets

An interrupted command resumes when it is run again. Valid files that are already installed are kept. The SHA-256 of
each verified file is recorded in <root>/hashes.json and compared later. Details: refer/README.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lib.cli import LOGGER, Parser, did_you_mean, run_command
from lib.errors import MissingFileError, UserError
from lib.files import Kind
from refer.datasets import COCO_DATASETS, ROOT, WEIGHTS, installed_datasets, split_systems

MAX_STALL = 86400.0  # seconds


def get_parser() -> Parser:
    parser = Parser(prog="python -m refer.prepare", description=__doc__)
    add = parser.add_argument
    names = f"{', '.join(COCO_DATASETS)}; with --check also your own datasets (default: all installed)"
    add("--dataset", nargs="+", metavar="NAME", default=[], help=names)
    root = {"kind": Kind.FOLDER, "type": Path, "metavar": "DIR", "help": "default: %(default)s"}
    parser.add_output("--root", "--refer_data_root", default=ROOT, **root)
    images = (
        "zip: if any needed image is missing, download train2014.zip (13 GB, plus 13 GB to unpack it); "
        "needed: download only the missing images, one by one; none: no images (default: %(default)s)"
    )
    add("--images", choices=("zip", "needed", "none"), default="zip", help=images)
    add("--weights", nargs="+", metavar="NAME", default=[], help=", ".join(WEIGHTS))
    parser.add_output("--pretrained", default=Path("./pretrained"), **root)
    root["help"] = "folder of --weights crossvlt (default: %(default)s)"
    parser.add_output("--checkpoints", default=Path("./checkpoints"), **root)
    check = "verify installed files without downloading or writing; exit status 2 if there is a problem"
    add("--check", action="store_true", help=check)
    local = (
        "use files that you already have (repeatable): annotation archives or folders, train2014.zip, a folder of "
        "images, weights. Nothing is downloaded unless --download is given"
    )
    parser.add_input("--from", dest="local", action="append", type=Path, default=[], metavar="PATH", help=local)
    add("--download", action="store_true", help="with --from: download what is missing there")
    add("--again", action="store_true", help="install annotations again even if valid ones exist")
    mirror = "try URL/refcoco.zip, URL/train2014.zip, URL/train2014/<image>, URL/<weights file> first (repeatable)"
    add("--mirror", action="append", default=[], metavar="URL", help=mirror)
    add("--keep_zips", action="store_true", help="keep downloaded archives in <root>/downloads/")
    stall = "reconnect after this time without data (default: %(default)g)"
    add("--stall", type=float, default=30.0, metavar="SECONDS", help=stall)
    tries = "stop using a server after this number of failures in a row (default: %(default)s)"
    add("--tries", type=int, default=5, metavar="N", help=tries)
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    if args.check:
        check(args, given)
    else:
        prepare(args, given)


def check(args: argparse.Namespace, given: Sequence[str]) -> None:
    """Verify the requested datasets and weights, or all installed datasets. ``given``: the flags that are set."""
    unused = [name for name in given if name in ("local", "mirror", "download", "again", "keep_zips", "stall", "tries")]
    if unused or args.images == "needed":
        flag = {"local": "from"}.get(unused[0], unused[0]) if unused else "images needed"
        raise UserError(f"--{flag} cannot be combined with --check, which installs nothing.")
    weights = parse_names("--weights", args.weights, WEIGHTS)
    datasets = parse_names("--dataset", args.dataset)
    for name in datasets:
        if not Path(args.root, name, "instances.json").is_file():
            split_systems(args.root, name)  # raises an error for an unknown name
    if not datasets and not weights:
        datasets = installed_datasets(args.root)
        if not datasets:
            raise MissingFileError(f"{args.root} contains no dataset. Pass --dataset, or another --root.")

    from refer.prepare.check import check_datasets, check_weights
    from utils import set_up_logging

    set_up_logging()
    problems = check_datasets(args.root, datasets, check_images=args.images != "none") if datasets else []
    for folder, names in weight_folders(args, weights).items():
        problems += check_weights(names, folder)
    for problem in problems:
        LOGGER.warning(problem)
    if problems:
        raise UserError(f"{len(problems)} problem(s) found.")
    LOGGER.info("No problems found.")


def prepare(args: argparse.Namespace, given: Sequence[str]) -> None:
    """Install the requested weights and datasets. ``given``: the flags that are set."""
    weights = parse_names("--weights", args.weights, WEIGHTS)
    datasets = parse_names("--dataset", args.dataset, COCO_DATASETS)
    if not datasets and not weights:
        raise UserError("Pass --dataset refcoco refcoco+ refcocog or --weights swin_base bert crossvlt. See --help.")
    if not 0 < args.stall <= MAX_STALL or args.tries < 1:
        raise UserError(f"--stall must be above 0 and at most {MAX_STALL:g}, and --tries must be at least 1.")
    unused = [name for name in given if name in ("again", "keep_zips", "images")]
    if unused and not datasets:
        raise UserError(f"--{unused[0]} has no effect without --dataset.")
    for mirror in args.mirror:
        if not mirror.startswith(("http://", "https://")):
            raise UserError(f"--mirror {mirror} must start with http:// or https://. For local files use --from.")
    local = tuple(path.expanduser() for path in args.local)
    for path in local:
        if not path.exists():
            raise MissingFileError(f"--from {path}: no such file or folder.")

    from refer.prepare.download import Options
    from refer.prepare.install import prepare_datasets
    from refer.prepare.weights import prepare_weights
    from utils import set_up_logging

    set_up_logging()
    mirrors = tuple(mirror.rstrip("/") for mirror in args.mirror)
    options = Options(local, args.download or not local, mirrors, args.keep_zips, args.stall, args.tries)
    for folder, names in weight_folders(args, weights).items():
        for path in prepare_weights(names, folder, options):
            print(path)
    if datasets:
        prepare_datasets(args.root, datasets, options, images=args.images, again=args.again)


def weight_folders(args: argparse.Namespace, weights: Sequence[str]) -> dict[Path, list[str]]:
    """Return {folder: names of the weights that are installed there}."""
    folders: dict[Path, list[str]] = {}
    for name in weights:
        folders.setdefault(args.checkpoints if name == "crossvlt" else args.pretrained, []).append(name)
    return folders


def parse_names(flag: str, values: Sequence[str], known: Sequence[str] = ()) -> list[str]:
    """Split names at commas and remove duplicates. UserError: a name is not one of ``known``."""
    names = list(dict.fromkeys(name for value in values for name in value.split(",") if name))
    for name in names:
        if known and name not in known:
            hint = " RefShapes is generated by `python -m data.refshapes`." if name == "refshapes" else ""
            hint = hint or did_you_mean(name, known)
            raise UserError(f"{flag} {name}: unknown name.{hint} Choose from {', '.join(known)}.")
    return names


if __name__ == "__main__":
    run_command(main)
