"""Generate RefShapes, a small dataset for referring segmentation in the REFER layout, within seconds.

    python -m data.refshapes                          # ./refer/data/refshapes, level basic
    python -m data.refshapes --level full --seed 1    # relations and overlaps; replaces the dataset above
    python -m data.refshapes --root /tmp/data --train-images 200 --val-images 40

Level basic: sentences name the color, shape, size and position of objects that do not overlap.
Level full: sentences also name relations between objects, some of which overlap.
Every sentence is true of exactly one object of its image. In testA, another object has the same shape as the
referred object. In testB, the referred object has a color and shape that occur together in no other split.
The same settings always produce identical files.

    <root>/refshapes/images/refshapes_<id>.jpg   images
    <root>/refshapes/instances.json              COCO annotations, with the "attributes" of every object
    <root>/refshapes/refs(unc).p                 referred objects and their sentences
    <root>/refshapes/vocab.txt                   WordPiece vocabulary of the words used
    <root>/refshapes/refshapes.json              settings and counts
"""

import signal
from pathlib import Path

from data.refshapes.settings import DEFAULT_IMAGES, LEVELS, NAME, Settings
from lib.cli import Parser, run_command
from lib.files import Kind
from refer.datasets import ROOT


def get_parser() -> Parser:
    parser = Parser(prog="python -m data.refshapes", description=__doc__)
    root_help = "folder of the datasets (%(default)s)"
    parser.add_output("--root", kind=Kind.FOLDER, type=Path, default=ROOT, metavar="DIR", help=root_help)
    parser.add_argument(
        "--level", default="basic", choices=LEVELS, help="level of the sentences, see above (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    for split, count in DEFAULT_IMAGES.items():
        parser.add_argument(
            f"--{split}-images", type=int, default=count, metavar="N", help=f"images in {split} (%(default)s)"
        )
    parser.add_argument("--force", action="store_true", help="generate the dataset again even if it exists")
    return parser


def main() -> None:
    args = get_parser().parse_args()

    from data.refshapes.dataset import is_complete, read_info, write_refshapes

    images = {split: getattr(args, f"{split}_images") for split in DEFAULT_IMAGES}
    folder = args.root / NAME
    if not args.force and is_complete(folder, Settings(args.level, args.seed, images)):
        print(f"{folder} already has level {args.level}, seed {args.seed}: nothing to do")
    else:
        write_refshapes(**vars(args))
    info = read_info(folder)
    for split in images:
        print(f"{split}: {images[split]} images, {info['refs'][split]} refs, {info['expressions'][split]} expressions")
    print(f"in {folder}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as on Ctrl-C
    run_command(main)
