"""utils: distributed set-up, collectives, logging, seeds."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from conftest import PROCESS_ENVIRONMENT, ROOT

import utils
from lib.errors import UserError
from utils import derive_seed, float32_precision, init_distributed, on_main


def test_devices_of_a_single_process(monkeypatch):
    distributed = init_distributed("cpu")
    assert (distributed.rank, distributed.world_size, distributed.device.type, distributed.is_main) == (
        0, 1, "cpu", True
    )  # fmt: skip
    monkeypatch.setattr(utils.torch.cuda, "is_available", lambda: False)
    assert init_distributed("auto").device.type == "cpu"
    for device, message in (("cuda", "no CUDA GPU"), ("tpu", "use auto, cpu, cuda"), ("mps", "only cpu and cuda")):
        with pytest.raises(UserError, match=message):
            init_distributed(device)


def test_the_precision_of_float32_operations(caplog, crossvlt_log):
    init_distributed("cpu", tf32=True)
    assert caplog.messages == ["--tf32 is ignored: TF32 needs a CUDA GPU"]
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for matmul.allow_tf32, expected in ((True, "TF32"), (False, "float32")):
            assert float32_precision(torch.device("cuda")) == expected
            assert float32_precision(torch.device("cpu")) == "float32"
    finally:
        matmul.allow_tf32 = before


def test_seeds_depend_on_all_parts_and_nothing_else():
    assert derive_seed("epoch", 0, 1) == 9078349444151840633
    assert len({derive_seed(*parts) for parts in (("a", 1), ("a", 2), ("b", 1), (1, "a"), ("a", 1, 0))}) == 5
    assert all(0 <= derive_seed(i) < 2**63 for i in range(100))


def test_the_log_file_contains_earlier_lines_too(tmp_path, capsys):
    utils.set_up_logging()
    logging.getLogger("crossvlt").info("before the file existed")
    log = utils.set_up_logging(0, tmp_path / "train.log")
    log.debug("step 1")
    log.warning("careful")
    utils.set_up_logging(1)
    logging.getLogger("crossvlt").info("not from rank 1")
    logging.getLogger("crossvlt").warning("but this")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO before the file existed", "DEBUG step 1", "WARNING careful"
    ]  # fmt: skip
    printed = capsys.readouterr().err
    assert "step 1" in printed  # stderr is not a terminal here
    assert "not from rank 1" not in printed
    assert "[rank 1] but this" in printed


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_recorded_once_in_the_log_file(tmp_path, monkeypatch, stream):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe:
        for name in (stream, f"__{stream}__"):
            monkeypatch.setattr(sys, name, pipe)
        log = utils.set_up_logging(0, tmp_path / "train.log")
        utils.continue_without(stream)
        print("read", file=getattr(sys, stream), flush=True)
        assert b"read" in os.read(reader, 1000)
        os.close(reader)
        for i in range(3):
            print("not read", file=getattr(sys, stream), flush=True)
            log.info("line %d", i)
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        f"WARNING {stream}: Broken pipe. Its further output is discarded; the program continues.",
        "INFO line 0", "INFO line 1", "INFO line 2",
    ]  # fmt: skip


def test_a_log_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"Cannot write .*missing/train\.log: No such file or directory"):
        utils.set_up_logging(0, tmp_path / "missing" / "train.log")


def test_on_main_with_one_process():
    assert on_main(lambda: 3) == 3


TWO_PROCESSES = """
from lib.cli import run_command
from lib.errors import UserError
from utils import from_main, gather, init_distributed, on_main, sum_over_processes

def main():
    rank = init_distributed("cpu").rank
    assert gather(rank) == [0, 1]
    assert from_main(rank + 5) == 5
    assert on_main(lambda: rank + 7) == 7
    assert sum_over_processes([1.0, float(rank)]) == [2.0, 1.0]
    def fail():
        raise UserError("the disk is full")
    on_main(fail)

run_command(main)
"""


def test_an_error_of_the_main_process_ends_all_processes(tmp_path):
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         tmp_path / "script.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={**PROCESS_ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "error: " in line and "elastic" not in line] == [
        "error: the disk is full"
    ]
    assert "AssertionError" not in done.stderr
