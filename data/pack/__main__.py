"""Pack the images and masks of splits into HDF5 files, from which training and evaluation load much faster.

    python -m data.pack --dataset refcoco                               # train and val at 480×480
    python -m data.pack --dataset refcocog --splitBy umd --split all    # val and test
    python train.py --dataset refcoco --packed refer/data/packed/refcoco_unc_train_480.h5 \\
        --packed refer/data/packed/refcoco_unc_val_480.h5 ...

The samples are bitwise those of the image files, which are not needed any more. If the command is interrupted, the same
command continues it. If the files are complete, it verifies them. See docs/performance.md.
"""

from pathlib import Path

from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.files import Kind
from lib.options import MIN_IMAGE_SIZE
from lib.variants import IMG_SIZE
from refer.datasets import ROOT, parse_datasets


def get_parser() -> Parser:
    parser = Parser(prog="python -m data.pack", description=__doc__)
    add = parser.add_argument
    add("--dataset", default="refcoco", metavar="NAME", help="name of the dataset (%(default)s)")
    add("--splitBy", default="", metavar="NAME", help="split system (default: as for train.py)")
    add("--split", default="train,val", metavar="NAMES", help="splits, or all for all but train (%(default)s)")
    add("--img_size", type=int, default=IMG_SIZE, metavar="S", help="images are resized to S×S (%(default)s)")
    parser.add_input("--refer_data_root", default=str(ROOT), metavar="DIR", help="folder of the datasets (%(default)s)")
    out_help = "folder of the packed files (default: <refer_data_root>/packed)"
    parser.add_output("--out", kind=Kind.FOLDER, type=Path, metavar="DIR", help=out_help)
    return parser


def main() -> None:
    args = get_parser().parse_args()

    from data.pack.writing import pack_split
    from lib.files import check_writable
    from refer.refer import REFER

    if args.img_size < MIN_IMAGE_SIZE:
        raise UserError(f"--img_size {args.img_size}: must be at least {MIN_IMAGE_SIZE}.")
    folder = args.out or Path(args.refer_data_root, "packed")
    for dataset, split_by in parse_datasets(args.refer_data_root, args.dataset, args.splitBy):
        refer = REFER(args.refer_data_root, dataset, split_by)
        splits = refer.choose_splits(args.split)
        check_writable(folder, Kind.FOLDER)
        for split in splits:
            path = pack_split(refer, split, args.img_size, folder)
            print(f"{path}: complete and intact, {path.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    run_command(main)
