"""lib.cli: suggestions for typos, and how a command ends."""

import subprocess
import sys

import pytest
import torch
from conftest import PROCESS_ENVIRONMENT, ROOT

import utils
from lib.cli import Parser, did_you_mean, is_lost_process, run_command
from lib.errors import MissingFileError, StoppedError, UserError


def test_typos_get_a_suggestion():
    parser = Parser(prog="tool")
    parser.add_argument("--img_size", type=int)
    with pytest.raises(UserError, match=r"^Unknown flag --img-size=3\. Did you mean --img_size\? See --help\.$"):
        parser.parse_args(["--img-size=3"])
    with pytest.raises(UserError, match=r"^Unknown flag --img\. See --help\.$"):  # abbreviations are not accepted
        parser.parse_args(["--img", "3"])
    with pytest.raises(UserError, match=r"invalid int value: 'x'\. See --help\.$"):
        parser.parse_args(["--img_size", "x"])
    assert did_you_mean("refcocoo", ["refcoco", "refcocog"]) in (" Did you mean refcoco?", " Did you mean refcocog?")
    assert did_you_mean("unlike", ["refcoco"]) == ""


@pytest.mark.parametrize(
    ("raised", "status", "printed"),
    [
        (UserError("wrong flag"), 2, "error: wrong flag\n"),
        (MissingFileError("no file x"), 2, "error: no file x\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (StoppedError("stopped at step 3"), 75, "stopped at step 3\n"),
        (SystemExit(2), 2, ""),
        (UserError("In worker 0.\nTraceback (most recent call last):\n  F\nlib.errors.UserError: bad a.jpg\n"), 2,
         "error: bad a.jpg\n"),
    ],
)  # fmt: skip
def test_exit_statuses_and_printed_messages(raised, status, printed, capsys):
    def main():
        raise raised

    with pytest.raises(SystemExit) as exit_info:
        run_command(main)
    assert exit_info.value.code == status
    assert capsys.readouterr().err == printed


def test_bugs_keep_their_traceback():
    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_command(main)


@pytest.mark.parametrize("output", ["print('line'), input()", "[print('line', flush=True) for _ in range(100_000)]"])
def test_a_closed_stdout_ends_the_command_silently(output):
    """A reader such as `head` closes the pipe."""
    environment = {name: value for name, value in PROCESS_ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", f"from lib.cli import run_command\nrun_command(lambda: ({output}))"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141


def test_other_broken_pipes_are_bugs():
    def main():
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        run_command(main)


@pytest.mark.parametrize(
    ("local_rank", "printed"), [(None, ""), ("1", ""), ("0", "[rank 1] error: found by all processes\n")]
)
def test_before_joining_one_process_per_node_reports(monkeypatch, capsys, local_rank, printed):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)

    def main():
        raise UserError("found by all processes")

    with pytest.raises(SystemExit):
        run_command(main)
    assert capsys.readouterr().err == printed


def test_the_log_file_contains_why_the_run_ended(tmp_path):
    utils.set_up_logging(0, tmp_path / "train.log")

    def main():
        raise UserError("the disk is full")

    with pytest.raises(SystemExit):
        run_command(main)
    utils.set_up_logging()
    assert (tmp_path / "train.log").read_text().endswith("ERROR error: the disk is full\n")


def test_errors_caused_by_a_lost_process_are_recognized():
    assert is_lost_process(RuntimeError("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer [::1]"))
    assert is_lost_process(torch.distributed.DistBackendError("NCCL error"))
    assert not is_lost_process(RuntimeError("a bug"))
