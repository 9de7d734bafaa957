"""Parts of result files, and their stored masks judged anew: what lib/rescore.py scores."""

import re
from collections.abc import Callable, Collection
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lib.errors import MissingFileError, UserError
from lib.metrics import intersection_and_union, iou
from lib.protocols import PROTOCOLS
from lib.report.results import Line, read_results
from refer.masks import decode_mask, resize_mask
from refer.refer import REFER

# Why the stored masks don't allow another value of a switch, and the flags of test.py that do.
NEEDS_MODEL = {
    "threshold": ("a binary mask has no probabilities left", "--threshold {}"),
    "eval_size": ("a binary mask can't become the logits at another size", "--eval_size {}"),
    "max_tokens": ("sentences cut elsewhere give other logits", "--max_tokens {}"),
}


class Results(NamedTuple):
    """A result file, or the chosen part of it."""

    path: str
    header: dict[str, Any]
    splits: dict[str, int]  # how many expressions each has, whatever part was chosen
    protocols: dict[str, dict[str, Any]]  # settings by name
    lines: list[Line]
    note: str = ""  # that the file is partial


class Subset(NamedTuple):
    """Which expressions are scored; what is empty lets everything pass."""

    splits: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()
    first_sentences: bool = False  # of each object, before the filters below
    sentence: re.Pattern[str] | None = None
    words: tuple[float, float] | None = None  # the fewest and the most
    sent_ids: frozenset[int] | None = None

    def has(self, line: Line) -> bool:
        """Whether an expression passes the filters by itself."""
        return (
            (self.sentence is None or self.sentence.search(line["sentence"]) is not None)
            and (self.words is None or self.words[0] <= len(line["sentence"].split()) <= self.words[1])
            and (self.sent_ids is None or line["sent_id"] in self.sent_ids)
        )


def parse_subset(
    *,
    split: str | None = None,
    protocol: str | None = None,
    sentences: str = "all",
    sentence: str | None = None,
    words: str | None = None,
    ids: str | None = None,
) -> Subset:
    """The subset that the flags of these names mean; None: not given.

    Raises:
        MissingFileError, UserError: a flag's value isn't what it takes.
    """
    return Subset(
        splits=_names("--split", split),
        protocols=_names("--protocol", protocol),
        first_sentences=sentences == "first",
        sentence=None if sentence is None else _regex(sentence),
        words=None if words is None else _words(words),
        sent_ids=None if ids is None else _read_ids(ids),
    )


def _names(flag: str, text: str | None) -> tuple[str, ...]:
    """``val,testA`` → (val, testA); nothing where the flag wasn't given. UserError: it names nothing."""
    names = tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))
    if text is not None and not names:
        raise UserError(f"{flag} {text!r} names nothing")
    return names


def _regex(text: str) -> re.Pattern[str]:
    """A pattern that doesn't mind upper and lower case. UserError: it is none."""
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise UserError(f"--sentence {text}: not a regular expression ({error})") from error


def _words(text: str) -> tuple[float, float]:
    """``2-4`` → (2, 4); ``5-`` has no upper end. UserError: anything else."""
    found = re.fullmatch(r"(\d+)-(\d*)", text, re.ASCII)
    least, most = (float(found[1]), float(found[2] or "inf")) if found else (1.0, 0.0)
    if least > most:
        raise UserError(f"--words {text}: give MIN-MAX with MIN at most MAX, such as 1-3, or MIN- for no upper end")
    return least, most


def _read_ids(path: str) -> frozenset[int]:
    """The sent_ids of a text file, one per line.

    Raises:
        MissingFileError, UserError: no such file; a line that isn't a number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise MissingFileError(f"--ids {path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--ids {path} can't be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.strip().isdecimal():
            raise UserError(f"--ids {path}: line {number} is not a sent_id: {line.strip()[:40]!r}")
    return frozenset(int(line) for line in lines if line.strip())


def read(path: str) -> Results:
    """A result file, complete or not.

    Raises:
        MissingFileError, UserError: no such file; not a result file; damaged.
    """
    header, lines = read_results(path)
    try:
        splits = {name: int(count) for name, count in header["splits"].items()}
        protocols = {str(settings["name"]): dict(settings) for settings in header["protocols"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: its settings don't say which splits and protocols it holds") from error
    seen = set()
    for line in lines:
        place = (line["split"], line["protocol"], line["ref_id"], line["sent_id"])
        if place in seen or line["split"] not in splits or line["protocol"] not in protocols:
            wrong = "is there twice" if place in seen else "is of a split or protocol that its settings don't name"
            raise UserError(
                f"{path} is damaged: sent_id {line['sent_id']} of {line['split']}, {line['protocol']} {wrong}"
            )
        seen.add(place)
    there, whole = len({(split, *ids) for split, _, *ids in seen}), sum(splits.values())
    is_whole = header.get("complete") is True and len(lines) >= whole * len(protocols)
    note = "" if is_whole else f"{path} is partial: {there} of {whole} expressions are there"
    return Results(path, header, splits, protocols, lines, note)


def check_names(flag: str, asked: Collection[str], present: dict[str, Collection[str]]) -> None:
    """UserError, with the names that there are, where a name is in no file, or a file has none of them.

    Args:
        flag: that asks for the names; with none of them every file is as it should be.
        present: the names in each file, by its path.
    """
    everywhere = {name for names in present.values() for name in names}
    for path, names in present.items():
        wrong = [name for name in asked if name not in everywhere] or ([] if set(asked) & set(names) else asked)
        if wrong:
            raise UserError(f"{flag} {','.join(wrong)}: {path} has {', '.join(names)}")


def choose(results: Results, subset: Subset) -> Results:
    """The part of a result file that is in ``subset``. UserError: nothing is."""
    splits = {name: count for name, count in results.splits.items() if not subset.splits or name in subset.splits}
    protocols = {
        name: one for name, one in results.protocols.items() if not subset.protocols or name in subset.protocols
    }
    lines = [line for line in results.lines if line["split"] in splits and line["protocol"] in protocols]
    if subset.first_sentences:
        first: dict[tuple[str, str, int], Line] = {}
        for line in sorted(lines, key=lambda line: line["index"]):  # a partial file is in another order
            first.setdefault((line["split"], line["protocol"], line["ref_id"]), line)
        lines = list(first.values())
    lines = [line for line in lines if subset.has(line)]
    if not lines:
        raise UserError(f"{results.path}: the subset leaves none of its {sum(splits.values())} expressions: widen it")
    return results._replace(splits=splits, protocols=protocols, lines=lines)


def check_switches(results: Results, switches: dict[str, Any]) -> None:
    """UserError where a switch (see ``NEEDS_MODEL``) is neither None nor what the masks were made with."""
    for switch, value in switches.items():
        others = [name for name, settings in results.protocols.items() if settings.get(switch) != value]
        if value is None or not others:
            continue
        reason, flag = NEEDS_MODEL[switch]
        remedy = f"run test.py {flag.format(value)}"
        if len(others) < len(results.protocols):
            remedy = f"choose --protocol {next(name for name in results.protocols if name not in others)}"
        raise UserError(
            f"--{switch} {value}: {results.path} has the masks of {others[0]}, made with {switch} "
            f"{results.protocols[others[0]].get(switch)}, and {reason}: {remedy}"
        )


def rejudge(results: Results, gt_mask: str, get_refer: Callable[[str, str], REFER]) -> Results:
    """Intersections and unions anew: the stored masks against the true masks of ``gt_mask``.

    Each object is rasterised once, at the picture's size; where masks are stored resized, the truth is resized too.

    Args:
        results: whose protocols of another gt_mask are judged anew, and named by it.
        gt_mask: one of :data:`refer.masks.MASK_MODES`.
        get_refer: the annotations of (dataset, splitBy); called only if they are needed.

    Raises:
        UserError: an expression has no stored mask; the annotations aren't those the file was made with.
    """
    renamed = {
        name: _name_with(name, gt_mask) for name, one in results.protocols.items() if one.get("gt_mask") != gt_mask
    }
    if not renamed:
        return results
    lines = [line for line in results.lines if line["protocol"] not in renamed]
    others = sorted((line for line in results.lines if line["protocol"] in renamed), key=lambda line: line["ref_id"])
    refer = get_refer(str(results.header.get("dataset")), str(results.header.get("split_by")))
    for ref_id, group in groupby(others, key=lambda line: line["ref_id"]):
        truth = refer.getMask(ref_id, mode=gt_mask)["mask"]
        resized: dict[int, np.ndarray] = {}  # by the side
        for line in group:
            where = f"--gt_mask {gt_mask}: {results.path}: sent_id {line['sent_id']}"
            predicted = _decoded(line, where)
            H, W = predicted.shape
            fitting = truth
            if results.protocols[line["protocol"]].get("eval_size") == "resized":
                resized[H] = fitting = resized[H] if H in resized else resize_mask(truth, H)
            image_id = refer.Refs[ref_id]["image_id"]
            if fitting.shape != (H, W) or image_id != line["image_id"]:
                raise UserError(
                    f"{where} has a mask of {W}×{H} on image {line['image_id']}, but {refer.refs_path} means image "
                    f"{image_id} at {fitting.shape[1]}×{fitting.shape[0]}: give the annotations the file was made with"
                )
            counts = intersection_and_union(*(torch.from_numpy(mask)[None] for mask in (predicted, fitting)))
            intersection, union = (int(count) for count in counts)
            new = {"intersection": intersection, "union": union, "iou": iou(intersection, union)}
            lines.append({**line, **new, "protocol": renamed[line["protocol"]]})
    protocols = {
        renamed.get(name, name): {**settings, "name": renamed.get(name, name), "gt_mask": gt_mask}
        for name, settings in results.protocols.items()
    }
    return results._replace(protocols=protocols, lines=lines)


def _name_with(protocol: str, gt_mask: str) -> str:
    """What test.py --gt_mask would call it; see :func:`lib.protocols.choose_protocols`."""
    base, *switches = protocol.split("+")
    switches = [switch for switch in switches if not switch.startswith("gt_mask=")]
    if base not in PROTOCOLS or PROTOCOLS[base].gt_mask != gt_mask:
        switches.insert(0, f"gt_mask={gt_mask}")
    return "+".join([base, *switches])


def _decoded(line: Line, where: str) -> np.ndarray:
    """A line's predicted mask: bool [H, W]. UserError: it has none, or a damaged one."""
    if line.get("mask") is None:
        raise UserError(f"{where} has no stored mask: write the file anew with test.py --predictions")
    try:
        return decode_mask(line["mask"])
    except ValueError as error:
        raise UserError(f"{where}: its mask is damaged ({error})") from error
