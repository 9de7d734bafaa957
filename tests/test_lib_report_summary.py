"""lib.report.summary: tables for the terminal and the objects of --json."""

import json

import numpy as np
import pytest

from bert.tokenization import read_vocabulary
from data.dataset_refer_bert import ReferDataset
from lib.baselines import baseline_metrics
from lib.collector import EvaluationResult
from lib.metrics import METRIC_NAMES, compute_metrics
from lib.protocols import PROTOCOLS
from lib.report.intervals import intervals
from lib.report.summary import Summary, metrics_table
from refer.refer import REFER

BOTH = [PROTOCOLS["paper"], PROTOCOLS["original"]]
SETTINGS = {
    "dataset": "refshapes", "split_by": "unc", "checkpoint": "a.pth", "img_size": 64, "shuffle_sentences": False,
    "precision": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(refshapes_root):
    tokenizer = read_vocabulary(refshapes_root / "refshapes" / "vocab.txt")
    return ReferDataset(REFER(refshapes_root, "refshapes"), "val", tokenizer, img_size=64)


@pytest.fixture(scope="module")
def results(dataset):
    indices = np.arange(len(dataset))
    counts = np.stack([indices, np.full_like(indices, len(dataset))], axis=1)
    result = EvaluationResult(indices, counts, compute_metrics(counts), {})
    return {protocol.name: result for protocol in BOTH}


def test_json_has_metrics_intervals_and_settings(dataset, results, tmp_path):
    summary = Summary(BOTH, SETTINGS)
    summary.add(dataset, results)
    summary.write_json(tmp_path / "a.json")
    paper, original = json.loads((tmp_path / "a.json").read_text())
    assert (paper["protocol"], original["protocol"]) == ("paper", "original")
    assert original["metrics"] == results["original"].metrics
    expected = intervals([e.image_id for e in dataset.expressions], results["original"].counts)
    assert original["interval_95"] == {name: list(interval) for name, interval in expected.items()}
    assert original["settings"] == {**SETTINGS, "protocol": PROTOCOLS["original"].settings()}
    assert (original["split"], original["num_expressions"]) == ("val", len(dataset))
    assert "baselines" not in original


def test_baselines_follow_their_split(dataset, results):
    summary = Summary(BOTH[:1], {**SETTINGS, "shuffle_sentences": True}, with_baselines=True)
    summary.add(dataset, results)
    expected = baseline_metrics(dataset, BOTH[0])
    assert summary.entries[0]["baselines"] == expected
    blank, title, _, split, foreground, best = summary.text().splitlines()
    assert not blank
    assert title == "refshapes (unc), a.pth, 64 px, float32, paper protocol, sentences shuffled within each split"
    assert split.split()[-2:] == [f"{results['paper'].metrics['oIoU']:.2f}", str(len(dataset))]
    assert foreground.split()[-2] == f"{expected['all foreground']['oIoU']:.2f}"
    assert best.startswith("  best object ")


def test_a_table_has_a_column_per_metric():
    metrics = dict(zip(METRIC_NAMES, range(7), strict=True))
    header, first, second = metrics_table([("val", metrics, 5), ("a longer name", metrics, 123456)]).splitlines()
    assert header.split() == ["split", *METRIC_NAMES, "expressions"]
    assert first.split() == ["val", *(f"{i}.00" for i in range(7)), "5"]
    assert len(header) == len(first) == len(second)
