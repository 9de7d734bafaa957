"""Errors, safe writing, logging and seeds."""

import logging
import subprocess
import sys

import pytest
import torch
from conftest import PROCESS_ENVIRONMENT, ROOT

import utils
from lib.cli import run_command
from lib.errors import MissingFileError, StoppedError, UserError
from lib.files import atomic_write
from utils import derive_seed, init_distributed, on_main


def test_written_aside_is_all_or_nothing(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with atomic_write(target) as aside:
        aside.write_text("first")
        assert not target.exists()
    assert target.read_text() == "first"

    def half_written():
        with atomic_write(target) as aside:
            aside.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        half_written()
    assert target.read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")

    def write():
        with atomic_write(tmp_path / "file" / "below.txt") as aside:
            aside.write_text("")

    with pytest.raises(UserError, match=r"can't write .*below\.txt"):
        write()


@pytest.mark.parametrize(
    ("raised", "status", "printed"),
    [
        (UserError("wrong flag"), 2, "error: wrong flag\n"),
        (MissingFileError("no file x"), 2, "error: no file x\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (StoppedError("stopped at step 3"), 75, "stopped at step 3\n"),
        (SystemExit(2), 2, ""),
        (UserError("Caught it in a worker.\nTraceback (most recent call last):\n  F\nlib.errors.UserError: bad a.jpg\n"), 2,
         "error: bad a.jpg\n"),
    ],
)  # fmt: skip
def test_mistakes_become_one_line(raised, status, printed, capsys):
    def main():
        raise raised

    with pytest.raises(SystemExit) as left:
        run_command(main)
    assert left.value.code == status
    assert capsys.readouterr().err == printed


def test_bugs_keep_their_traceback():
    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_command(main)


def test_what_nobody_reads_any_more_ends_quietly():
    """As `… | head` does, with much to print and with little; a broken pipe of something else is a bug like others."""
    environment = {name: value for name, value in PROCESS_ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    for what in ("print('line'), input()", "[print('line', flush=True) for _ in range(100_000)]"):
        command = [sys.executable, "-c", f"from utils import run_command\nrun_command(lambda: ({what}))"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:
            process.stdout.close()
            process.stdin.write("\n")
            process.stdin.close()
            assert process.stderr.read() == ""
            assert process.wait() == 141

    def other():
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        utils.run_command(other)


def test_before_joining_one_process_of_each_node_tells(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def main():
        raise UserError("told by rank 0")

    for local_rank, printed in ((None, ""), ("1", ""), ("0", "[rank 1] error: told by rank 0\n")):
        if local_rank:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit):
            run_command(main)
        assert capsys.readouterr().err == printed


def test_why_a_run_ends_is_in_its_log(tmp_path):
    utils.set_up_logging(0, tmp_path / "train.log")

    def main():
        raise UserError("the disk is full")

    with pytest.raises(SystemExit):
        run_command(main)
    utils.set_up_logging()
    assert (tmp_path / "train.log").read_text().endswith("ERROR error: the disk is full\n")


def test_a_process_that_loses_another_says_so():
    for text, lost in (("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer [::1]", True), ("a bug", False)):
        assert utils.is_lost_process(RuntimeError(text)) is lost
    assert utils.is_lost_process(torch.distributed.DistBackendError("NCCL error"))


def test_devices(monkeypatch):
    processes = init_distributed("cpu")
    assert (processes.rank, processes.world_size, processes.device.type, processes.is_main) == (0, 1, "cpu", True)
    monkeypatch.setattr(utils.torch.cuda, "is_available", lambda: False)
    assert init_distributed("auto").device.type == "cpu"
    for device, told in (("cuda", "no CUDA GPU"), ("tpu", "use auto, cpu, cuda"), ("mps", "only cpu and cuda")):
        with pytest.raises(UserError, match=told):
            init_distributed(device)


def test_seeds_depend_on_every_part_and_on_nothing_else():
    assert derive_seed("epoch", 0, 1) == 9078349444151840633
    assert len({derive_seed(*parts) for parts in (("a", 1), ("a", 2), ("b", 1), (1, "a"), ("a", 1, 0))}) == 5
    assert all(0 <= derive_seed(i) < 2**63 for i in range(100))


def test_the_log_file_has_all_the_lines(tmp_path, capsys):
    log = utils.set_up_logging(0, tmp_path / "train.log")
    log.debug("step 1")
    log.warning("careful")
    utils.set_up_logging(1)
    logging.getLogger("crossvlt").info("not from rank 1")
    logging.getLogger("crossvlt").warning("but this")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["DEBUG step 1", "WARNING careful"]
    printed = capsys.readouterr().err
    assert "step 1" in printed  # into a pipe everything goes
    assert "not from rank 1" not in printed
    assert "[rank 1] but this" in printed


def test_on_main_alone():
    assert on_main(lambda: 3) == 3


TOGETHER = """
import sys
from utils import *
def main():
    processes = init_distributed("cpu")
    assert gather(processes.rank) == [0, 1]
    assert from_main(processes.rank + 5) == 5
    assert on_main(lambda: processes.rank + 7) == 7
    def fail():
        raise UserError("the disk is full")
    on_main(fail)
run_command(main)
"""


def test_a_failure_of_the_main_process_ends_all(tmp_path):
    (tmp_path / "together.py").write_text(TOGETHER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         tmp_path / "together.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={**PROCESS_ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "error: " in line and "elastic" not in line] == [
        "error: the disk is full"
    ]
    assert "AssertionError" not in done.stderr
