"""Evaluate CrossVLT: P@0.5…0.9, mean IoU and overall IoU; the paper's table; or segment a picture of your own.

    # a released checkpoint on RefCOCO val
    python test.py --dataset refcoco --split val --resume ./checkpoints/best_refcoco.pth --workers 4

    python test.py --dataset refcocog --splitBy umd --split all --resume ./checkpoints/best_refcocog.pth
    torchrun --nproc_per_node 2 test.py --split val,testA,testB --resume ./checkpoints/best_refcoco.pth \\
        --protocol paper,original --json out.json --predictions out.jsonl      # stopped? the same command goes on
    python test.py --table --checkpoints ./checkpoints                         # all eight published rows
    python test.py --vis_compare a.pth,b.pth --split val --vis pictures --vis_maps
    python test.py --image photo.jpg --sentence "the left dog" --resume ./checkpoints/best_refcoco.pth --out dog.png

Swin type, window and everything else about the model, picture size and tokenizer are read from the checkpoint.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import nn
from transformers import BertTokenizer
from yacs.config import CfgNode

from bert.tokenization import check_vocabulary, fingerprint, load_tokenizer, tokenize
from CrossVLT import build_crossvlt
from data.dataset_refer_bert import ReferDataset, open_image
from data.loaders import DeviceBatches, build_eval_batches
from data.transforms import normalize_images, preprocess_image
from lib import config
from lib.baselines import baselines_of
from lib.checkpoint import Checkpoint, read_checkpoint, rebuild
from lib.cli import run_command
from lib.engine.control import Control
from lib.errors import MissingFileError, UserError
from lib.evaluation import EvaluationResult, predict
from lib.files import check_writable, file_sha256, write_text
from lib.protocols import Protocol, choose_protocols
from lib.report.figures import Judged, distinct_names, draw, maps_of, save_image, spread
from lib.report.flags import add_flags, choose_way
from lib.report.results import ResultFile
from lib.report.splits import judge_splits, summary
from lib.report.table import (
    MeasuredRow,
    PublishedRow,
    choose_rows,
    find_checkpoints,
    measured_rows,
    metrics_table,
    text_table,
    write_tables,
)
from lib.visualize import overlay
from refer.refer import REFER
from utils import Distributed, attempt, cpu_group, from_main, init_distributed, launched_rank, on_main, set_up_logging

LOG = logging.getLogger("crossvlt")
AS_TRAINED = ("DATA.IMG_SIZE", "DATA.MAX_TOKENS", "PRETRAINED.TOKENIZER")  # taken over from the checkpoint


class Loaded(NamedTuple):
    """A checkpoint with what it needs to be used."""

    checkpoint: Checkpoint
    cfg: CfgNode
    tokenizer: BertTokenizer
    protocols: list[Protocol]

    def build(self, processes: Distributed) -> nn.Module:
        """The model, on this process's device."""
        return rebuild(self.checkpoint, build_crossvlt).to(processes.device).eval()


def load(args: Any, path: str | Path) -> Loaded:
    """Read a checkpoint and settle what flags, its own configuration and the defaults mean together."""
    checkpoint = read_checkpoint(path)
    as_trained = checkpoint.extra.get("config", {})
    base = {key: as_trained[key] for key in AS_TRAINED if key in as_trained}
    if Path(base.get("PRETRAINED.TOKENIZER", "")).suffix == ".txt" and not Path(base["PRETRAINED.TOKENIZER"]).exists():
        del base["PRETRAINED.TOKENIZER"]  # trained elsewhere; another vocabulary than that one is refused below
    cfg, given = config.resolve(args, base)
    checkpoint.check_prefix(cfg.PRETRAINED.DDP_TRAINED)
    check_model_flags(cfg, given, checkpoint)
    vocab_size = checkpoint.model_config["vocab_size"]
    tokenizer = load_tokenizer(config.tokenizer_name(cfg, vocab_size))
    check_vocabulary(tokenizer, vocab_size, checkpoint.extra.get("vocabulary"))
    switches = {name: getattr(args, name) for name in ("gt_mask", "eval_size", "threshold")}
    protocols = choose_protocols(args.protocol, max_tokens=cfg.DATA.MAX_TOKENS, **switches)
    return Loaded(checkpoint, cfg, tokenizer, protocols)


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


def make_dataset(loaded: Loaded, refer: REFER, split: str, *, shuffle_sentences: bool = False) -> ReferDataset:
    """A split as a model was trained to see it, its pictures all there."""
    data = loaded.cfg.DATA
    dataset = ReferDataset(
        refer,
        split,
        loaded.tokenizer,
        img_size=data.IMG_SIZE,
        max_tokens=data.MAX_TOKENS,
        seed=loaded.cfg.SEED,
        shuffle_sentences=shuffle_sentences,
    )
    dataset.check_images()
    return dataset


def settings_of(
    loaded: Loaded, digest: str, datasets: dict[str, ReferDataset], *, shuffle_sentences: bool = False
) -> dict[str, Any]:
    """What result files say of how their numbers came about."""
    cfg, checkpoint, files = loaded.cfg, loaded.checkpoint, next(iter(datasets.values())).annotation_files
    return {
        "checkpoint": str(checkpoint.path),
        "checkpoint_sha256": digest,
        "swin_type": checkpoint.model_config["swin_type"],
        "window_size": checkpoint.model_config["window_size"],
        "img_size": cfg.DATA.IMG_SIZE,
        "batch_size": cfg.BATCH_SIZE,
        "dataset": cfg.DATA.NAME,
        "split_by": cfg.DATA.SPLIT_BY,
        "splits": {split: len(dataset) for split, dataset in datasets.items()},
        "shuffle_sentences": shuffle_sentences,
        "shuffle_seed": cfg.SEED if shuffle_sentences else None,
        "protocols": [protocol.settings() for protocol in loaded.protocols],
        "vocabulary": fingerprint(loaded.tokenizer),
        "annotations_sha256": on_main(lambda: {path.name: file_sha256(path) for path in files}),
    }


class Session(NamedTuple):
    """The processes of this command, and what their evaluations share."""

    processes: Distributed
    group: dist.ProcessGroup | None
    control: Control

    def judge(
        self,
        model: nn.Module,
        loaded: Loaded,
        datasets: dict[str, ReferDataset],
        *,
        drawn: dict[str, list[int]] | None = None,
        only_drawn: bool = False,
        file: ResultFile | None = None,
    ) -> Iterator[tuple[str, dict[str, EvaluationResult]]]:
        """See :func:`lib.report.splits.judge_splits`; ``only_drawn``: judge nothing else."""
        cfg, processes = loaded.cfg, self.processes

        def make_batches(dataset: ReferDataset, done: Collection[int]) -> DeviceBatches:
            return build_eval_batches(
                dataset,
                processes.device,
                batch_size=cfg.BATCH_SIZE,
                workers=cfg.WORKERS,
                pin_memory=cfg.PIN_MEM,
                rank=processes.rank,
                world_size=processes.world_size,
                targets=[protocol.truth for protocol in loaded.protocols],
                indices=drawn[dataset.split] if only_drawn else None,
                evaluated=done,
            )

        return judge_splits(
            model,
            datasets,
            loaded.protocols,
            make_batches=make_batches,
            batch_size=cfg.BATCH_SIZE,
            drawn=drawn or {},
            only_drawn=only_drawn,
            file=file,
            show_progress=processes.is_main,
            log=LOG.debug,
            stop_requested=self.control.stop_requested,
            group=self.group,
        )


@contextmanager
def joined_processes(cfg: CfgNode):  # noqa: ANN201  (a context manager over a Session)
    """Join the processes, and notice signals while they work."""
    processes = init_distributed(cfg.DEVICE)
    set_up_logging(processes.rank)
    group = cpu_group()
    with Control(0, 0.0, group) as control:
        yield Session(processes, group, control)


def evaluate_splits(args: Any) -> None:
    """Judge a checkpoint on every asked split and write what was asked for."""
    loaded = load(args, args.resume)
    cfg, protocols = loaded.cfg, loaded.protocols
    refer = REFER(cfg.DATA.ROOT, cfg.DATA.NAME, cfg.DATA.SPLIT_BY)
    datasets = {
        split: make_dataset(loaded, refer, split, shuffle_sentences=args.shuffle_sentences)
        for split in refer.choose_splits(cfg.DATA.SPLIT)
    }
    drawn = {split: spread(len(dataset), args.vis_num) for split, dataset in datasets.items()} if args.vis else {}
    with joined_processes(cfg) as session:
        for path in filter(None, (args.json, args.predictions, args.vis and Path(args.vis, "sheet.png"))):
            on_main(lambda path=path: check_writable(path))
        digest = on_main(lambda: file_sha256(args.resume))
        settings = settings_of(loaded, digest, datasets, shuffle_sentences=args.shuffle_sentences)
        file = ResultFile(args.predictions, settings) if args.predictions else None
        model = loaded.build(session.processes)
        rows, report, sheets = defaultdict(list), [], []
        for split, results in session.judge(model, loaded, datasets, drawn=drawn, file=file):
            dataset = datasets[split]
            for protocol in protocols:
                result = results[protocol.name]
                rows[protocol.name].append((split, result.metrics, len(dataset)))
                known = on_main(lambda: baselines_of(dataset, protocol)) if args.baselines else {}  # noqa: B023
                rows[protocol.name] += [(f"  {name}", metrics, len(dataset)) for name, metrics in known.items()]
                if args.json and session.processes.is_main:
                    report.append(summary(dataset, protocol, result, settings))
                    if known:
                        report[-1]["baselines"] = known
            if args.json:
                on_main(lambda: write_text(args.json, json.dumps(report, indent=1) + "\n"))
            if args.vis:
                maps = maps_of(model, dataset, drawn[split], normalize_images) if args.vis_maps else None
                judged = Judged("prediction", dataset, results[protocols[0].name], protocols[0].gt_mask, maps)
                sheets.append(on_main(lambda: draw([judged], drawn[split], Path(args.vis))))  # noqa: B023
        if session.processes.is_main:
            shuffled = ", sentences shuffled within each split" if args.shuffle_sentences else ""
            for protocol in protocols:
                where = f"{cfg.DATA.NAME} ({cfg.DATA.SPLIT_BY}), {args.resume}, {cfg.DATA.IMG_SIZE} px"
                print(f"\n{where}, {protocol.name} protocol{shuffled}\n{metrics_table(rows[protocol.name])}")
            for path in filter(None, (args.json, args.predictions, file and file.settings, *sheets)):
                print(path)


def compare_models(args: Any) -> None:
    """Draw what several checkpoints predict of the same expressions, side by side."""
    paths = [part for part in (part.strip() for part in args.vis_compare.split(",")) if part]
    if not paths:
        raise UserError(f"--vis_compare {args.vis_compare!r} names no checkpoint")
    loaded = [load(args, path) for path in paths]
    if len(loaded[0].protocols) > 1:
        raise UserError(f"--protocol {args.protocol}: --vis_compare draws by one protocol")
    cfg = loaded[0].cfg
    refer = REFER(cfg.DATA.ROOT, cfg.DATA.NAME, cfg.DATA.SPLIT_BY)
    splits = refer.choose_splits(cfg.DATA.SPLIT)
    datasets = [{split: make_dataset(one, refer, split) for split in splits} for one in loaded]
    drawn = {split: spread(len(dataset), args.vis_num) for split, dataset in datasets[0].items()}
    with joined_processes(cfg) as session:
        on_main(lambda: check_writable(Path(args.vis, "sheet.png")))
        judged = defaultdict(list)
        for name, one, own in zip(distinct_names(paths), loaded, datasets, strict=True):
            model = one.build(session.processes)
            for split, results in session.judge(model, one, own, drawn=drawn, only_drawn=True):
                protocol, maps = one.protocols[0], None
                if args.vis_maps:
                    maps = maps_of(model, own[split], drawn[split], normalize_images)
                judged[split].append(Judged(name, own[split], results[protocol.name], protocol.gt_mask, maps))
        for split in splits:
            path = on_main(lambda: draw(judged[split], drawn[split], Path(args.vis)))  # noqa: B023
            if session.processes.is_main:
                print(path)


def make_table(args: Any) -> None:
    """Evaluate the published rows that have a checkpoint and data, and write them beside the paper's."""
    asked, found = vars(args), find_checkpoints(args.checkpoints)
    wanted = choose_rows(asked.get("DATA.NAME"), asked.get("DATA.SPLIT_BY"), asked.get("DATA.SPLIT"))
    folder, rows = Path(args.table_dir), []
    ours = copy(args)
    vars(ours).update({"DATA.NAME": wanted[0].dataset, "DATA.SPLIT_BY": wanted[0].split_by})
    with joined_processes(config.resolve(ours)[0]) as session:
        on_main(lambda: check_writable(folder / "table.md"))
        for name in dict.fromkeys(row.dataset for row in wanted):
            rows += measure([row for row in wanted if row.dataset == name], found.get(name), folder, args, session)
        paths = on_main(lambda: write_tables(rows, folder))
        if session.processes.is_main:
            for protocol in dict.fromkeys(row.protocol for row in rows if row.protocol):
                print(f"\n{text_table(rows, protocol)}")
            print("\n".join(map(str, paths)))


def measure(
    wanted: list[PublishedRow], path: Path | None, folder: Path, args: Any, session: Session
) -> list[MeasuredRow]:
    """The rows of one dataset: evaluated now, or read back where an earlier run has finished them."""
    if path is None:
        return [MeasuredRow(row, reason=f"no checkpoint for {row.dataset} in {args.checkpoints}") for row in wanted]
    ours = copy(args)
    vars(ours).update({"DATA.NAME": wanted[0].dataset, "DATA.SPLIT_BY": wanted[0].split_by})
    loaded, reason = attempt(lambda: load(ours, path))
    refer = None
    if not reason:
        refer, reason = attempt(lambda: REFER(loaded.cfg.DATA.ROOT, wanted[0].dataset, wanted[0].split_by))
    if reason:
        return [MeasuredRow(row, reason=reason) for row in wanted]
    rows, model, digest = [], None, on_main(lambda: file_sha256(path))
    for row in wanted:
        dataset, reason = attempt(lambda: make_dataset(loaded, refer, row.split))  # noqa: B023
        if reason:
            rows.append(MeasuredRow(row, reason=reason))
            continue
        datasets = {row.split: dataset}
        file = ResultFile(folder / f"{row.name}.jsonl", settings_of(loaded, digest, datasets), replace=True)
        if from_main(file.is_finished()):
            LOG.info("%s: finished before, in %s", row.title, file.path)
        else:
            model = model or loaded.build(session.processes)
            try:
                for _ in session.judge(model, loaded, datasets, file=file):
                    pass
            except UserError as error:  # such as a damaged picture
                if session.processes.world_size > 1:  # the others wait for this one
                    raise
                rows.append(MeasuredRow(row, reason=str(error)))
                continue
        rows += on_main(lambda: measured_rows(row, file))  # noqa: B023
    return rows


def segment_own_picture(args: Any) -> None:
    """Write the overlay and the mask of what a sentence means in one picture, at the picture's own size."""
    out = Path(args.out)
    mask_path = out.with_name(f"{out.stem}_mask.png")
    if not Path(args.image).is_file():
        raise MissingFileError(f"--image {args.image}: no such file")
    for path in (out, mask_path):
        check_writable(path, suffix=".png", inputs=[args.image])
    loaded = load(args, args.resume)
    cfg = loaded.cfg
    image = ImageOps.exif_transpose(open_image(Path(args.image)))  # as its viewer sees it: left must be left
    processes = init_distributed(cfg.DEVICE)
    model = loaded.build(processes)
    ids, text_mask = (
        torch.from_numpy(x.astype(np.int64)) for x in tokenize(loaded.tokenizer, [args.sentence], cfg.DATA.MAX_TOKENS)
    )
    inputs = (preprocess_image(image, cfg.DATA.IMG_SIZE)[None], ids, text_mask)
    on_device = (x.to(processes.device) for x in inputs)
    mask = predict(model, *on_device, size=image.size[::-1], protocol=loaded.protocols[0])[0].cpu().numpy()
    if processes.is_main:
        save_image(overlay(image, mask), out)
        save_image(Image.fromarray(mask.astype(np.uint8) * 255), mask_path)
        print(f"{mask.mean():.1%} of the picture is “{args.sentence}”: {out}, {mask_path}")


def main() -> None:
    args = config.get_parser("test", __doc__, add_flags).parse_args()
    set_up_logging(launched_rank())
    way = choose_way(args)
    unused = config.unused_flags(args)
    if unused:
        LOG.warning("not used in evaluation: %s", ", ".join(unused))
    ways = {"image": segment_own_picture, "table": make_table, "vis_compare": compare_models, "splits": evaluate_splits}
    ways[way](args)


if __name__ == "__main__":
    run_command(main)
