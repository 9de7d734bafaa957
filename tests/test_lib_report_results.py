"""lib.report.results: writing and reading result files; interrupted evaluations, damaged files, other settings."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import contents

import lib.collector
from bert.tokenization import read_vocabulary
from data.dataset_refer_bert import ReferDataset
from lib.collector import ExpressionResult
from lib.errors import MissingFileError, StoppedError, UserError
from lib.evaluation import EvalSetup, evaluate
from lib.protocols import PROTOCOLS
from lib.report.results import ResultFile, read_results
from refer.masks import decode_mask, encode_mask
from refer.refer import REFER
from utils import Distributed

BOTH = [PROTOCOLS["paper"], PROTOCOLS["original"]]
NEW_FIELDS = ("crc32", "file_name", "precision")


@pytest.fixture(scope="module")
def datasets(refshapes_root):
    tokenizer = read_vocabulary(refshapes_root / "refshapes" / "vocab.txt")
    refer = REFER(refshapes_root, "refshapes")
    return {split: ReferDataset(refer, split, tokenizer, img_size=64) for split in ("testA", "val")}


@pytest.fixture(scope="module")
def header(datasets):
    return {
        "checkpoint": "a.pth",
        "checkpoint_sha256": "2222222222",
        "splits": {split: len(dataset) for split, dataset in datasets.items()},
        "protocols": [protocol.settings() for protocol in BOTH],
        "precision": "float32",
    }


@pytest.fixture(scope="module")
def results(datasets):
    """Return (split, result) for every expression and protocol, without masks."""
    return [
        (split, ExpressionResult(index, protocol.name, index % 3, 3, None))
        for split, dataset in datasets.items()
        for index in range(len(dataset))
        for protocol in BOTH
    ]


@pytest.fixture
def write(datasets, header):
    """Return a function that opens a result file and writes results into it."""

    def run(path, results, *, replace=False, **changes):
        with ResultFile(path, {**header, **changes}, replace=replace) as file:
            for split, result in results:
                file.write(datasets[split], [result])
        return file

    return run


def test_a_complete_file_is_sorted(write, header, results, datasets, tmp_path):
    write(tmp_path / "a.jsonl", results)
    order = np.random.default_rng(0).permutation(len(results))
    file = write(tmp_path / "b.jsonl", [results[i] for i in order])
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert file.is_complete()
    assert not file.partial.exists()
    settings, lines = read_results(tmp_path / "a.jsonl")
    assert settings == {"format": "crossvlt results 1", "complete": True, **header}
    assert settings == json.loads((tmp_path / "a.jsonl.settings.json").read_text())
    assert [json.loads(text) for text in (tmp_path / "a.jsonl").read_text().splitlines()] == lines
    for line, (split, result) in zip(lines, results, strict=True):
        expression = datasets[split].expressions[result.index]
        assert (line["dataset"], line["split_by"], line["split"]) == ("refshapes", "unc", split)
        assert {name: line[name] for name in expression._fields} == expression._asdict()
        assert {name: line[name] for name in result._fields} == result._asdict()
        assert line["iou"] == result.intersection / 3


@pytest.mark.parametrize("tail", [b"", b'{"split": "va', b"\xff\xfe"])
def test_continuing_drops_a_truncated_last_line_only(write, results, tmp_path, tail):
    first = write(tmp_path / "a.jsonl", results[:5])
    with open(first.partial, "ab") as file:
        file.write(tail)
    second = write(tmp_path / "a.jsonl", [], checkpoint="elsewhere/a.pth", batch_size=3)
    assert list(second.earlier_results("testA")) == [result for split, result in results[:5] if split == "testA"]
    assert read_results(second.partial)[0]["complete"] is False
    assert not second.is_complete()
    third = write(tmp_path / "a.jsonl", results[5:])
    assert third.is_complete()
    assert [line["index"] for line in read_results(third.path)[1]] == [result.index for _, result in results]


def test_a_partial_file_with_all_results_is_completed(write, results, tmp_path, monkeypatch):
    """The process was killed after the last result and before it wrote the complete file."""
    with monkeypatch.context() as patch:
        patch.setattr("lib.report.results.atomic_write", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(tmp_path / "a.jsonl", results)
    assert write(tmp_path / "a.jsonl", []).is_complete()


def test_a_file_truncated_within_its_header_is_started_again(write, tmp_path):
    (tmp_path / "a.jsonl.partial").write_bytes(b'{"format": "cross')
    assert list(write(tmp_path / "a.jsonl", []).earlier_results("val")) == []


def test_results_of_other_evaluations_are_never_mixed(write, results, tmp_path):
    write(tmp_path / "a.jsonl", results[:2])
    with pytest.raises(UserError) as error:
        write(tmp_path / "a.jsonl", [], checkpoint_sha256="0d95")
    assert str(error.value) == (
        f"{tmp_path}/a.jsonl.partial was written by another checkpoint (22222222…, this one is 0d95…). Choose another "
        "file name or delete it."
    )
    paper_only = [PROTOCOLS["paper"].settings()]
    with pytest.raises(UserError, match=r"with other settings \(protocols: paper, original, now paper\)\. Choose"):
        write(tmp_path / "a.jsonl", [], protocols=paper_only)
    (tmp_path / "a.jsonl.partial").write_text("something else\n")
    with pytest.raises(UserError, match=r"was not written by test\.py --predictions\. Choose another file name\."):
        write(tmp_path / "a.jsonl", [])


def test_a_complete_file_is_kept_unless_it_may_be_replaced(write, results, header, tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, results)
    content = path.read_bytes()
    assert len(list(write(path, []).earlier_results("val"))) == header["splits"]["val"] * len(BOTH)
    assert path.read_bytes() == content
    with pytest.raises(UserError, match=r"a\.jsonl was written by another checkpoint \(2222"):
        write(path, [], checkpoint_sha256="1")
    write(path, results[:1], checkpoint_sha256="1", replace=True)
    assert read_results(path)[0]["checkpoint_sha256"].startswith("2222")  # until the new one is complete
    write(path, results[1:], checkpoint_sha256="1", replace=True)
    assert read_results(path)[0]["checkpoint_sha256"] == "1"
    Path(f"{path}.settings.json").unlink()
    for replace in (False, True):
        with pytest.raises(UserError, match=r"a\.jsonl\.settings\.json is missing\. .* Choose another file name\.$"):
            write(path, [], checkpoint_sha256="1", replace=replace)


def test_inconsistent_files_are_refused_and_left_as_they_are(write, header, results, tmp_path):
    results = [(split, result._replace(mask={"size": [1, 1], "counts": "0"})) for split, result in results]
    finished, partial = tmp_path / "finished" / "a.jsonl", tmp_path / "partial" / "a.jsonl"
    write(finished, results)
    write(partial, results[:-1])
    for path, file in ((finished, finished), (partial, Path(f"{partial}.partial"))):
        lines = file.read_text().splitlines()
        number, last = len(lines), json.loads(lines[-1])
        repeated = json.loads(lines[0] if file == finished else lines[1])
        without_checksum = {name: value for name, value in last.items() if name != "crc32"}
        first = 1 if file == finished else 2
        cases = [(repeated, f"repeats line {first}")]
        for changes in ({"intersection": 1}, {"union": 4}, {"mask": None}, {"split": "testA"}, {"index": 3}):
            cases.append((last | changes, "was edited: its checksum is wrong"))
        for changes in ({"split": "testB"}, {"index": 10_000}, {"index": -1}, {"protocol": "other"}):
            cases.append((without_checksum | changes, "does not belong to this evaluation"))
        for line, message in cases:
            file.write_text("\n".join([*lines[:-1], json.dumps(line)]) + "\n")
            before = contents(tmp_path)
            for replace in (False, True):
                with pytest.raises(UserError, match=rf"a\.jsonl.* is corrupt: line {number} \(split .*\) {message}\."):
                    write(path, [], replace=replace)
            with pytest.raises(UserError, match=f"line {number} "):
                read_results(file)
            assert contents(tmp_path) == before
    finished.write_text("".join(f"{line}\n" for line in lines[1:-1]))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"2 of {len(results)} results are missing, such as split val, index "):
        write(finished, [])
    assert contents(tmp_path) == before


def test_files_of_earlier_versions_are_continued_and_read(write, results, tmp_path):
    """Their lines have no checksum and no file name, and their settings no precision, which was float32."""
    path = tmp_path / "a.jsonl"

    def remove_new_fields(file):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        old = [{name: value for name, value in line.items() if name not in NEW_FIELDS} for line in lines]
        file.write_text("".join(f"{json.dumps(line)}\n" for line in old))

    first = write(path, results[:5])
    remove_new_fields(first.partial)
    assert write(path, results[5:]).is_complete()
    for name in ("crc32", "file_name"):
        assert [name in line for line in read_results(path)[1]].count(False) == 5
    remove_new_fields(path)
    settings = json.loads(first.settings.read_text())
    del settings["precision"]
    first.settings.write_text(json.dumps(settings))
    assert write(path, []).is_complete()
    assert read_results(path)[0]["precision"] == "float32"
    with pytest.raises(UserError, match=r"with other settings \(precision: float32, now TF32\)"):
        write(path, [], precision="TF32")


def test_a_partial_file_without_header_is_never_written(write, datasets, header, results, tmp_path):
    with ResultFile(tmp_path / "a.jsonl", header) as file:
        file.partial.unlink()
        with pytest.raises(UserError, match=r"Cannot write .*a\.jsonl\.partial: No such file"):
            file.write(datasets["testA"], [results[0][1]])
    assert not contents(tmp_path)
    (tmp_path / "a.jsonl.partial").write_text('{"split": "val", "index"')  # not even a whole line
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"a\.jsonl\.partial was not written by test\.py"):
        write(tmp_path / "a.jsonl", results)
    assert contents(tmp_path) == before


def test_a_second_evaluation_of_the_same_file_is_refused(write, header, results, tmp_path):
    with ResultFile(tmp_path / "a.jsonl", header):
        before = contents(tmp_path)
        holder = (
            rf"^Cannot write .*a\.jsonl: another evaluation is writing it \(process {os.getpid()} on .*\)\. Wait until"
        )
        with pytest.raises(UserError, match=holder):
            write(tmp_path / "a.jsonl", results)
        assert contents(tmp_path) == before
    assert write(tmp_path / "a.jsonl", results).is_complete()
    assert sorted(contents(tmp_path)) == ["a.jsonl", "a.jsonl.settings.json"]


def test_damaged_files_are_refused(write, results, tmp_path):
    with pytest.raises(MissingFileError, match=r"Result file .* does not exist"):
        read_results(tmp_path / "none.jsonl")
    path = tmp_path / "a.jsonl"
    file = write(path, results)
    settings = file.settings.read_text()
    for content in (b"", b"[1]\n", b"\xff\n", b'{"format": "other"}\n'):
        file.settings.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl\.settings\.json was not written by test\.py --predictions"):
            read_results(path)
    file.settings.write_text(settings)
    lines = path.read_text().splitlines()
    for change in ({"intersection": 4}, {"union": "2"}, {"index": True}, {"protocol": None}, {"split": 1}):
        damaged = [lines[0], json.dumps({**json.loads(lines[1]), **change}), *lines[2:]]
        path.write_text("\n".join(damaged) + "\n")
        with pytest.raises(UserError, match="is corrupt: line 2 is not a result"):
            read_results(path)


def test_a_full_disk_is_reported(write, results, tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", [])
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"Cannot write .*a\.jsonl\.partial: No space left"):
        write(tmp_path / "a.jsonl", results[:1])


@pytest.fixture
def run_evaluation(small_model, datasets, header):
    """Return a function that evaluates all splits with a result file: results, number of encoded images."""

    def run(path, *, stop_after=None, keep_masks=None):
        rounds, model = itertools.count(), small_model(vocab_size=200)
        num_images, encode_images = [], model.encode_images
        model.encode_images = lambda images: num_images.append(len(images)) or encode_images(images)
        setup = EvalSetup(
            Distributed(0, 0, 1, torch.device("cpu")),
            batch_size=4,
            stop_requested=lambda: stop_after is not None and next(rounds) >= stop_after,
        )
        with ResultFile(path, header) as file:
            found = {
                split: evaluate(model, dataset, BOTH, setup, keep_masks=(keep_masks or {}).get(split, ()), sink=file)
                for split, dataset in datasets.items()
            }
        return found, sum(num_images)

    return run


def test_an_interrupted_evaluation_continues_to_the_same_file(run_evaluation, datasets, tmp_path):
    keep_masks = {"val": [0, 9], "testA": [1]}
    expected, num_images = run_evaluation(tmp_path / "whole.jsonl", keep_masks=keep_masks)
    for stop_after in (0, 2, 4):  # before the first batch, within the first split, within the second
        path = tmp_path / f"{stop_after}.jsonl"
        with pytest.raises(
            StoppedError, match=rf"{stop_after}\.jsonl\.partial holds the results so far\. Run the same"
        ):
            run_evaluation(path, stop_after=stop_after, keep_masks=keep_masks)
        assert not path.exists()
        settings, lines = read_results(f"{path}.partial")
        assert settings["complete"] is False
        assert len(lines) < len(BOTH) * sum(map(len, datasets.values()))
        content = Path(f"{path}.partial").read_bytes()  # as if the process was killed while writing a line
        Path(f"{path}.partial").write_bytes(content[: max(len(content) - 5, content.index(b"\n") + 1)])
        found, num_left = run_evaluation(path, keep_masks=keep_masks)
        assert num_left < num_images if stop_after else num_left == num_images
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        for split, name in itertools.product(datasets, ("paper", "original")):
            assert np.array_equal(found[split][name].counts, expected[split][name].counts)
            assert found[split][name].metrics == expected[split][name].metrics
            assert found[split][name].masks == expected[split][name].masks
        assert sorted(found["val"]["paper"].masks) == keep_masks["val"]
    found, num_left = run_evaluation(path, keep_masks=keep_masks)  # a complete file is only read
    assert num_left == 0
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert found["val"]["paper"].masks == expected["val"]["paper"].masks


def test_counts_are_those_of_the_stored_masks(run_evaluation, datasets, tmp_path):
    found, _ = run_evaluation(tmp_path / "a.jsonl")
    for line in read_results(tmp_path / "a.jsonl")[1]:
        dataset, mask = datasets[line["split"]], decode_mask(line["mask"])
        if line["protocol"] == "original":
            target = dataset.full_size_mask(line["index"], "union") == 1
        else:
            target = dataset[line["index"]]["mask"].numpy() == 1
        counts = [line["intersection"], line["union"]]
        assert [int((mask & target).sum()), int((mask | target).sum())] == counts
        assert found[line["split"]][line["protocol"]].counts[line["index"]].tolist() == counts


def test_memory_does_not_grow_with_the_number_of_masks(run_evaluation, tmp_path, monkeypatch):
    """Results are written at each exchange: never more than one batch is kept in memory."""
    monkeypatch.setattr(lib.collector, "SECONDS_BETWEEN_WRITES", -1)
    sizes, write = [], ResultFile.write

    def count(file, dataset, results):
        sizes.append(len(results))
        write(file, dataset, results)

    monkeypatch.setattr(ResultFile, "write", count)
    run_evaluation(tmp_path / "a.jsonl")
    assert max(sizes) <= len(BOTH) * 12  # expressions of an image
    assert sum(sizes) == len(read_results(tmp_path / "a.jsonl")[1])


@pytest.mark.parametrize("size", [(1, 1), (4, 7), (33, 2)])
def test_masks_survive_encoding(size):
    several = np.random.default_rng(0).random((5, *size)) < 0.5
    for mask in (*several, np.zeros(size, bool), np.ones(size, bool)):
        rle = json.loads(json.dumps(encode_mask(mask)))
        assert np.array_equal(decode_mask(rle), mask)
    with pytest.raises(ValueError, match="RLE"):
        decode_mask({**rle, "counts": "~~~"})
