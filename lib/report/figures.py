"""Figures of evaluated expressions: one panel per expression, several models side by side, contact sheets."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import nn

from data.dataset_refer_bert import ReferDataset
from data.pack.source import check_packed
from data.transforms import normalize_images
from lib.collector import EvaluationResult
from lib.drawing import Drawing
from lib.errors import UserError
from lib.evaluation import alignment_maps, evaluate
from lib.files import Kind, check_writable
from lib.loading import load_for_evaluation, start_evaluation
from lib.report.commands import parse_ids
from lib.visualize import (
    DEFAULT_STYLE,
    MAX_PANELS,
    Prediction,
    Style,
    contact_sheet,
    expression_panel,
    parse_style,
    spread_indices,
)
from refer.masks import decode_mask
from refer.refer import REFER
from utils import on_main


class ModelResult(NamedTuple):
    """A model's results on a split. ``result`` contains the masks of the expressions to draw."""

    name: str
    dataset: ReferDataset
    result: EvaluationResult
    gt_mask: str = "paper"  # how overlapping polygons of a target are drawn, as in lib.protocols
    maps: Mapping[int, list[np.ndarray]] | None = None  # alignment maps by index, on the process that draws


def compute_maps(model: nn.Module, dataset: ReferDataset, indices: Sequence[int]) -> dict[int, list[np.ndarray]]:
    """Return the four alignment maps of each expression in ``indices``."""
    maps = {}
    for index in indices:
        sample = dataset[index]
        inputs = (normalize_images(sample["image"]), sample["input_ids"], sample["attention_mask"])
        maps[index] = alignment_maps(model, *(tensor[None] for tensor in inputs))[0]
    return maps


def draw_expression(models: Sequence[ModelResult], index: int, style: Style = DEFAULT_STYLE) -> Drawing:
    """Return a panel of the image, the target mask and each model's prediction for one expression."""
    dataset = models[0].dataset
    expression = dataset.expressions[index]
    predictions = [
        Prediction(
            model.name,
            decode_mask(model.result.masks[index]),
            model.result.iou(index),
            model.maps[index] if model.maps else None,
        )
        for model in models
    ]
    target = dataset.full_size_mask(index, models[0].gt_mask).astype(bool)
    note = f"{dataset.split}  ref {expression.ref_id}  sentence {expression.sent_id}  {dataset.file_name(index)}"
    return expression_panel(dataset.load_image(index), target, predictions, expression.sentence, note, style)


def draw_validation(dataset: ReferDataset, result: EvaluationResult) -> dict[str, Image.Image]:
    """Draw the expressions whose masks are in ``result``. Return the images by their names in TensorBoard."""
    models = [ModelResult("prediction", dataset, result)]
    return {
        f"val/{number}": draw_expression(models, index).render() for number, index in enumerate(sorted(result.masks))
    }


def draw_split(
    models: Sequence[ModelResult], indices: Sequence[int], folder: Path, style: Style = DEFAULT_STYLE
) -> Path:
    """Write a panel per index and a contact sheet of the first ``MAX_PANELS``. Return the path of the contact sheet.

    Images in PDF and SVG have twice the resolution of those in PNG, except on the contact sheet.

    Raises:
        UserError: an image cannot be written.
    """
    dataset, panels = models[0].dataset, []
    for index in indices:
        expression, panel = dataset.expressions[index], draw_expression(models, index, style)
        name = f"{dataset.split}_{index:06d}_ref{expression.ref_id}_sent{expression.sent_id}.{style.file_format}"
        panel.save(folder / name, style.file_format)
        if len(panels) < MAX_PANELS:
            panels.append(panel)
    path = folder / f"{dataset.split}_sheet.{style.file_format}"
    contact_sheet(panels).save(path, style.file_format, pixel_ratio=1)
    return path


def choose_expressions(
    datasets: Mapping[str, ReferDataset], count: int, sent_ids: Collection[int]
) -> dict[str, list[int]]:
    """Return the indices to draw by split: of the sentences ``sent_ids``, or ``count`` of each split if there are none.

    Raises:
        UserError: a sentence is in none of the splits.
    """
    if not sent_ids:
        return {split: spread_indices(len(dataset), count) for split, dataset in datasets.items()}
    ids = {split: [expression.sent_id for expression in dataset.expressions] for split, dataset in datasets.items()}
    missing = sorted(set(sent_ids).difference(*ids.values()))
    if missing:
        raise UserError(f"--vis-ids {missing[0]}: no sentence of {', '.join(datasets)} has this sent_id.")
    return {split: [i for i, sent_id in enumerate(found) if sent_id in sent_ids] for split, found in ids.items()}


def compare_models(args: Any) -> None:
    """Draw the predictions of several checkpoints for the same expressions side by side.

    Args:
        args: the parsed flags of test.py; ``vis_compare`` names the checkpoints, ``vis`` the folder.

    Raises:
        UserError: a checkpoint or dataset cannot be used, or an image cannot be written.
    """
    style = parse_style(args.vis_color, args.vis_scale, args.vis_format)
    paths, folder = [part.strip() for part in args.vis_compare.split(",") if part.strip()], Path(args.vis)
    if not paths:
        raise UserError(f"--vis_compare {args.vis_compare!r} contains no checkpoint.")
    checkpoints = [load_for_evaluation(args, path) for path in paths]
    for loaded in checkpoints if args.vis_maps else ():
        loaded.checkpoint.check_maps()
    cfg, protocols = checkpoints[0].cfg, checkpoints[0].protocols
    if len(protocols) > 1:
        raise UserError(f"--protocol {args.protocol}: --vis_compare draws under one protocol. Choose one of them.")
    refer = REFER(cfg.DATA.ROOT, cfg.DATA.NAME, cfg.DATA.SPLIT_BY)
    splits = refer.choose_splits(cfg.DATA.SPLIT)
    check_packed(cfg.DATA.PACKED, *((refer.dataset, refer.splitBy, split) for split in splits))
    datasets = [loaded.open_splits(refer, splits) for loaded in checkpoints]
    indices_of = choose_expressions(datasets[0], args.vis_num, parse_ids(args.vis_ids))
    results: dict[str, list[ModelResult]] = defaultdict(list)
    with start_evaluation(cfg) as setup:
        on_main(lambda: check_writable(folder, Kind.FOLDER))
        for name, loaded, opened in zip(distinct_names(paths), checkpoints, datasets, strict=True):
            model = loaded.build_model(setup.dist.device)
            for split, indices in indices_of.items():
                if not indices:
                    continue
                dataset, (protocol,) = opened[split], loaded.protocols
                found = evaluate(model, dataset, [protocol], setup, indices=indices, keep_masks=indices)
                maps = compute_maps(model, dataset, indices) if args.vis_maps and setup.dist.is_main else None
                results[split].append(ModelResult(name, dataset, found[protocol.name], protocol.gt_mask, maps))
        sheets = on_main(lambda: [draw_split(results[split], indices_of[split], folder, style) for split in results])
        if setup.dist.is_main:
            print("\n".join(map(str, sheets)))


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Return distinct names for the paths: their stems; if these repeat, folder/stem; otherwise the paths."""
    for names in (
        [Path(path).stem for path in paths],
        [f"{Path(path).parent.name}/{Path(path).stem}" for path in paths],
    ):
        if len(set(names)) == len(names):
            return names
    return list(paths)
