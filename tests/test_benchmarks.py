"""The benchmark of a training step, on a size that takes seconds."""

import subprocess
import sys

from conftest import PROCESS_ENVIRONMENT, ROOT


def benchmark(*flags):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *map(str, flags)],
        cwd=ROOT, capture_output=True, text=True, timeout=600, env=PROCESS_ENVIRONMENT, check=False,
    )  # fmt: skip


def test_training_step_is_reported_row_by_row(tmp_path):
    out = tmp_path / "step.md"
    done = benchmark(
        "--swin_type", "tiny", "--img_size", 64, "--batch_sizes", 1, "--steps", 1, "--device", "cpu", "--out", out
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = out.read_text(encoding="utf-8")
    assert written == done.stdout
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines() if line[:1] == "|"]
    head, _, *rows = cells
    # TF32 and compiled blocks are ways of GPUs.
    assert [row[:3] for row in rows] == [["1", mode, used] for mode in ("float32", "bf16") for used in ("no", "yes")]
    kept = [float(row[head.index("kept for backward")].split()[0]) for row in rows]
    for without, checkpointed in (kept[:2], kept[2:]):
        assert 0 < checkpointed < 0.5 * without
    assert written.splitlines()[-1].startswith("What gradient checkpointing changes about a step: peak memory ")


def test_training_step_refuses_sizes_that_no_step_has():
    done = benchmark("--batch_sizes", 1, 0)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--batch_sizes" in done.stderr
