"""The benchmark of a training step, on a size that takes seconds."""

import sys

import pytest

from benchmarks import train_step
from utils import UserError


def run(monkeypatch, *flags):
    """As its command does, but every row in this process."""

    def in_this_process(job):
        return train_step.measure(job)._asdict() if job.mode else train_step.look_at_machine(job)

    monkeypatch.setattr(train_step, "in_own_process", in_this_process)
    monkeypatch.setattr(sys, "argv", ["train_step", *map(str, flags)])
    train_step.main()


def test_training_step_is_reported_row_by_row(tmp_path, monkeypatch, capsys):
    out = tmp_path / "step.md"
    run(
        monkeypatch, "--swin_type", "tiny", "--img_size", 64, "--batch_sizes", 1, "--steps", 1, "--device", "cpu",
        "--out", out,
    )  # fmt: skip
    written = out.read_text(encoding="utf-8")
    assert written == capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines() if line[:1] == "|"]
    head, _, *rows = cells
    # TF32 and compiled blocks are ways of GPUs.
    assert [row[:3] for row in rows] == [["1", mode, used] for mode in ("float32", "bf16") for used in ("no", "yes")]
    kept = [float(row[head.index("kept for backward")].split()[0]) for row in rows]
    for without, checkpointed in (kept[:2], kept[2:]):
        assert 0 < checkpointed < 0.5 * without
    assert written.splitlines()[-1].startswith("What gradient checkpointing changes about a step: peak memory ")


def test_training_step_refuses_sizes_that_no_step_has(monkeypatch):
    with pytest.raises(UserError, match="--batch_sizes and --steps must be at least 1"):
        run(monkeypatch, "--batch_sizes", 1, 0)
