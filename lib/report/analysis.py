"""Analyze result files without the model: filter, score, evaluate with other target masks, compare two models.

``python -m lib.rescore`` prints what these functions return. lib/report/results.py describes the files.
"""

import functools
import re
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from lib.cli import did_you_mean
from lib.errors import UserError
from lib.files import protect
from lib.metrics import compute_metrics, intersection_and_union, iou
from lib.protocols import SWITCHES, protocol_name
from lib.report.intervals import Scoring, intervals, paired_intervals
from lib.report.names import settings_path
from lib.report.results import Line, counts_of, read_results
from refer.masks import decode_mask, resize_mask
from refer.refer import REFER

# Settings on which compared files should agree.
SHARED_SETTINGS = ("dataset", "split_by", "img_size", "shuffle_sentences", "precision")
# Settings whose other values need the model: masks that were made with one value cannot be converted to another.
MODEL_SETTINGS = [name for name, switch in SWITCHES.items() if switch.needs_model]
Row = dict[str, Any]


class Results(NamedTuple):
    """A result file, or the selected part of it."""

    path: str
    header: dict[str, Any]
    splits: dict[str, int]  # number of expressions of each whole split
    protocols: dict[str, dict[str, Any]]  # settings by name
    lines: list[Line]
    warning: str = ""  # set if the file is partial or has no settings


class Filters(NamedTuple):
    """Which expressions to score. Empty fields exclude nothing."""

    splits: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()
    first_sentences: bool = False  # only the first sentence of each object; applied before the filters below
    sentence: re.Pattern[str] | None = None
    words: tuple[float, float] | None = None  # minimum and maximum number of words
    sent_ids: frozenset[int] | None = None

    def match(self, line: Line) -> bool:
        """Return whether an expression matches ``sentence``, ``words`` and ``sent_ids``."""
        return (
            (self.sentence is None or self.sentence.search(line["sentence"]) is not None)
            and (self.words is None or self.words[0] <= len(line["sentence"].split()) <= self.words[1])
            and (self.sent_ids is None or line["sent_id"] in self.sent_ids)
        )


def load_results(path: str) -> Results:
    """Read a result file, complete or partial, and check it.

    Raises:
        MissingFileError, UserError: the file does not exist, is corrupt, or is not a result file.
    """
    protect(path, settings_path(path))
    header, lines = read_results(path)
    splits, protocols = header["splits"], {settings["name"]: settings for settings in header["protocols"]}
    seen = set()
    for line in lines:
        key = (line["split"], line["protocol"], line["ref_id"], line["sent_id"])
        if key in seen:
            raise UserError(
                f"{path} is corrupt: sent_id {line['sent_id']} of {line['split']}, {line['protocol']} occurs twice."
            )
        seen.add(key)
    existing, total = len({(split, *ids) for split, _, *ids in seen}), sum(splits.values())
    is_complete = header.get("complete") is True and len(lines) >= total * len(protocols)
    warning = "" if is_complete else f"{path} is partial: it has {existing} of {total} expressions."
    if header["complete"] is None:
        missing = f"{path} has no settings ({settings_path(path).name} is missing)"
        warning = f"{missing}: its model is unknown, and whether it is complete."
    return Results(path, header, splits, protocols, lines, warning)


def check_names(flag: str, requested: Sequence[str], names_by_file: dict[str, Collection[str]]) -> None:
    """Check that every requested name is in some file, and that every file has one of them.

    Args:
        flag: the flag that requests the names, for the message.
        requested: the requested names; if empty, nothing is checked.
        names_by_file: the names in each file.

    Raises:
        UserError: with the names that exist.
    """
    known = {name for names in names_by_file.values() for name in names}
    for path, names in names_by_file.items():
        missing = [name for name in requested if name not in known]
        if not missing and not set(requested) & set(names):
            missing = list(requested)
        if missing:
            hint = did_you_mean(missing[0], list(names))
            raise UserError(f"{flag} {','.join(missing)}: not in {path}, which has {', '.join(names)}.{hint}")


def select(results: Results, filters: Filters) -> Results:
    """Return the part of a result file that matches the filters. UserError: no expression matches."""
    splits = {name: results.splits[name] for name in results.splits if name in (filters.splits or results.splits)}
    names = filters.protocols or results.protocols
    protocols = {name: settings for name, settings in results.protocols.items() if name in names}
    lines = [line for line in results.lines if line["split"] in splits and line["protocol"] in protocols]
    if filters.first_sentences:
        first: dict[tuple[str, str, int], Line] = {}
        for line in sorted(lines, key=lambda line: line["index"]):  # a partial file is not sorted
            first.setdefault((line["split"], line["protocol"], line["ref_id"]), line)
        lines = list(first.values())
    lines = [line for line in lines if filters.match(line)]
    if not lines:
        raise UserError(f"{results.path}: No expression matches these filters (0 of {sum(splits.values())}).")
    return results._replace(splits=splits, protocols=protocols, lines=lines)


def check_model_settings(results: Results, requested: dict[str, Any]) -> None:
    """Check that the masks were made with the requested settings.

    Args:
        results: the result file.
        requested: values of ``MODEL_SETTINGS``; None: any value is accepted.

    Raises:
        UserError: the masks were made with another value; the message says how to get the requested one.
    """
    for setting, value in requested.items():
        others = [name for name, settings in results.protocols.items() if settings.get(setting) != value]
        if value is None or not others:
            continue
        remedy = f"Run test.py --{setting} {value}."
        if len(others) < len(results.protocols):
            remedy = f"Choose --protocol {next(name for name in results.protocols if name not in others)}."
        raise UserError(
            f"--{setting} {value}: {results.path} has masks of protocol {others[0]}, which were made with {setting} "
            f"{results.protocols[others[0]].get(setting)}, and {SWITCHES[setting].needs_model}. {remedy}"
        )


def evaluate_masks(results: Results, gt_mask: str, get_refer: Callable[[str, str], REFER]) -> Results:
    """Compute intersections and unions of the stored masks with the target masks of another ``gt_mask``.

    Each target mask is rasterized once, at the size of the image, and resized if the stored masks are.

    Args:
        results: protocols that use another gt_mask are evaluated again and renamed; the others stay.
        gt_mask: one of :data:`lib.variants.MASK_MODES`.
        get_refer: returns the annotations of (dataset, splitBy); called only if they are needed.

    Raises:
        UserError: an expression has no stored mask, or the annotations are not those of the result file.
    """
    protocols, new_names = {}, {}
    for name, settings in results.protocols.items():
        if settings.get("gt_mask") != gt_mask:
            new_names[name] = protocol_name(name.split("+")[0], {**settings, "gt_mask": gt_mask})
            settings = {**settings, "name": new_names[name], "gt_mask": gt_mask}
        protocols[settings["name"]] = settings
    if not new_names:
        return results
    lines = [line for line in results.lines if line["protocol"] not in new_names]
    changed = sorted((line for line in results.lines if line["protocol"] in new_names), key=lambda line: line["ref_id"])
    refer = get_refer(str(results.header.get("dataset")), str(results.header.get("split_by")))
    for ref_id, group in groupby(changed, key=lambda line: line["ref_id"]):
        full_size, image_id = refer.getMask(ref_id, mode=gt_mask)["mask"], refer.Refs[ref_id]["image_id"]
        resized = functools.cache(functools.partial(resize_mask, full_size))
        for line in group:
            where = f"{results.path}: sent_id {line['sent_id']}"
            predicted = stored_mask(line, where)
            is_resized = results.protocols[line["protocol"]].get("eval_size") == "resized"
            target = resized(len(predicted)) if is_resized else full_size
            if target.shape != predicted.shape or image_id != line["image_id"]:
                raise UserError(
                    f"{where} has a mask of {_size(predicted)} pixels on image {line['image_id']}, but in "
                    f"{refer.refs_path} it is on image {image_id} with {_size(target)} pixels. Use the annotations "
                    "that the file was made with."
                )
            counts = intersection_and_union(torch.from_numpy(predicted)[None], torch.from_numpy(target)[None])
            intersection, union = (int(count) for count in counts)
            result = {"intersection": intersection, "union": union, "iou": iou(intersection, union)}
            lines.append({**line, **result, "protocol": new_names[line["protocol"]]})
    return results._replace(protocols=protocols, lines=lines)


def stored_mask(line: Line, where: str) -> np.ndarray:
    """Return the predicted mask, bool [H, W]. UserError: there is none, or it is corrupt."""
    if line.get("mask") is None:
        raise UserError(f"{where} has no stored mask. Write the file again with test.py --predictions.")
    try:
        return decode_mask(line["mask"])
    except ValueError as error:
        raise UserError(f"{where}: the stored mask is corrupt ({error}).") from error


def _size(mask: np.ndarray) -> str:
    return f"{mask.shape[1]}×{mask.shape[0]}"


def score(results: Results, scoring: Scoring) -> list[Row]:
    """Return one row per split and protocol, as ``--json`` writes it.

    ``metrics`` and ``interval_95`` are in percent, and None if no expression of the split was selected.
    """
    rows = []
    for split, total in results.splits.items():
        for protocol in results.protocols:
            lines = list(_lines_of(results, split, protocol).values())
            images = [line["image_id"] for line in lines]
            row = {"file": results.path, "split": split, "protocol": protocol, "num_expressions": len(lines)}
            row |= {"of": total, "num_images": len(set(images)), "metrics": None, "interval_95": None}
            if lines:
                row["metrics"] = compute_metrics(counts_of(lines), scoring.thresholds, strict=scoring.strict)
                row["interval_95"] = intervals(images, counts_of(lines), scoring)
            rows.append(row)
    return rows


def compare(a: Results, b: Results, scoring: Scoring, max_changes: int) -> tuple[list[Row], list[Row]]:
    """Compare two models on the expressions that both files have.

    Returns:
        one row per split and pair of protocols, with the metrics and their difference B − A in percent, and one row for
        each of the ``max_changes`` expressions whose IoU (0 to 1) changed most. Both as ``--json`` writes them.

    Raises:
        UserError: the files have no expression in common, or an expression is on different images.
    """
    rows, changes = [], []
    for split in dict.fromkeys([*a.splits, *b.splits]):
        for protocols in protocol_pairs(a, b):
            all_a, all_b = _lines_of(a, split, protocols[0]), _lines_of(b, split, protocols[1])
            common = sorted(all_a.keys() & all_b.keys())
            row = {"split": split, "protocols": list(protocols), "num_expressions": len(common)}
            row |= {"only_in_a": len(all_a) - len(common), "only_in_b": len(all_b) - len(common)}
            rows.append(row)
            if common:
                lines_a, lines_b = [all_a[key] for key in common], [all_b[key] for key in common]
                changes += [_change(*lines) for lines in zip(lines_a, lines_b, strict=True)]
                row |= _difference(lines_a, lines_b, scoring)
    if not changes:
        raise UserError(f"--compare: {a.path} and {b.path} have no expression in common under the same protocol.")
    changes = [change for change in changes if change["difference"]]
    return rows, sorted(changes, key=lambda change: -abs(change["difference"]))[:max_changes]


def protocol_pairs(a: Results, b: Results) -> list[tuple[str, str]]:
    """Return the pairs of protocols to compare: those with the same name, or the only protocol of each file."""
    if len(a.protocols) == len(b.protocols) == 1:
        return [(*a.protocols, *b.protocols)]
    return [(name, name) for name in a.protocols if name in b.protocols]


def _lines_of(results: Results, split: str, protocol: str) -> dict[tuple[int, int], Line]:
    """Return a split's lines under a protocol by (ref_id, sent_id)."""
    return {
        (line["ref_id"], line["sent_id"]): line
        for line in results.lines
        if (line["split"], line["protocol"]) == (split, protocol)
    }


def _difference(lines_a: list[Line], lines_b: list[Line], scoring: Scoring) -> Row:
    """Return the metrics of the same expressions in A and B, and their difference with its interval."""
    counts = counts_of(lines_a), counts_of(lines_b)
    metrics_a, metrics_b = (compute_metrics(pairs, scoring.thresholds, strict=scoring.strict) for pairs in counts)
    bounds = paired_intervals([line["image_id"] for line in lines_a], *counts, scoring)
    return {
        "metrics_a": metrics_a,
        "metrics_b": metrics_b,
        "difference": {name: metrics_b[name] - metrics_a[name] for name in metrics_a},
        "interval_95": bounds,
        "excludes_0": [name for name, (low, high) in bounds.items() if low > 0 or high < 0],
    }


def _change(a: Line, b: Line) -> Row:
    """Return the IoUs of one expression in A and B. UserError: it is on different images."""
    if a["image_id"] != b["image_id"]:
        raise UserError(
            f"--compare: ref_id {a['ref_id']}, sent_id {a['sent_id']} is on image {a['image_id']} in A, but on image "
            f"{b['image_id']} in B. The files were made with different annotations."
        )
    iou_a, iou_b = (iou(line["intersection"], line["union"]) for line in (a, b))
    row = {"iou_a": iou_a, "iou_b": iou_b, "difference": iou_b - iou_a, "protocols": [a["protocol"], b["protocol"]]}
    return row | {key: a[key] for key in ("split", "image_id", "ref_id", "sent_id", "sentence")}


def setting_differences(a: Results, b: Results) -> list[str]:
    """Return a sentence for each setting, other than the model, in which two result files differ."""
    settings_a, settings_b = _comparable_settings(a), _comparable_settings(b)
    for name_a, name_b in protocol_pairs(a, b):
        suffix = f" of {name_a}" if name_a == name_b else ""
        for settings, protocol in ((settings_a, a.protocols[name_a]), (settings_b, b.protocols[name_b])):
            settings.update({f"{key}{suffix}": str(value) for key, value in protocol.items() if key != "name"})
    return [
        f"The files differ in {key}: A {settings_a.get(key)}, B {settings_b.get(key)}."
        for key in {**settings_a, **settings_b}
        if settings_a.get(key) != settings_b.get(key)
    ]


def _comparable_settings(results: Results) -> dict[str, str]:
    settings = {key: str(results.header.get(key)) for key in SHARED_SETTINGS}
    settings["splits"] = ", ".join(f"{name} ({count})" for name, count in results.splits.items())
    settings["protocols"] = ", ".join(results.protocols)
    return settings
