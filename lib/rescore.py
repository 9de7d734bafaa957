"""Recompute metrics from result files, without running the model.

    python -m lib.rescore out.jsonl --split val,testA --words 1-3                         # some of the expressions
    python -m lib.rescore out.jsonl --precision_at 0.5,0.75,0.95 --strict --sentences first
    python -m lib.rescore out.jsonl --gt_mask union --refer_data_root refer/data          # other target masks
    python -m lib.rescore --compare baseline.jsonl ours.jsonl --most 10 --json difference.json

test.py --predictions writes result files. Every metric is printed with its 95 % interval (bootstrap over images).
"""

import functools
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.files import Kind, check_writable, write_text
from lib.protocols import SWITCHES
from lib.tables import to_text
from lib.variants import MASK_MODES

LOG = logging.getLogger("crossvlt")
CONDITIONS = ("split", "protocol", "sentences", "sentence", "words", "ids", "gt_mask", "precision_at", "strict")
Row = dict[str, Any]


def get_parser() -> Parser:
    from refer.datasets import ROOT

    parser = Parser(prog="python -m lib.rescore", description=__doc__)
    add = parser.add_argument
    parser.add_input("files", must_exist=True, nargs="*", metavar="FILE", help="result files")
    compare_help = "compare two result files on the expressions that both have"
    parser.add_input("--compare", must_exist=True, nargs=2, metavar=("A", "B"), help=compare_help)
    add("--most", type=int, default=10, metavar="N", help="with --compare: print the N most changed expressions (10)")
    add("--split", metavar="NAMES", help="only these splits, such as val,testA")
    add("--protocol", metavar="NAMES", help="only these protocols, by their names in the files")
    add("--sentence", metavar="REGEX", help="only expressions that match this regular expression, ignoring case")
    add("--words", metavar="MIN-MAX", help="only expressions with this number of words; MIN- has no upper limit")
    ids_help = "only expressions whose sent_id is a line of this file"
    parser.add_input("--ids", must_exist=True, metavar="TXT", help=ids_help)
    add(
        "--sentences",
        choices=("all", "first"),
        default="all",
        help="first: only the first expression of each object; applied before --sentence, --words and --ids",
    )
    add("--precision_at", metavar="X,X", help="IoU thresholds X of P@X (0.5,0.6,0.7,0.8,0.9)")
    add("--strict", action="store_true", help="count IoU > X for P@X, instead of IoU ≥ X")
    add("--gt_mask", choices=MASK_MODES, help="compare the stored masks with target masks of this kind")
    parser.add_input(
        "--refer_data_root", default=str(ROOT), metavar="DIR", help="dataset folder, for --gt_mask (%(default)s)"
    )
    for name, switch in SWITCHES.items():
        if switch.needs_model:
            add(f"--{name}", help="must equal the value in the file", **switch.flag_options())
    add("--draws", type=int, default=2000, help="number of bootstrap draws (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the bootstrap (%(default)s)")
    parser.add_output("--json", kind=Kind.JSON_OBJECT, metavar="OUT", help="also write the printed results as JSON")
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args(sys.argv[1:])
    if bool(args.compare) == bool(args.files):
        raise UserError("Pass result files, or two of them with --compare A B. See --help.")
    for name, minimum in (("draws", 1), ("seed", 0), ("most", 0)):
        if getattr(args, name) < minimum:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {minimum}.")
    conditions = _parse_filters(args)
    thresholds = None if args.precision_at is None else _parse_thresholds(args.precision_at)

    from lib.metrics import THRESHOLDS, metric_names
    from lib.report import analysis
    from lib.report.intervals import Scoring
    from refer.refer import REFER
    from utils import set_up_logging

    set_up_logging()
    filters, thresholds = analysis.Filters(**conditions), thresholds or THRESHOLDS
    scoring = Scoring(thresholds, args.strict, args.draws, args.seed)
    files = [analysis.load_results(path) for path in args.compare or args.files]
    analysis.check_names("--split", filters.splits, {results.path: results.splits for results in files})
    analysis.check_names("--protocol", filters.protocols, {results.path: results.protocols for results in files})
    files = [analysis.select(results, filters) for results in files]
    for results in files:
        analysis.check_model_settings(results, {name: getattr(args, name) for name in analysis.MODEL_SETTINGS})
    if args.gt_mask:
        get_refer = functools.cache(functools.partial(REFER, args.refer_data_root))
        files = [analysis.evaluate_masks(results, args.gt_mask, get_refer) for results in files]
    if args.json:
        check_writable(args.json, Kind.JSON_OBJECT)
    warnings = [results.warning for results in files if results.warning]
    if args.compare:
        warnings += analysis.setting_differences(*files)
    for warning in warnings:
        LOG.warning(warning)

    report: dict[str, Any] = {
        "flags": vars(args),
        "files": [
            {"file": results.path, **{key: results.header.get(key) for key in analysis.SHARED_SETTINGS}}
            for results in files
        ],
        "warnings": warnings,
    }
    given = {name: getattr(args, name) for name in CONDITIONS if getattr(args, name) != parser.get_default(name)}
    suffix = "".join(f" --{name}" if value is True else f" --{name} {value}" for name, value in given.items())
    titles = [f"{_title(results)}{suffix}" for results in files]
    names, bootstrap = metric_names(thresholds), f"{args.draws} draws over images, seed {args.seed}"
    if args.compare:
        report["comparison"], report["most_changed"] = analysis.compare(*files, scoring, args.most)
        print(f"A: {titles[0]}\nB: {titles[1]}\n\n{difference_table(report['comparison'], names)}\n")
        print(f"* The 95 % interval of the difference excludes 0 ({bootstrap}).")
        if report["most_changed"]:
            print(f"\n{change_table(report['most_changed'])}")
    else:
        report["results"] = []
        for title, results in zip(titles, files, strict=True):
            rows = analysis.score(results, scoring)
            report["results"] += rows
            print(f"{title}\n{score_table(rows, names)}\n")
        print(f"Below each metric: its 95 % interval ({bootstrap}).")
    if args.json:
        write_text(args.json, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print(args.json)


def _title(results: Any) -> str:
    """Return path, dataset and precision of a result file, as far as they are known."""
    header = results.header
    dataset = f"{header['dataset']} ({header.get('split_by')})" if header.get("dataset") else None
    return ", ".join(filter(None, (results.path, dataset, header.get("precision"))))


def score_table(rows: list[Row], names: Sequence[str]) -> str:
    """Return the table of metrics and intervals of each split and protocol (rows of lib.report.analysis.score)."""
    table = [["split", "protocol", *names, "expressions"]]
    for row in rows:
        metrics, bounds = row["metrics"], row["interval_95"]
        values = [f"{metrics[name]:.2f}" if metrics else "–" for name in names]
        table.append([row["split"], row["protocol"], *values, f"{row['num_expressions']} of {row['of']}"])
        if metrics:
            table.append(["", "", *("{:.2f}…{:.2f}".format(*bounds[name]) for name in names), ""])
    return to_text(table, left=(0, 1))


def difference_table(rows: list[Row], names: Sequence[str]) -> str:
    """Return the table of A, B, and B − A with its interval (rows of lib.report.analysis.compare)."""
    table = [["split", "", *names, "expressions"]]
    for row in rows:
        a, b, difference = (row.get(key) for key in ("metrics_a", "metrics_b", "difference"))
        a_values, b_values = ([f"{values[name]:.2f}" if values else "–" for name in names] for values in (a, b))
        differences = [
            f"{_signed(difference[name])}{'*' if name in row['excludes_0'] else ''}" if difference else "–"
            for name in names
        ]
        protocol_a, protocol_b = row["protocols"]
        table.append([row["split"], f"A {protocol_a}", *a_values, f"{row['num_expressions']} in both"])
        table.append(["", f"B {protocol_b}", *b_values, f"{row['only_in_a']} in A only"])
        table.append(["", "B − A", *differences, f"{row['only_in_b']} in B only"])
        if difference:
            table.append(["", "", *("…".join(map(_signed, row["interval_95"][name])) for name in names), ""])
    return to_text(table, left=(0, 1))


def change_table(changes: list[Row]) -> str:
    """Return the table of the most changed expressions, with IoUs in percent."""
    ids = ("image_id", "ref_id", "sent_id")
    table = [["split", "protocol", "IoU A", "IoU B", "B − A", *ids, "sentence"]]
    for change in changes:
        protocol = " → ".join(dict.fromkeys(change["protocols"]))
        ious = [f"{100 * change['iou_a']:.2f}", f"{100 * change['iou_b']:.2f}", _signed(100 * change["difference"])]
        sentence = " ".join(change["sentence"].split())
        table.append([change["split"], protocol, *ious, *(str(change[key]) for key in ids), sentence])
    return to_text(table, left=(0, 1, 8))


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _parse_filters(args: Any) -> dict[str, Any]:
    """Return the fields of lib.report.analysis.Filters. UserError: a flag has an invalid value."""
    return {
        "splits": _parse_names("--split", args.split),
        "protocols": _parse_names("--protocol", args.protocol),
        "first_sentences": args.sentences == "first",
        "sentence": None if args.sentence is None else _parse_regex(args.sentence),
        "words": None if args.words is None else _parse_words(args.words),
        "sent_ids": None if args.ids is None else _read_ids(args.ids),
    }


def _parse_names(flag: str, text: str | None) -> tuple[str, ...]:
    """Split ``val,testA`` into (val, testA). Return () if the flag was not given."""
    names = tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))
    if text is not None and not names:
        raise UserError(f"{flag} {text!r} contains no name.")
    return names


def _parse_regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise UserError(f"--sentence {text}: not a regular expression ({error}).") from error


def _parse_words(text: str) -> tuple[float, float]:
    """Parse ``2-4`` into (2, 4) and ``5-`` into (5, infinity)."""
    match = re.fullmatch(r"(\d+)-(\d*)", text, re.ASCII)
    if match is None or (match[2] and int(match[1]) > int(match[2])):
        raise UserError(f"--words {text}: not a range. Give MIN-MAX, such as 1-3, or MIN- for no upper limit.")
    return float(match[1]), float(match[2] or "inf")


def _parse_thresholds(text: str) -> tuple[float, ...]:
    try:
        thresholds = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        thresholds = ()
    if not thresholds or not all(0 <= threshold <= 1 for threshold in thresholds):
        raise UserError(f"--precision_at {text}: not a list of IoUs from 0 to 1, such as 0.5,0.75.")
    return thresholds


def _read_ids(path: str) -> frozenset[int]:
    """Read the sent_ids of a text file with one id per line; empty lines are allowed."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--ids {path}: cannot read the file: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.strip().isdecimal():
            raise UserError(f"--ids {path}: line {number} is not a sent_id: {line.strip()[:40]!r}.")
    return frozenset(int(line) for line in lines if line.strip())


if __name__ == "__main__":
    run_command(main)
