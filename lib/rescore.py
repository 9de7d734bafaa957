"""Score result files again without the model: parts of them, other thresholds, other true masks, and differences.

    python -m lib.rescore out.jsonl --split val,testA --words 1-3
    python -m lib.rescore out.jsonl --precision_at 0.5,0.75,0.95 --strict --sentences first
    python -m lib.rescore out.jsonl --gt_mask union --refer_data_root refer/data
    python -m lib.rescore --compare baseline.jsonl ours.jsonl --most 10 --json difference.json

Result files are what test.py --predictions writes. Intervals are 95 %, by a bootstrap over images
(lib/report/bootstrap.py).
"""

import functools
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib.cli import Parser, run_command
from lib.config import DEFAULTS
from lib.errors import UserError
from lib.files import check_writable, write_text
from lib.metrics import THRESHOLDS, iou, metric_names, metrics_of
from lib.protocols import EVAL_SIZES
from lib.report.bootstrap import intervals, paired_intervals
from lib.report.rejudge import NEEDS_MODEL, Results, check_names, check_switches, choose, parse_subset, read, rejudge
from lib.report.results import Line, counts_of, settings_path
from refer.masks import MASK_MODES
from refer.refer import REFER
from utils import set_up_logging

LOG = logging.getLogger("crossvlt")
SHARED = ("dataset", "split_by", "img_size", "shuffle_sentences")  # of two headers, where nothing but the model differs
CONDITIONS = ("split", "protocol", "sentences", "sentence", "words", "ids", "gt_mask", "precision_at", "strict")
Row = dict[str, Any]


class Scoring(NamedTuple):
    """How metrics and intervals are computed; see :mod:`lib.report.bootstrap`."""

    thresholds: tuple[float, ...] = THRESHOLDS
    strict: bool = False
    draws: int = 2000
    seed: int = 0


def score(results: Results, scoring: Scoring) -> list[Row]:
    """A row per split and protocol, as --json writes it: metrics in percent, None where the subset leaves nothing."""
    rows = []
    for split, whole in results.splits.items():
        for protocol in results.protocols:
            lines = [line for line in results.lines if (line["split"], line["protocol"]) == (split, protocol)]
            images = [line["image_id"] for line in lines]
            row = {"file": results.path, "split": split, "protocol": protocol, "num_expressions": len(lines)}
            row |= {"of": whole, "num_images": len(set(images)), "metrics": None, "interval_95": None}
            if lines:
                row["metrics"] = _metrics(lines, scoring)
                row["interval_95"] = intervals(images, counts_of(lines), **scoring._asdict())
            rows.append(row)
    return rows


def _metrics(lines: Sequence[Line], scoring: Scoring) -> dict[str, float]:
    return metrics_of(counts_of(lines), scoring.thresholds, strict=scoring.strict)


def protocol_pairs(a: Results, b: Results) -> list[tuple[str, str]]:
    """Which protocol of A is compared with which of B: the only ones, or those of one name."""
    if len(a.protocols) == len(b.protocols) == 1:
        return [(*a.protocols, *b.protocols)]
    return [(name, name) for name in a.protocols if name in b.protocols]


def header_notes(a: Results, b: Results) -> list[str]:
    """A line for everything besides the model in which two files differ."""

    def described(results: Results, pair: int) -> dict[str, str]:
        settings = {key: results.header.get(key) for key in SHARED}
        settings["splits"] = ", ".join(f"{name} ({count})" for name, count in results.splits.items())
        settings["protocols"] = ", ".join(results.protocols)
        for names in protocol_pairs(a, b):
            of = f" of {names[0]}" if names[0] == names[1] else ""
            settings |= {f"{key}{of}": one for key, one in results.protocols[names[pair]].items() if key != "name"}
        return {key: str(value) for key, value in settings.items()}

    in_a, in_b = described(a, 0), described(b, 1)
    return [
        f"not the same {key} in both: A {in_a.get(key)}, B {in_b.get(key)}"
        for key in {**in_a, **in_b}
        if in_a.get(key) != in_b.get(key)
    ]


def compare(a: Results, b: Results, scoring: Scoring, most: int) -> tuple[list[Row], list[Row]]:
    """B's metrics less A's on the expressions that both have, and the ``most`` expressions whose IoU changed most.

    Returns:
        a row per split and pair of protocols, in percent; a row per expression, its IoUs from 0 to 1. As --json
        writes them.

    Raises:
        UserError: nothing is in both, or an expression isn't on the same image in both.
    """
    by_place: list[dict[tuple[str, str], dict[tuple[int, int], Line]]] = [defaultdict(dict), defaultdict(dict)]
    for places, results in zip(by_place, (a, b), strict=True):
        for line in results.lines:
            places[line["split"], line["protocol"]][line["ref_id"], line["sent_id"]] = line
    rows, changes = [], []
    for split in dict.fromkeys([*a.splits, *b.splits]):
        for pair in protocol_pairs(a, b):
            in_a, in_b = (places[split, name] for places, name in zip(by_place, pair, strict=True))
            keys = sorted(in_a.keys() & in_b.keys())
            row = {"split": split, "protocols": list(pair), "num_expressions": len(keys)}
            rows.append(row | {"only_in_a": len(in_a) - len(keys), "only_in_b": len(in_b) - len(keys)})
            if not keys:
                continue
            lines_a, lines_b = [in_a[key] for key in keys], [in_b[key] for key in keys]
            images = [line["image_id"] for line in lines_a]
            changes += [_change(*lines) for lines in zip(lines_a, lines_b, strict=True)]
            found = paired_intervals(images, counts_of(lines_a), counts_of(lines_b), **scoring._asdict())
            rows[-1] |= {
                "metrics_a": _metrics(lines_a, scoring),
                "metrics_b": _metrics(lines_b, scoring),
                "difference": {name: difference for name, (difference, _, _) in found.items()},
                "interval_95": {name: (low, high) for name, (_, low, high) in found.items()},
                "excludes_0": [name for name, (_, low, high) in found.items() if low > 0 or high < 0],
            }
    if not changes:
        raise UserError(f"--compare: {a.path} and {b.path} have no expression in common under one protocol")
    changes = [change for change in changes if change["difference"]]
    return rows, sorted(changes, key=lambda change: -abs(change["difference"]))[:most]


def _change(a: Line, b: Line) -> Row:
    if a["image_id"] != b["image_id"]:
        raise UserError(
            f"--compare: ref_id {a['ref_id']}, sent_id {a['sent_id']} is on image {a['image_id']} in A and on "
            f"{b['image_id']} in B: the files are of different annotations"
        )
    iou_a, iou_b = (iou(line["intersection"], line["union"]) for line in (a, b))
    row = {"iou_a": iou_a, "iou_b": iou_b, "difference": iou_b - iou_a, "protocols": [a["protocol"], b["protocol"]]}
    return row | {key: a[key] for key in ("split", "image_id", "ref_id", "sent_id", "sentence")}


def score_table(rows: list[Row], names: Sequence[str]) -> str:
    """The metrics, with each one's interval below it."""
    cells = [["split", "protocol", *names, "expressions"]]
    for row in rows:
        metrics, between = row["metrics"], row["interval_95"]
        values = [f"{metrics[name]:.2f}" if metrics else "–" for name in names]
        cells.append([row["split"], row["protocol"], *values, f"{row['num_expressions']} of {row['of']}"])
        if metrics:
            cells.append(["", "", *("{:.2f}…{:.2f}".format(*between[name]) for name in names), ""])
    return _aligned(cells)


def difference_table(rows: list[Row], names: Sequence[str]) -> str:
    """A, B and B − A with its interval; a star where that excludes 0."""
    cells = [["split", "", *names, "expressions"]]
    for row in rows:
        found = "difference" in row
        for side in "ab":
            values = [f"{row[f'metrics_{side}'][name]:.2f}" if found else "–" for name in names]
            what = f"{row['num_expressions']} in both" if side == "a" else f"{row['only_in_a']} in A only"
            name = f"{side.upper()} {row['protocols'][side == 'b']}"
            cells.append([row["split"] if side == "a" else "", name, *values, what])
        difference, between = row.get("difference", {}), row.get("interval_95", {})
        values = [_signed(difference[name]) + "*" * (name in row["excludes_0"]) if found else "–" for name in names]
        cells.append(["", "B − A", *values, f"{row['only_in_b']} in B only"])
        if found:
            cells.append(["", "", *("…".join(map(_signed, between[name])) for name in names), ""])
    return _aligned(cells)


def change_table(changes: list[Row]) -> str:
    """The expressions that changed, their IoUs in percent."""
    ids = ("image_id", "ref_id", "sent_id")
    cells = [["split", "protocol", "IoU A", "IoU B", "B − A", *ids, "sentence"]]
    for change in changes:
        where = [change["split"], " → ".join(dict.fromkeys(change["protocols"]))]
        values = [f"{100 * change['iou_a']:.2f}", f"{100 * change['iou_b']:.2f}", _signed(100 * change["difference"])]
        cells.append([*where, *values, *(str(change[key]) for key in ids), " ".join(change["sentence"].split())])
    return _aligned(cells, left=(0, 1, 8))


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _aligned(cells: list[list[str]], left: Collection[int] = (0, 1)) -> str:
    """Columns of even width, those of ``left`` flush left."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[f"{row[i]:{'<' if i in left else '>'}{width}}" for i, width in enumerate(widths)] for row in cells]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def parse_thresholds(text: str) -> tuple[float, ...]:
    """``0.5,0.75`` → (0.5, 0.75). UserError: no IoUs."""
    try:
        thresholds = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        thresholds = ()
    if not thresholds or not all(0 <= threshold <= 1 for threshold in thresholds):
        raise UserError(f"--precision_at {text}: give IoUs from 0 to 1, such as 0.5,0.75")
    return thresholds


def get_parser() -> Parser:
    parser = Parser(prog="python -m lib.rescore", description=__doc__)
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="result file(s)")
    add("--compare", nargs=2, metavar=("A", "B"), help="instead: what B is better than A by, on what both have")
    add("--most", type=int, default=10, metavar="N", help="with --compare: show the N most changed expressions (10)")
    add("--split", metavar="NAMES", help="these splits only, such as val,testA")
    add("--protocol", metavar="NAMES", help="these protocols only, by their names in the files")
    add("--sentence", metavar="REGEX", help="expressions in which this is found, in upper or lower case")
    add("--words", metavar="MIN-MAX", help="expressions of so many words; MIN- has no upper end")
    add("--ids", metavar="TXT", help="expressions whose sent_id is a line of this file")
    add("--sentences", choices=("all", "first"), default="all", help="first: one per object, before any other choice")
    add("--precision_at", metavar="X,X", help="the X of P@X (default: 0.5 to 0.9)")
    add("--strict", action="store_true", help="P@X counts IoU > X, not IoU ≥ X")
    add("--gt_mask", choices=MASK_MODES, help="judge the stored masks against these true masks")
    add(
        "--refer_data_root", default=DEFAULTS.DATA.ROOT, metavar="DIR", help="folder of the REFER layout, for --gt_mask"
    )
    add("--eval_size", choices=EVAL_SIZES, help="must be the file's: other sizes need the model")
    add("--threshold", type=float, help="must be the file's: other thresholds need the model")
    add("--max_tokens", type=int, help="must be the file's: other lengths need the model")
    add("--draws", type=int, default=Scoring().draws, help="of the bootstrap (2000)")
    add("--seed", type=int, default=Scoring().seed, help="of the bootstrap (0)")
    add("--json", metavar="OUT", help="write everything shown as JSON")
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args(sys.argv[1:])
    set_up_logging()
    paths = args.compare or args.files
    if bool(args.compare) == bool(args.files):
        raise UserError("give result files, or two of them with --compare A B; see --help")
    for name, least in (("draws", 1), ("seed", 0), ("most", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")
    subset = parse_subset(
        split=args.split,
        protocol=args.protocol,
        sentences=args.sentences,
        sentence=args.sentence,
        words=args.words,
        ids=args.ids,
    )
    thresholds = parse_thresholds(args.precision_at) if args.precision_at is not None else THRESHOLDS
    scoring = Scoring(thresholds, args.strict, args.draws, args.seed)
    if args.json:
        used = [Path(part).resolve() for path in paths for part in (path, settings_path(path))]
        if Path(args.json).resolve() in used:
            raise UserError(f"--json {args.json} is a result file: it would be lost; name another file")
        check_writable(args.json)

    found = [read(path) for path in paths]
    check_names("--split", subset.splits, {results.path: results.splits for results in found})
    check_names("--protocol", subset.protocols, {results.path: results.protocols for results in found})
    found = [choose(results, subset) for results in found]
    for results in found:
        check_switches(results, {name: getattr(args, name) for name in NEEDS_MODEL})
    if args.gt_mask:
        get_refer = functools.cache(functools.partial(REFER, args.refer_data_root))
        found = [rejudge(results, args.gt_mask, get_refer) for results in found]
    warnings = [results.note for results in found if results.note]
    warnings += header_notes(*found) if args.compare else []
    for warning in warnings:
        LOG.warning(warning)

    names = metric_names(thresholds)
    files = [{"file": one.path, **{key: one.header.get(key) for key in SHARED}} for one in found]
    report: dict[str, Any] = {"flags": vars(args), "files": files, "warnings": warnings}
    given = [(name, getattr(args, name)) for name in CONDITIONS if getattr(args, name) != parser.get_default(name)]
    conditions = "".join(f" --{name}" + f" {value}" * (value is not True) for name, value in given)
    if args.compare:
        report["comparison"], report["most_changed"] = compare(*found, scoring, args.most)
        print("\n".join(f"{side}: {_title(results)}{conditions}" for side, results in zip("AB", found, strict=True)))
        print(f"\n{difference_table(report['comparison'], names)}")
        print(f"\n*: the 95 % interval of the difference excludes 0 ({_how(scoring)})")
        if report["most_changed"]:
            print(f"\n{change_table(report['most_changed'])}")
    else:
        report["results"] = []
        for results in found:
            rows = score(results, scoring)
            report["results"] += rows
            print(f"{_title(results)}{conditions}\n{score_table(rows, names)}\n")
        print(f"below each metric its 95 % interval ({_how(scoring)})")
    if args.json:
        write_text(args.json, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print(args.json)


def _title(results: Results) -> str:
    return f"{results.path}, {results.header.get('dataset')} ({results.header.get('split_by')})"


def _how(scoring: Scoring) -> str:
    return f"{scoring.draws} draws over images, seed {scoring.seed}"


if __name__ == "__main__":
    run_command(main)
