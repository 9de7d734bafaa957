"""``make gpu`` without a GPU: its checks compare the CPU with itself, and its sections are small commands."""

import sys

import pytest
import torch

import benchmarks.gpu.__main__ as gpu
from benchmarks.gpu.checks import CHECKS
from lib.errors import UserError

CPU = torch.device("cpu")


def run_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["gpu", *map(str, flags)])
    gpu.main()


@pytest.mark.parametrize("name", [name for name in CHECKS if "golden" not in name])  # those are tests of their own
def test_a_check_runs(name):
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        assert CHECKS[name](CPU)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        sys.modules.pop("golden_cases", None)


def test_a_wrong_weight_fails_a_check(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.checks.largest_difference", lambda *_: 1e-3)
    with pytest.raises(AssertionError, match=r"a weight differs by 1\.0e-03"):
        CHECKS["fused AdamW"](CPU)


def test_sections_end_in_time_and_are_reported(monkeypatch, tmp_path, capsys):
    written = tmp_path / "table.md"
    copy = f"import pathlib; pathlib.Path({str(written)!r}).write_text('| a table |')"
    parts = [
        gpu.Section("finished", ["timeit", "-n", "1", "-r", "1", copy], 60, written),
        gpu.Section("broken", ["no_such_module"], 60),
        gpu.Section("slow", ["timeit", "-s", "import time", "time.sleep(600)"], 1),
    ]
    monkeypatch.setattr(gpu, "sections", lambda device, folder: parts)
    out = tmp_path / "gpu_dry_run.md"
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--device", "cpu", "--out", out)
    text = out.read_text(encoding="utf-8")
    assert text.startswith("# Dry run on a CPU: no results\n")
    assert f"torch {torch.__version__}" in text
    results = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.endswith(" s |")]
    assert results == [["finished", "done"], ["broken", "failed"], ["slow", "not finished in 1 s"]]
    assert "## finished\n\n| a table |" in text
    assert "No module named no_such_module" in text
    assert gpu.run(parts[0], 1.0).result == "not run: no time left"


def test_all_sections_fit_into_nine_minutes_and_have_valid_flags(tmp_path, monkeypatch):
    for device in ("cuda", "cpu"):
        parts = gpu.sections(device, tmp_path)
        assert sum(part.limit for part in parts[len(CHECKS) :]) <= gpu.SECONDS < 540
        for module, *flags in (part.command for part in parts):
            parser = sys.modules[module] if module in sys.modules else __import__(module, fromlist=["get_parser"])
            parser = gpu if module == "benchmarks.gpu" else parser
            parser.get_parser().parse_args(flags)


def test_mistakes_are_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no CUDA GPU on this machine"):
        run_main(monkeypatch)
    with pytest.raises(UserError, match="Pass --out FILE"):
        run_main(monkeypatch, "--device", "cpu")
    with pytest.raises(UserError, match="no such check"):
        run_main(monkeypatch, "--device", "cpu", "--check", "nothing")
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name in ("timm", "h5py") else name)
    with pytest.raises(UserError, match="lacks timm, h5py"):
        run_main(monkeypatch)
