"""Evaluate CrossVLT: P@0.5…0.9, mean IoU and overall IoU.

    # a released checkpoint on RefCOCO val
    python test.py --dataset refcoco --split val --resume ./checkpoints/best_refcoco.pth --workers 4

    python test.py --dataset refcocog --splitBy umd --split all --resume ./checkpoints/best_refcocog.pth
    torchrun --nproc_per_node 2 test.py --split val,testA,testB --resume ./checkpoints/best_refcoco.pth \\
        --protocol paper,original --json out.json --predictions out.jsonl      # if interrupted, run it again
    python test.py --table --checkpoints ./checkpoints                         # all rows of the paper's table
    python test.py --vis_compare a.pth,b.pth --split val --vis images --vis_maps
    python test.py --image photo.jpg --sentence "the left dog" --resume ./checkpoints/best_refcoco.pth --out dog.png

The properties of the model (Swin type, window, …), the image size and the tokenizer are read from the checkpoint.
"""

import functools
import logging
from contextlib import nullcontext
from pathlib import Path

from lib import config
from lib.charts import FORMATS
from lib.cli import Parser, run_command
from lib.files import Kind
from lib.protocols import add_protocol_flags
from lib.report.commands import choose_command, parse_ids
from lib.variants import RELEASED_HINT

LOG = logging.getLogger("crossvlt")


def add_arguments(parser: Parser) -> None:
    """Add the flags that are not configuration keys."""
    add, add_input, add_output = parser.add_argument, parser.add_input, parser.add_output
    resume_help = "checkpoint: released, or written by train.py"
    add_input("--resume", must_exist=True, hint=RELEASED_HINT, metavar="FILE", help=resume_help)
    add_protocol_flags(parser)
    json_help = "write the metrics: a list with an object per split and protocol"
    add_output("--json", kind=Kind.JSON_LIST, metavar="FILE", help=json_help)
    predictions_help = "write results and masks as JSON lines; can be interrupted and continued"
    add_output("--predictions", kind=Kind.JSON_LINES, metavar="FILE", help=predictions_help)
    add("--shuffle_sentences", action="store_true", help="control experiment: permute the sentences within the split")
    add("--baselines", action="store_true", help="also evaluate two baselines that ignore the sentence")
    vis_help = "draw image, target mask and prediction of some expressions"
    add_output("--vis", kind=Kind.FOLDER, metavar="DIR", help=vis_help)
    add("--vis-num", "--vis_num", metavar="K", type=int, default=16, help="number of expressions to draw (%(default)s)")
    add("--vis-ids", "--vis_ids", metavar="ID,ID", help="draw the sentences with these sent_ids instead")
    add("--vis_maps", action="store_true", help="also draw the four alignment maps")
    scale_help = "values at the ends of the maps' color scale (-1 1)"
    add("--vis-scale", "--vis_scale", metavar=("LOW", "HIGH"), type=float, nargs=2, help=scale_help)
    color_help = "color of the predicted mask, a name or #rrggbb; for several models separated by commas"
    add("--vis-color", "--vis_color", metavar="COLOR", help=color_help)
    format_help = "format of the drawings (%(default)s)"
    add("--vis-format", "--vis_format", choices=FORMATS, default="png", help=format_help)
    add_input("--vis_compare", metavar="A,B", help="instead of --resume: draw several checkpoints side by side")
    add("--table", action="store_true", help="instead of --resume: reproduce the paper's table")
    checkpoints_help = "for --table: folder with best_<dataset>.pth, or YAML file with lines dataset: file"
    add_input("--checkpoints", must_exist=True, hint=RELEASED_HINT, metavar="DIR", help=checkpoints_help)
    table_help = "for --table: folder of the results (%(default)s)"
    add_output("--table_dir", kind=Kind.FOLDER, metavar="DIR", default="models/table", help=table_help)
    add_input("--image", must_exist=True, metavar="FILE", help="instead of a dataset: segment this image")
    sentence_help = "for --image: the object to segment; repeat the flag for further objects"
    add("--sentence", metavar="TEXT", action="append", help=sentence_help)
    out_help = "for --image: overlay; the mask is written beside it (several sentences: NAME_1.png, NAME_1_mask.png, …)"
    add_output("--out", kind=Kind.PNG, metavar="PNG", help=out_help)


def main() -> None:
    parser = config.get_parser("test", __doc__, add_arguments)
    args = parser.parse_args()
    command = choose_command(args, parser)

    # Heavy imports come after parsing, so that --help and typos are answered at once.
    from data.pack.source import check_packed
    from lib.evaluation import evaluate
    from lib.files import check_writable
    from lib.loading import load_for_evaluation, start_evaluation
    from lib.report.figures import ModelResult, choose_expressions, compare_models, compute_maps, draw_split
    from lib.report.results import ResultFile
    from lib.report.summary import Summary
    from lib.report.table import reproduce_table
    from lib.segment import segment_image
    from lib.visualize import parse_style
    from refer.refer import REFER
    from utils import launched_rank, on_main, set_up_logging

    set_up_logging(launched_rank())
    unused = config.unused_flags(args)
    if unused:
        LOG.warning("not used in evaluation: %s", ", ".join(unused))
    if command == "image":
        return segment_image(args)
    if command == "table":
        return reproduce_table(args)
    if command == "vis_compare":
        return compare_models(args)

    style = parse_style(args.vis_color, args.vis_scale, args.vis_format)
    loaded = load_for_evaluation(args, args.resume)
    if args.vis_maps:
        loaded.checkpoint.check_maps()
    cfg, protocols = loaded.cfg, loaded.protocols
    refer = REFER(cfg.DATA.ROOT, cfg.DATA.NAME, cfg.DATA.SPLIT_BY)
    splits = refer.choose_splits(cfg.DATA.SPLIT)
    check_packed(cfg.DATA.PACKED, *((refer.dataset, refer.splitBy, split) for split in splits))
    datasets = loaded.open_splits(refer, splits, shuffle_sentences=args.shuffle_sentences)
    drawn_in = choose_expressions(datasets, args.vis_num, parse_ids(args.vis_ids)) if args.vis else {}
    outputs = {args.json: Kind.JSON_LIST, args.predictions: Kind.JSON_LINES, args.vis: Kind.FOLDER}
    with start_evaluation(cfg, keeps_results=bool(args.predictions)) as setup:
        on_main(lambda: [check_writable(path, kind) for path, kind in outputs.items() if path])
        settings = loaded.settings(datasets, setup.dist.device, shuffle_sentences=args.shuffle_sentences)
        file = ResultFile(args.predictions, settings) if args.predictions else None
        summary, sheets = Summary(protocols, settings, with_baselines=args.baselines), []
        with file or nullcontext():
            model = loaded.build_model(setup.dist.device)
            for dataset in datasets.values():
                drawn = drawn_in.get(dataset.split, [])
                results = evaluate(model, dataset, protocols, setup, keep_masks=drawn, sink=file)
                on_main(functools.partial(summary.add, dataset, results))
                if args.json:
                    on_main(lambda: summary.write_json(args.json))  # after every split, in case a later one fails
                if drawn:
                    maps = compute_maps(model, dataset, drawn) if args.vis_maps and setup.dist.is_main else None
                    result, gt_mask = results[protocols[0].name], protocols[0].gt_mask
                    drawings = [ModelResult("prediction", dataset, result, gt_mask, maps)]
                    sheets.append(on_main(functools.partial(draw_split, drawings, drawn, Path(args.vis), style)))
        if setup.dist.is_main:
            print(summary.text())
            for path in filter(None, (args.json, args.predictions, file and file.settings, *sheets)):
                print(path)


if __name__ == "__main__":
    run_command(main)
