"""Evaluate CrossVLT: P@0.5…0.9, mean IoU and overall IoU, or segment a picture of your own.

    # a released checkpoint on RefCOCO val
    python test.py --dataset refcoco --split val --resume ./checkpoints/best_refcoco.pth --workers 4

    python test.py --dataset refcocog --splitBy umd --split all --resume ./checkpoints/best_refcocog.pth
    torchrun --nproc_per_node 2 test.py --split val,testA,testB --resume ./checkpoints/best_refcoco.pth --json out.json
    python test.py --image photo.jpg --sentence "the left dog" --resume ./checkpoints/best_refcoco.pth --out dog.png

Swin type, window and everything else about the model, picture size and tokenizer are read from the checkpoint.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BertTokenizer
from yacs.config import CfgNode

from bert.tokenization import check_vocabulary, load_tokenizer, tokenize
from CrossVLT import build_crossvlt
from data.dataset_refer_bert import ReferDataset, open_image
from data.loaders import DeviceBatches, build_eval_loader
from data.transforms import preprocess_image, preprocess_mask
from lib import config
from lib.baselines import baseline_metrics
from lib.checkpoint import Checkpoint, read_checkpoint, rebuild
from lib.evaluation import EvaluationResult, evaluate, predict
from lib.metrics import METRIC_NAMES, iou
from lib.visualize import overlay, result_panel, sheet
from refer.refer import REFER
from utils import (
    MissingFileError,
    UserError,
    check_writable,
    launched_rank,
    on_main,
    run_command,
    set_up_logging,
    set_up_processes,
    written_aside,
)

LOG = logging.getLogger("crossvlt")
AS_TRAINED = ("DATA.IMG_SIZE", "DATA.MAX_TOKENS", "PRETRAINED.TOKENIZER")  # taken over from the checkpoint
SPLIT_ORDER = ("val", "testA", "testB", "testC", "test")


def get_parser() -> config.Parser:
    def add_more(parser: config.Parser) -> None:
        parser.add_argument("--resume", metavar="FILE", required=True, help="the checkpoint, in any of its forms")
        parser.add_argument("--json", metavar="FILE", help="write the metrics: a list with one object per split")
        parser.add_argument("--predictions", metavar="FILE", help="write a line of JSON per expression")
        parser.add_argument("--vis", metavar="DIR", help="draw image, truth and prediction of some expressions")
        parser.add_argument(
            "--vis-num",
            "--vis_num",
            metavar="K",
            type=int,
            default=16,
            help="how many, spread over the split (default: 16)",
        )
        parser.add_argument(
            "--shuffle_sentences",
            action="store_true",
            help="control: permute the sentences within the split; a model that reads them must fail",
        )
        parser.add_argument(
            "--baselines", action="store_true", help="show two answers beside it that ignore the sentence"
        )
        parser.add_argument("--image", metavar="FILE", help="segment this picture instead of a dataset")
        parser.add_argument("--sentence", metavar="TEXT", help="what to segment in --image")
        parser.add_argument("--out", metavar="PNG", help="where the overlay of --image goes; the mask goes beside it")

    return config.get_parser("test", __doc__, add_more)


def check_model_flags(cfg: CfgNode, given: set[str], checkpoint: Checkpoint) -> None:
    """An explicit --swin_type or --window12 must not contradict the checkpoint."""
    saved = checkpoint.model_config
    for key, name, flag in (
        ("MODEL.SWIN_TYPE", "swin_type", "--swin_type"),
        ("MODEL.WINDOW_SIZE", "window_size", "--window12"),
    ):
        asked = config.lookup(cfg, key)
        if key in given and asked and asked != saved[name]:
            raise UserError(
                f"{flag}: {checkpoint.path} was trained with {name} {saved[name]}, not {asked}; drop that flag"
            )


def chosen_splits(asked: str, refer: REFER) -> list[str]:
    """``val,testA`` or ``all`` → the names of splits that this dataset has."""
    present = refer.splits()
    if asked == "all":
        known = [split for split in SPLIT_ORDER if split in present]
        known += sorted(set(present) - {"train", *known})
        if not known:
            raise UserError("--split all: this dataset has a train split only")
        return known
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if not names:
        raise UserError(f"--split {asked!r} names no split; this dataset has {', '.join(present)}")
    for name in names:
        refer.getRefIds(split=name)  # an unknown one is an error now, not after the first split's hour
    return list(dict.fromkeys(names))


def print_table(title: str, rows: list[tuple[str, dict[str, float], int]]) -> None:
    """The published table: a row per split, in percent."""
    width = max(len(name) for name, _, _ in rows)
    print(f"\n{title}")
    print(f"{'split':<{width}}" + "".join(f"{name:>8}" for name in METRIC_NAMES) + f"{'expressions':>13}")
    for name, metrics, count in rows:
        print(f"{name:<{width}}" + "".join(f"{metrics[m]:>8.2f}" for m in METRIC_NAMES) + f"{count:>13}")


def draw(dataset: ReferDataset, result: EvaluationResult, folder: Path) -> Path:
    """Write a panel per kept mask and a sheet of them all; gives back the sheet."""
    panels = []
    for index in sorted(result.masks):
        expression = dataset.expressions[index]
        panels.append(result_panel(dataset, result, index))
        name = f"{dataset.split}_{index:06d}_ref{expression.ref_id}_sent{expression.sent_id}.png"
        save_picture(panels[-1], folder / name)
    save_picture(sheet(panels), folder / f"{dataset.split}_sheet.png")
    return folder / f"{dataset.split}_sheet.png"


def save_picture(picture: Image.Image, path: Path) -> None:
    with written_aside(path) as aside:
        picture.save(aside, format="PNG")


def write_lines(path: str, lines: list[str]) -> None:
    with written_aside(path) as aside:
        aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def evaluate_splits(args: Any, cfg: CfgNode, checkpoint: Checkpoint, tokenizer: BertTokenizer) -> None:
    """Judge the model on every asked split and write what was asked for."""
    if args.vis_num < 1:
        raise UserError(f"--vis-num {args.vis_num}: must be above 0")
    refer = REFER(cfg.DATA.ROOT, cfg.DATA.NAME, cfg.DATA.SPLIT_BY)
    splits = chosen_splits(cfg.DATA.SPLIT, refer)
    processes = set_up_processes(cfg.DEVICE)
    set_up_logging(processes.rank)
    for path in (args.json, args.predictions):
        if path:
            on_main(lambda path=path: check_writable(path))
    if args.vis:
        on_main(lambda: check_writable(Path(args.vis, "sheet.png")))
    model = rebuild(checkpoint, build_crossvlt).to(processes.device).eval()
    settings = {
        "checkpoint": str(checkpoint.path),
        "protocol": "paper",
        "img_size": cfg.DATA.IMG_SIZE,
        "gt_mask": "paper",
        "max_tokens": cfg.DATA.MAX_TOKENS,
        "shuffle_sentences": args.shuffle_sentences,
        "swin_type": model.config["swin_type"],
        "window_size": model.config["window_size"],
    }
    rows, report, lines, sheets = [], [], [], []
    for split in splits:
        dataset = ReferDataset(
            refer,
            split,
            tokenizer,
            img_size=cfg.DATA.IMG_SIZE,
            max_tokens=cfg.DATA.MAX_TOKENS,
            seed=cfg.SEED,
            shuffle_sentences=args.shuffle_sentences,
        )
        batches = build_eval_loader(
            dataset,
            batch_size=cfg.BATCH_SIZE,
            workers=cfg.WORKERS,
            pin_memory=cfg.PIN_MEM,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        drawn = set(np.linspace(0, len(dataset) - 1, min(args.vis_num, len(dataset))).astype(int)) if args.vis else ()
        result = evaluate(
            model,
            DeviceBatches(batches, processes.device),
            num_expressions=len(dataset),
            keep_masks=drawn,
            log=LOG.debug,
            progress=split if processes.is_main else None,
        )
        rows.append((split, result.metrics, len(dataset)))
        report.append(
            {
                "dataset": cfg.DATA.NAME,
                "split_by": cfg.DATA.SPLIT_BY,
                "split": split,
                "num_expressions": len(dataset),
                "metrics": result.metrics,
                "settings": settings,
            }
        )
        if args.baselines:
            baselines = on_main(
                lambda dataset=dataset: baseline_metrics(
                    [e.image_id for e in dataset.expressions],
                    [e.ref_id for e in dataset.expressions],
                    lambda index: preprocess_mask(dataset.full_size_mask(index), cfg.DATA.IMG_SIZE),
                )
            )
            rows += [(f"  {name}", metrics, len(dataset)) for name, metrics in baselines.items()]
            report[-1]["baselines"] = baselines
        for counts in result.expressions:
            expression = dataset.expressions[counts.index]
            lines.append(
                json.dumps(
                    {
                        "split": split,
                        "ref_id": expression.ref_id,
                        "sent_id": expression.sent_id,
                        "sentence": expression.sentence,
                        "intersection": counts.intersection,
                        "union": counts.union,
                        "iou": iou(counts.intersection, counts.union),
                    },
                    ensure_ascii=False,
                )
            )
        if args.json:
            on_main(lambda: write_lines(args.json, [json.dumps(report, indent=1)]))
        if args.predictions:
            on_main(lambda: write_lines(args.predictions, lines))
        if args.vis:
            sheets.append(on_main(lambda dataset=dataset, result=result: draw(dataset, result, Path(args.vis))))
    if processes.is_main:
        shuffled = ", sentences shuffled within each split" if args.shuffle_sentences else ""
        print_table(f"{cfg.DATA.NAME} ({cfg.DATA.SPLIT_BY}), {checkpoint.path}, {cfg.DATA.IMG_SIZE} px{shuffled}", rows)
        for path in filter(None, (args.json, args.predictions, *sheets)):
            print(path)


def segment_own_picture(args: Any, cfg: CfgNode, checkpoint: Checkpoint, tokenizer: BertTokenizer) -> None:
    """Write the overlay and the mask of what a sentence means in one picture, at the picture's own size."""
    if not (args.image and args.sentence and args.out):
        raise UserError("one's own picture needs all three of --image FILE, --sentence TEXT and --out PNG")
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: must end in .png")
    if not Path(args.image).is_file():
        raise MissingFileError(f"--image {args.image}: no such file")
    image = ImageOps.exif_transpose(open_image(Path(args.image)))  # as its viewer sees it: left must be left
    processes = set_up_processes(cfg.DEVICE)
    model = rebuild(checkpoint, build_crossvlt).to(processes.device).eval()
    ids, text_mask = (
        torch.from_numpy(x.astype(np.int64)) for x in tokenize(tokenizer, [args.sentence], cfg.DATA.MAX_TOKENS)
    )
    inputs = (preprocess_image(image, cfg.DATA.IMG_SIZE)[None], ids, text_mask)
    mask = predict(model, *(x.to(processes.device) for x in inputs), size=image.size[::-1])[0].cpu().numpy()
    if processes.is_main:
        mask_path = out.with_name(f"{out.stem}_mask.png")
        save_picture(overlay(image, mask), out)
        save_picture(Image.fromarray(mask.astype(np.uint8) * 255), mask_path)
        print(f"{mask.mean():.1%} of the picture is “{args.sentence}”: {out}, {mask_path}")


def main() -> None:
    args = get_parser().parse_args()
    set_up_logging(launched_rank())
    checkpoint = read_checkpoint(args.resume)
    as_trained = checkpoint.extra.get("config", {})
    base = {key: as_trained[key] for key in AS_TRAINED if key in as_trained}
    if Path(base.get("PRETRAINED.TOKENIZER", "")).suffix == ".txt" and not Path(base["PRETRAINED.TOKENIZER"]).exists():
        del base["PRETRAINED.TOKENIZER"]  # trained elsewhere; another vocabulary than that one is refused below
    cfg, given = config.resolve(args, base)
    checkpoint.check_prefix(cfg.PRETRAINED.DDP_TRAINED)
    check_model_flags(cfg, given, checkpoint)
    unused = config.unused_flags(args)
    if unused:
        LOG.warning("not used in evaluation: %s", ", ".join(unused))
    vocab_size = checkpoint.model_config["vocab_size"]
    tokenizer = load_tokenizer(config.tokenizer_name(cfg, vocab_size))
    check_vocabulary(tokenizer, vocab_size, checkpoint.extra.get("vocabulary"))
    if args.image or args.sentence or args.out:
        segment_own_picture(args, cfg, checkpoint, tokenizer)
    else:
        evaluate_splits(args, cfg, checkpoint, tokenizer)


if __name__ == "__main__":
    run_command(main)
