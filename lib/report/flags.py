"""The flags of test.py that aren't configuration keys, and what they ask for together."""

from pathlib import Path
from typing import Any

from lib.cli import Parser
from lib.errors import UserError
from lib.report.results import PARTIAL, settings_path
from lib.variants import EVAL_SIZES, MASK_MODES

PROTOCOL = ("protocol", "gt_mask", "eval_size", "threshold")
# The ways of using test.py: the flags that each needs, and those it takes besides.
WAYS = {
    "image": (("resume", "image", "sentence", "out"), ("threshold",)),
    "table": (("table", "checkpoints"), ("table_dir", *PROTOCOL)),
    "vis_compare": (("vis_compare", "vis"), ("vis_num", "vis_maps", *PROTOCOL)),
    "splits": (
        ("resume",),
        ("json", "predictions", "shuffle_sentences", "baselines", "vis", "vis_num", "vis_maps", *PROTOCOL),
    ),
}


# fmt: off
def add_flags(parser: Parser) -> None:
    """Add them to a parser."""
    add = parser.add_argument
    add("--resume", metavar="FILE", help="the checkpoint, in any of its forms")
    add("--protocol", metavar="NAMES", default="paper",
        help="paper, original or both, paper,original: see docs/protocols.md (default: paper)")
    add("--gt_mask", choices=MASK_MODES,
        help="where polygons of an object overlap is a hole (paper) or object (union)")
    add("--eval_size", choices=EVAL_SIZES, help="judge at the model's picture size or at each picture's own")
    add("--threshold", metavar="P", type=float,
        help="object where its probability is at least P (default: where it is the likelier class)")
    add("--json", metavar="FILE", help="write the metrics: a list with an object per split and protocol")
    add("--predictions", metavar="FILE",
        help="write a line of JSON per expression and protocol, with the mask; a stopped evaluation goes on from it")
    add("--shuffle_sentences", action="store_true",
        help="control: permute the sentences within the split; a model that reads them must fail")
    add("--baselines", action="store_true", help="show two answers beside it that ignore the sentence")
    add("--vis", metavar="DIR", help="draw image, truth and prediction of some expressions")
    add("--vis-num", "--vis_num", metavar="K", type=int, default=16,
        help="how many, spread over the split (default: 16)")
    add("--vis_maps", action="store_true", help="draw the four alignment maps too")
    add("--vis_compare", metavar="A,B",
        help="instead of --resume: draw what several checkpoints predict side by side; judges only what it draws")
    add("--table", action="store_true", help="instead of --resume: the paper's rows, ours beside the paper's")
    add("--checkpoints", metavar="DIR", help="of --table: a folder with best_<set>.pth, or a yaml of set: file")
    add("--table_dir", metavar="DIR", default="models/table",
        help="where --table writes, and goes on when it was stopped (default: models/table)")
    add("--image", metavar="FILE", help="segment this picture instead of a dataset")
    add("--sentence", metavar="TEXT", help="what to segment in --image")
    add("--out", metavar="PNG", help="where the overlay of --image goes; the mask goes beside it")
# fmt: on


def choose_way(args: Any) -> str:
    """The way of ``WAYS`` that the flags ask for. UserError: one is missing, or does nothing beside the others."""
    if args.image or args.sentence or args.out:
        way = "image"
    elif args.table or args.checkpoints:
        way = "table"
    else:
        way = "vis_compare" if args.vis_compare else "splits"
    needed, taken = WAYS[way]
    for name in needed:
        if not getattr(args, name):
            several = f" (all of {', '.join(f'--{one}' for one in needed)})" if len(needed) > 1 else ""
            raise UserError(f"give --{name} too{several}; see --help")
    parser = Parser()
    add_flags(parser)
    for name in {name: None for flags in WAYS.values() for several in flags for name in several}:
        if name not in needed + taken and getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name} does nothing beside {' and '.join(f'--{one}' for one in needed)}: leave it out")
    if args.vis_maps and not args.vis:
        raise UserError("--vis_maps needs --vis DIR: where to draw")
    if args.predictions and Path(args.predictions).suffix == PARTIAL:
        whole = args.predictions.removesuffix(PARTIAL)
        raise UserError(f"--predictions {args.predictions}: to go on from it, name what it becomes: {whole}")
    if args.predictions and args.json:
        written = (args.predictions, f"{args.predictions}{PARTIAL}", settings_path(args.predictions))
        if Path(args.json).resolve() in [Path(path).resolve() for path in written]:
            raise UserError(f"--json {args.json} is one of the files of --predictions: name another")
    if args.vis_num != parser.get_default("vis_num") and not args.vis:
        raise UserError("--vis-num needs --vis DIR: where to draw")
    if args.vis_num < 1:
        raise UserError(f"--vis-num {args.vis_num}: must be above 0")
    return way
