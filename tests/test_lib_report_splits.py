"""Evaluations of splits: results in a file, stopped and gone on with."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import lib.evaluation
from bert.tokenization import read_vocabulary
from data.dataset_refer_bert import ReferDataset
from data.loaders import build_eval_batches
from lib.errors import StoppedError, UserError
from lib.metrics import compute_metrics
from lib.protocols import PAPER, PROTOCOLS
from lib.report.intervals import intervals
from lib.report.results import ResultFile, read_results
from lib.report.splits import judge_splits, summary
from refer.masks import decode_mask
from refer.refer import REFER

BOTH = list(PROTOCOLS.values())


@pytest.fixture(scope="module")
def datasets(refshapes_root):
    tokenizer = read_vocabulary(refshapes_root / "refshapes" / "vocab.txt")
    refer = REFER(refshapes_root, "refshapes")
    return {split: ReferDataset(refer, split, tokenizer, img_size=64) for split in ("testA", "val")}


@pytest.fixture
def judge(small_model, datasets):
    def run(path=None, *, stop_after=None, drawn=None, protocols=BOTH, digest="0", **how):
        rounds = itertools.count()
        header = {"checkpoint_sha256": digest, "dataset": "refshapes", "split_by": "unc"}
        header |= {"splits": {split: len(dataset) for split, dataset in datasets.items()}}
        header |= {"protocols": [protocol.settings() for protocol in protocols]}

        def make_batches(dataset, done):
            made = build_eval_batches(
                dataset, torch.device("cpu"), batch_size=4, workers=0, rank=0, world_size=1, evaluated=done,
                targets=[protocol.truth for protocol in protocols],
                indices=drawn[dataset.split] if how.get("only_drawn") else None,
            )  # fmt: skip
            judged.append(len(made))
            return made

        judged = []
        results = judge_splits(
            small_model(vocab_size=200), datasets, protocols, make_batches=make_batches, batch_size=4,
            drawn=drawn or {}, file=ResultFile(path, header) if path else None,
            stop_requested=lambda: stop_after is not None and next(rounds) >= stop_after, **how,
        )  # fmt: skip
        return dict(results), judged

    return run


def test_a_stopped_evaluation_goes_on_to_the_same_file(judge, datasets, tmp_path):
    drawn = {"val": [0, 9], "testA": [1]}
    wanted, batches = judge(tmp_path / "whole.jsonl", drawn=drawn)
    for stop_after in (0, 2, batches[0] + 1):  # before the first batch, within the first split, within the second
        path = tmp_path / f"{stop_after}.jsonl"
        with pytest.raises(
            StoppedError, match=rf"{stop_after}\.jsonl\.partial has what was done, and the same command"
        ):
            judge(path, stop_after=stop_after, drawn=drawn)
        assert not path.exists()
        header, lines = read_results(f"{path}.partial")
        assert header["complete"] is False
        assert len(lines) < len(BOTH) * sum(map(len, datasets.values()))
        content = Path(f"{path}.partial").read_bytes()  # as if killed within a line
        Path(f"{path}.partial").write_bytes(content[: max(len(content) - 5, content.index(b"\n") + 1)])
        found, left = judge(path, drawn=drawn)
        assert sum(left) <= sum(batches) - stop_after + 1
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        for split, name in itertools.product(datasets, PROTOCOLS):
            assert np.array_equal(found[split][name].counts, wanted[split][name].counts)
            assert found[split][name].metrics == wanted[split][name].metrics
            assert found[split][name].masks == wanted[split][name].masks
        assert sorted(found["val"]["paper"].masks) == drawn["val"]


def test_lines_say_what_was_judged(judge, datasets, tmp_path):
    results, _ = judge(tmp_path / "a.jsonl")
    _, lines = read_results(tmp_path / "a.jsonl")
    assert [(one["split"], one["index"], one["protocol"]) for one in lines] == [
        (split, index, name) for split, data in datasets.items() for index in range(len(data)) for name in PROTOCOLS
    ]
    for one in lines:
        dataset, result = datasets[one["split"]], results[one["split"]][one["protocol"]]
        expression, mask = dataset.expressions[one["index"]], decode_mask(one["mask"])
        assert tuple(one[k] for k in expression._fields) == tuple(expression)
        assert [one["intersection"], one["union"]] == result.counts[one["index"]].tolist()
        assert one["iou"] == result.iou(one["index"])
        if one["protocol"] == "original":
            truth = dataset.full_size_mask(one["index"], "union")
        else:
            truth = dataset[one["index"]]["mask"].numpy()
        assert (int((mask & (truth == 1)).sum()), int((mask | (truth == 1)).sum())) == tuple(
            one[k] for k in ("intersection", "union")
        )


def test_without_a_file_nothing_is_kept(judge):
    with pytest.raises(KeyboardInterrupt):
        judge(stop_after=1)


def test_a_finished_evaluation_is_read_back(judge, tmp_path):
    drawn = {"val": [3]}
    wanted, _ = judge(tmp_path / "a.jsonl", drawn=drawn)
    content = (tmp_path / "a.jsonl").read_bytes()
    found, batches = judge(tmp_path / "a.jsonl", drawn=drawn)
    assert batches == [0, 0]
    assert (tmp_path / "a.jsonl").read_bytes() == content
    for split in wanted:
        assert found[split]["paper"].metrics == wanted[split]["paper"].metrics
    assert found["val"]["paper"].masks == wanted["val"]["paper"].masks


def test_another_checkpoints_results_are_refused(judge, tmp_path):
    with pytest.raises(StoppedError):
        judge(tmp_path / "a.jsonl", stop_after=1)
    with pytest.raises(UserError, match="another checkpoint_sha256"):
        judge(tmp_path / "a.jsonl", digest="1")


def test_only_what_is_drawn(judge):
    drawn = {"val": [2, 11], "testA": [0]}
    results, _ = judge(drawn=drawn, only_drawn=True, protocols=[PAPER])
    everything, _ = judge(protocols=[PAPER])
    for split, indices in drawn.items():
        found = results[split]["paper"]
        assert found.indices.tolist() == indices
        assert sorted(found.masks) == indices
        assert np.abs(found.counts - everything[split]["paper"].counts[indices]).max() <= 2


def test_a_summary_has_metrics_intervals_and_settings(judge, datasets):
    results, _ = judge()
    result, dataset = results["val"]["original"], datasets["val"]
    found = summary(dataset, PROTOCOLS["original"], result, {"dataset": "refshapes", "split_by": "unc", "img_size": 64})
    assert found["metrics"] == compute_metrics(result.counts)
    assert found["interval_95"] == intervals([e.image_id for e in dataset.expressions], result.counts)
    assert found["settings"]["protocol"]["gt_mask"] == "union"
    assert (found["split"], found["protocol"], found["num_expressions"]) == ("val", "original", len(dataset))


def test_what_is_kept_in_memory_does_not_grow(judge, tmp_path, monkeypatch):
    """Results leave for the file at each report: no more than a round's are held."""
    monkeypatch.setattr(lib.evaluation, "SECONDS_BETWEEN_REPORTS", -1)
    sizes, append = [], ResultFile.append

    def noted(file, lines):
        lines = list(lines)
        sizes.append(len(lines))
        append(file, lines)

    monkeypatch.setattr(ResultFile, "append", noted)
    judge(tmp_path / "a.jsonl")
    assert max(sizes) <= len(BOTH) * 12  # an image's expressions
    assert sum(sizes) == len(read_results(tmp_path / "a.jsonl")[1])
