"""lib.compare.sources and python -m lib.compare --from: models that are not trained."""

import json

import numpy as np
import pytest
from commands import run_in_process
from result_files import EXPRESSIONS, with_counts, write_results

import lib.compare.__main__ as tool
from lib.compare.plan import read_comparison
from lib.compare.sources import read_sources, runs_of
from lib.errors import UserError
from refer.masks import encode_mask, resize_mask
from refer.refer import REFER

SIZE = 32  # side of the predicted masks


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """Return a function that runs python -m lib.compare with --out out."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return run_in_process(tool.main, ["compare", *arguments, "--out", tmp_path / "out"], monkeypatch, capsys)

    return run


@pytest.fixture
def comparison(refshapes_root, tmp_path):
    """The YAML file of a comparison that trains no models."""
    (tmp_path / "data.yaml").write_text(f"DATA: {{NAME: refshapes, ROOT: {refshapes_root}}}\nDEVICE: cpu\n")
    path = tmp_path / "comparison.yaml"
    path.write_text("DATA: data.yaml\nSPLITS: [val, testA]\n")
    return path


def write_masks(path, refshapes_root, change=lambda mask, sent_id: mask, size=SIZE):
    """Write the target masks, changed by ``change``, as predictions of another program."""
    refer = REFER(refshapes_root, "refshapes", "unc")
    lines = []
    for ref in refer.loadRefs(refer.getRefIds(split="val") + refer.getRefIds(split="testA")):
        mask = resize_mask(refer.getMask(ref)["mask"], size)
        for sentence in ref["sentences"]:
            changed = encode_mask(change(mask, sentence["sent_id"]))
            lines.append(json.dumps({"sent_id": sentence["sent_id"], "mask": changed}))
    path.write_text("\n".join(lines) + "\n")
    return lines


def test_predicted_masks_of_another_program_join(compare, comparison, refshapes_root, tmp_path):
    write_masks(tmp_path / "perfect.jsonl", refshapes_root)
    write_masks(tmp_path / "half.jsonl", refshapes_root, lambda mask, i: mask if i % 2 else np.zeros_like(mask))
    done = compare(comparison, "--from", tmp_path / "perfect.jsonl", tmp_path / "half.jsonl")
    assert done.status == 0, done.err
    rows = [line.split(",") for line in (tmp_path / "out" / "table.csv").read_text().splitlines()]
    values = {(row[0], row[1]): float(row[3]) for row in rows[1:]}
    assert values["val", "perfect"] == values["testA", "perfect"] == 100
    assert 20 < values["val", "half"] < 80
    lines = (tmp_path / "out" / "results" / "half-seed0.jsonl").read_text().splitlines()
    assert {json.loads(line)["iou"] for line in lines} == {0, 1}


def test_result_files_need_no_comparison_file(compare, tmp_path):
    write_results(tmp_path / "ours-seed1.jsonl", with_counts((90, 100), (50, 100), (0, 10), (60, 80)))
    write_results(tmp_path / "ours-seed0.jsonl", with_counts((80, 100), (50, 100), (0, 10), (60, 80)))
    write_results(tmp_path / "late.jsonl", with_counts((10, 100), (50, 100), (0, 10), (60, 80)))
    write_results(tmp_path / "ours-seed0-shuffled.jsonl", with_counts((1, 100), (2, 100), (0, 10), (60, 80)))
    done = compare("--from", *sorted(tmp_path.glob("*.jsonl")), "--reference", "ours")
    assert done.status == 0, done.err
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| val | late | 20.00 | " in table
    assert "| ours | 45.00 ± 2.36 | " in table
    assert "| 1.00 |" in table  # shuffled
    assert "differences are from ours" in table


def test_checkpoints_are_evaluated_but_not_trained(comparison, tmp_path):
    path = tmp_path / "lavt-seed2.pth"
    path.write_bytes(b"PK\x03\x04weights")
    (run,) = runs_of(read_sources([str(path)], []), read_comparison(str(comparison)), tmp_path)
    assert run.name == "lavt-seed2"
    assert [step.title for step in run.remaining_steps()] == ["evaluation", "evaluation with shuffled sentences"]
    command = run.steps()[0].command
    assert command[command.index("--resume") + 1] == str(path)
    assert command[command.index("--dataset") + 1] == "refshapes"


def test_missing_and_unusable_masks(compare, comparison, refshapes_root, tmp_path):
    path = tmp_path / "masks.jsonl"
    lines = write_masks(path, refshapes_root)
    for content, message in (
        (lines[1:], "masks.jsonl has no mask for 1 of "),
        ([*lines, lines[0]], f"line {len(lines) + 1}: sent_id "),
        ([*lines, '{"sent_id": "5"}'], f"line {len(lines) + 1} must have an integer sent_id and a mask"),
        ([lines[0].replace('"counts": "', '"counts": "~'), *lines[1:]], "the stored mask is corrupt"),
    ):
        path.write_text("\n".join(content) + "\n")
        done = compare(comparison, "--from", path)
        assert (done.status, message in done.err) == (2, True), done.err
    write_masks(path, refshapes_root, lambda mask, _: mask[:, 1:])
    done = compare(comparison, "--from", path)
    assert "has a mask of 31×32 pixels" in done.err


def test_files_of_no_kind_and_equal_names(comparison, tmp_path):
    (tmp_path / "notes.txt").write_text("words\n")
    with pytest.raises(UserError, match=r"notes.txt: neither a checkpoint, nor a result file"):
        read_sources([str(tmp_path / "notes.txt")], [])
    (tmp_path / "other").mkdir()
    paths = [write_results(folder / "a.jsonl", EXPRESSIONS) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(UserError, match=r"other/a.jsonl: its name a is also that of .*a.jsonl. Rename the file"):
        read_sources(list(map(str, paths)), [])
    with pytest.raises(UserError, match="its name a is also that of a model of the comparison"):
        read_sources([str(paths[0])], ["a"])


def test_masks_need_a_comparison_file(compare, refshapes_root, tmp_path):
    write_masks(tmp_path / "masks.jsonl", refshapes_root)
    done = compare("--from", tmp_path / "masks.jsonl")
    assert "masks.jsonl must be evaluated. Also give a YAML file" in done.err
    assert "Give the YAML file of a comparison" in compare().err
