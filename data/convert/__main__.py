"""Convert your own images, objects and sentences to a dataset in the REFER layout.

    # objects in a COCO file; columns of sentences.csv: image, annotation_id, sentence[, split]
    python -m data.convert --name mine --sentences sentences.csv --images photos --instances instances.json

    # objects as masks, one PNG each; columns: image, sentence[, mask][, split][, category]
    python -m data.convert --name mine --sentences sentences.jsonl --images photos --masks masks

The command checks all files, writes <refer_data_root>/mine, prints the size of each split and draws a contact sheet.
Then `train.py --dataset mine` and `test.py --dataset mine` work. See docs/custom_data.md.
"""

import signal
import sys
from pathlib import Path

from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.files import Kind, check_writable
from refer.datasets import ROOT


def get_parser() -> Parser:
    parser = Parser(prog="python -m data.convert", description=__doc__)
    add = parser.add_argument
    add("--name", help="name of the new dataset, which other commands take as --dataset")
    file, folder = ({"must_exist": True, "type": Path, "metavar": kind} for kind in ("FILE", "DIR"))
    parser.add_input("--sentences", help="a .csv, .tsv or .jsonl file with one row per sentence", **file)
    parser.add_input("--images", help="folder of the images", **folder)
    parser.add_input("--instances", help="COCO annotation file with the objects", **file)
    masks_help = "folder of masks, instead of --instances: PNG files with background 0"
    parser.add_input("--masks", help=masks_help, **folder)
    root_help = "folder of the datasets (%(default)s)"
    parser.add_output("--refer_data_root", kind=Kind.FOLDER, type=Path, default=ROOT, metavar="DIR", help=root_help)
    add("--splitBy", default="unc", metavar="NAME", help="name of the split system (%(default)s)")
    add("--link", action="store_true", help="create symbolic links to the images instead of copies")
    share_help = "fraction of the images in val if the sentence file has no column split (%(default)s)"
    add("--val-share", type=float, default=0.1, metavar="X", help=share_help)
    add("--test-share", type=float, default=0.1, metavar="X", help="the same for the split test (%(default)s)")
    add("--seed", type=int, default=0, help="random seed of the assignment to splits (%(default)s)")
    add("--force", action="store_true", help="replace a dataset of this name that was made by this command")
    sheet_help = "output file (samples.png in the folder of the dataset)"
    parser.add_output("--contact-sheet", kind=Kind.PNG, type=Path, metavar="PNG", help=sheet_help)
    add("--samples", type=int, default=12, metavar="N", help="expressions on the contact sheet; 0: none (%(default)s)")
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    missing = [flag for flag in ("name", "sentences", "images") if not getattr(args, flag)]
    if missing:  # checked here, because argparse would not suggest the right name for a mistyped flag
        parser.error(f"--{missing[0]} is missing")

    from data.convert.dataset import SHEET_FILE, Source, convert
    from data.convert.splits import SplitShares
    from data.convert.summary import next_commands, samples
    from lib.tables import to_text
    from lib.visualize import MAX_PANELS, contact_sheet, expression_panel, spread_indices
    from refer.datasets import Counts

    source = Source(args.sentences, args.images, args.instances, args.masks)
    shares = SplitShares(args.val_share, args.test_share, args.seed)
    folder = args.refer_data_root / args.name
    if not 0 <= args.samples <= MAX_PANELS:
        raise UserError(f"--samples {args.samples}: must be from 0 to {MAX_PANELS}.")
    if args.contact_sheet:
        if not args.samples:
            raise UserError("--contact-sheet cannot be combined with --samples 0.")
        if args.contact_sheet.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--contact-sheet {args.contact_sheet}: choose a file outside of {folder}.")
        source.check()
        check_writable(args.contact_sheet, Kind.PNG)

    converted = convert(
        args.name, source, shares, args.refer_data_root, split_by=args.splitBy, link=args.link, force=args.force
    )
    counts = converted.refer.counts()
    print(to_text([("split", *Counts._fields), *((split, *map(str, numbers)) for split, numbers in counts.items())]))
    for warning in converted.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"\nDataset written to {folder}. All masks were verified.")
    if args.samples:
        chosen = samples(converted.refer, spread_indices(len(converted.refer.Sents), args.samples))
        panels = [expression_panel(sample.image, sample.mask, [], sample.sentence, sample.note) for sample in chosen]
        path = args.contact_sheet or folder / SHEET_FILE
        contact_sheet(panels).save(path)
        print(f"Contact sheet: {path}. Check that the sentences fit the masks.")
    for title, commands in next_commands(converted.refer, list(counts), args.refer_data_root).items():
        print("\n    ".join([f"\n{title}", *commands]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as on Ctrl-C
    run_command(main)
