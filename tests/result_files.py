"""Result files for the tests of lib.rescore, and the command itself."""

import json
import sys

import pytest

import utils
from lib import rescore
from lib.metrics import iou
from lib.protocols import choose_protocols
from lib.report.results import PARTIAL, settings_path

IMG_SIZE = 16
# split, ref_id, image_id, sent_id, sentence, intersection, union
EXPRESSIONS = [
    ("val", 1, 11, 101, "Left dog", 90, 100),
    ("val", 1, 11, 102, "the dog on the left", 50, 100),
    ("val", 2, 12, 103, "cat", 0, 0),
    ("testA", 3, 11, 104, "a DOG", 60, 80),
]
SETTINGS = {"dataset": "refcoco", "split_by": "unc", "img_size": IMG_SIZE, "shuffle_sentences": False}
SETTINGS |= {"precision": "float32"}


@pytest.fixture
def run_rescore(monkeypatch, capsys, tmp_path):
    """Return a function that runs python -m lib.rescore and returns its stdout, its stderr and its JSON report."""
    monkeypatch.setattr(utils.LOGGER, "handlers", [])
    monkeypatch.setattr(utils.LOGGER, "propagate", True)

    def run(*arguments):
        out = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", ["rescore", *map(str, arguments), "--json", str(out), "--draws", "50"])
        rescore.main()
        printed = capsys.readouterr()
        return printed.out, printed.err, json.loads(out.read_text())

    return run


def write_results(
    path, expressions=EXPRESSIONS, protocols="paper", *, splits=None, complete=True, masks=None, **switches
):
    """Write a result file and return its path.

    Args:
        expressions: as in ``EXPRESSIONS``.
        protocols, switches: arguments of choose_protocols.
        splits: expressions per split according to the settings; the actual numbers if None.
        complete: whether the evaluation was finished; otherwise the partial file is returned.
        masks: RLE by sent_id and name of the protocol.
    """
    chosen = choose_protocols(protocols, **switches)
    names = [expression[0] for expression in expressions]
    header = SETTINGS | {"splits": splits or {name: names.count(name) for name in names}}
    header["protocols"] = [protocol.settings() for protocol in chosen]
    header = {"format": "crossvlt results 1", "complete": complete, **header}
    lines = []
    for number, (split, ref_id, image_id, sent_id, sentence, intersection, union) in enumerate(expressions):
        index = names[:number].count(split)
        for protocol in chosen:
            line = {"split": split, "index": index, "image_id": image_id, "ref_id": ref_id, "ann_id": 10 * ref_id}
            line |= {"sent_id": sent_id, "sentence": sentence, "protocol": protocol.name}
            line |= {"intersection": intersection, "union": union, "iou": iou(intersection, union)}
            lines.append(line | ({"mask": masks[sent_id, protocol.name]} if masks else {}))
    if complete:
        settings_path(path).write_text(json.dumps(header))
    else:
        path = path.with_name(f"{path.name}{PARTIAL}")
        lines.insert(0, header)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def with_counts(*counts, expressions=EXPRESSIONS):
    """Return the expressions with other intersections and unions."""
    return [(*row[:5], *pair) for row, pair in zip(expressions, counts, strict=True)]


def scores(report):
    """{(split, protocol): (number of expressions, mIoU)} of the JSON report."""
    return {
        (row["split"], row["protocol"]): (row["num_expressions"], round(row["metrics"]["mIoU"], 6))
        for row in report["results"]
        if row["metrics"]
    }
