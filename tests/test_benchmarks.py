"""The benchmarks of annotations, of a training step and of evaluation, on sizes that take seconds."""

import sys

import pytest

from benchmarks import evaluation, train_step
from benchmarks.annotations.__main__ import main as annotations_main
from benchmarks.annotations.generate import Size, generate_dataset
from lib.errors import UserError
from refer.refer import REFER
from utils import init_distributed


def run(monkeypatch, *flags):
    """Run benchmarks.train_step in this process, including the measurements that it runs in other processes."""

    def in_this_process(job):
        return train_step.measure(job)._asdict() if job.mode else train_step.describe_machine(job)

    monkeypatch.setattr(train_step, "run_in_process", in_this_process)
    monkeypatch.setattr(sys, "argv", ["train_step", *map(str, flags)])
    train_step.main()


def test_train_step_reports_precisions_and_checkpointing(tmp_path, monkeypatch, capsys):
    out, small = tmp_path / "step.md", {**evaluation.SMALL_MODEL, "depths": (2, 2, 2, 2), "vocab_size": 30522}
    monkeypatch.setattr(train_step, "build_crossvlt", lambda swin_type: evaluation.build_crossvlt(swin_type, **small))
    run(
        monkeypatch, "--swin_type", "tiny", "--img_size", 64, "--batch_sizes", 1, "--steps", 1, "--device", "cpu",
        "--out", out,
    )  # fmt: skip
    written = out.read_text(encoding="utf-8")
    assert written == capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines() if line[:1] == "|"]
    head, _, *rows = cells
    # TF32 and compiled blocks are measured on GPUs only.
    assert [row[:3] for row in rows] == [["1", mode, used] for mode in ("float32", "bf16") for used in ("no", "yes")]
    kept = [float(row[head.index("kept for backward")].split()[0]) for row in rows]
    for without, checkpointed in (kept[:2], kept[2:]):
        assert 0 < checkpointed < 0.5 * without
    assert written.splitlines()[-1].startswith("Gradient checkpointing changes a step by: peak memory ")


def test_train_step_rejects_invalid_sizes(monkeypatch):
    with pytest.raises(UserError, match="--batch_sizes and --steps must be at least 1"):
        run(monkeypatch, "--batch_sizes", 1, 0)


def test_evaluation_reports_the_speed_by_batch_size(tmp_path):
    evaluation.write_set(tmp_path, evaluation.Size(1, 2, 5))
    model = evaluation.build_crossvlt("tiny", **evaluation.SMALL_MODEL).eval()
    lines = evaluation.measure_sharing(model, evaluation.open_set(tmp_path, 64), init_distributed("cpu"), [1, 4], 1)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:6]]
    assert [row[:2] for row in rows] == [
        ["1", "per sentence, and loaded"], ["1", "once"], ["4", "per sentence"], ["4", "once"]
    ]  # fmt: skip
    for row in rows:
        assert float(row[2]) > 0
        assert (row[4] == "") == (row[1] != "once")
    assert "is computed once per image" in lines[-1]


def test_evaluation_reports_memory_and_time_after_each_tenth_of_a_split(tmp_path, monkeypatch, capsys):
    def report(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluation", "--scale", *map(str, flags), "--device", "cpu"])
        evaluation.main()
        return capsys.readouterr().out

    out = report("--images", 12, "--out", tmp_path / "out.md")
    assert (tmp_path / "out.md").read_text(encoding="utf-8") == out
    counts = [int(line.split()[1]) for line in out.splitlines() if line.startswith("| ") and "MiB" in line]
    assert counts == sorted(counts)
    assert (len(counts), counts[-1]) == (10, round(10834 * 12 / 1500))
    with pytest.raises(UserError, match="must be at least 1"):
        report("--images", 0)


def test_annotations_reports_loading_times_and_memory(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["annotations", "--share", "0.005", "--workers", "2", "--repeats", "1"])
    annotations_main()
    out = capsys.readouterr().out
    assert out.startswith("212 refs, 603 expressions, 836 annotations, ")
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert rows[1:4] == ["read and index", "select, tokenize, pack", "both"]
    assert rows[-2:] == ["ReferDataset", "records of REFER"]
    monkeypatch.setattr(sys, "argv", ["annotations", "--share", "0"])
    with pytest.raises(UserError, match="large enough for 2 batches per worker"):
        annotations_main()


def test_generated_annotations_have_the_requested_size(tmp_path):
    generate_dataset(tmp_path, Size(50, 500, 120, 340))
    refer = REFER(tmp_path)
    sentences = [sentence["raw"] for ref in refer.data["refs"] for sentence in ref["sentences"]]
    assert (len(refer.Refs), len(sentences), len(refer.Imgs), len(refer.Anns)) == (120, 340, 50, 500)
    assert 0.6 < len(set(sentences)) / len(sentences) < 0.95  # some sentences are repeated, as in RefCOCO
    assert min(refer.getMask(ref_id)["area"] for ref_id in refer.Refs) > 0


def test_the_generated_split_has_the_requested_size(tmp_path):
    evaluation.write_set(tmp_path, evaluation.Size(7, 19, 53))
    dataset = evaluation.open_set(tmp_path, 64)
    assert len(dataset) == 53
    assert len({e.ref_id for e in dataset.expressions}) == 19
    assert len({e.image_id for e in dataset.expressions}) == 7
