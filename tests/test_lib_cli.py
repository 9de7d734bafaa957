"""lib.cli: suggestions for typos, and how a command ends."""

import importlib
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import PROCESS_ENVIRONMENT, ROOT

import utils
from lib.cli import Parser, did_you_mean, run_command
from lib.errors import MissingFileError, StoppedError, UserError


@pytest.fixture
def fork():
    """Return a function that runs a main function in a child process, which starts much faster than an interpreter."""

    def start(main, stderr, **environment):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update(environment)
            sys.stderr = stderr.open("w", buffering=1)
            try:
                run_command(main)
            finally:
                os._exit(99)
        return child

    return start


@pytest.fixture
def two_processes(fork, tmp_path):
    """Return a function that runs a main function in two processes, and returns their statuses and stderr.

    Their store is hosted by this process, as by torchrun, or by the first of the two, as without torchrun.
    """

    def run(main, *, torchrun):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        store = (
            torch.distributed.TCPStore("localhost", port, is_master=True, wait_for_workers=False) if torchrun else None
        )
        ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        ranks["TORCHELASTIC_USE_AGENT_STORE"] = str(torchrun)
        errors = [tmp_path / f"stderr_{rank}" for rank in range(2)]
        children = [fork(main, errors[rank], **ranks, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        del store
        return statuses, "".join(path.read_text() for path in errors)

    return run


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


def have_a_bug():
    raise ValueError("a bug")


def test_bugs_keep_their_traceback():
    with pytest.raises(ValueError, match="a bug"):
        run_command(have_a_bug)


def test_closed_standard_streams_are_replaced(monkeypatch):
    """As in ``command >&- 2>&-``."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    run_command(lambda: print("not visible"))
    with pytest.raises(SystemExit) as exit_info:
        run_command(lambda: Parser(prog="tool").parse_args(["--unknown"]))
    assert exit_info.value.code == 2


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


def test_an_interrupted_import_ends_the_command(fork, tmp_path, monkeypatch):
    """The import does not see a KeyboardInterrupt, which extension modules answer with an abort or another error."""
    module = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    os._exit(98)
"""
    (tmp_path / "interrupted_module.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    child = fork(lambda: importlib.import_module("interrupted_module"), tmp_path / "stderr")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert (tmp_path / "stderr").read_text() == "interrupted\n"


def test_a_closed_terminal_ends_the_command_silently(tmp_path):
    terminal, inside = os.openpty()
    command = [sys.executable, "-c", "from lib.cli import run_command\nrun_command(lambda: print('x', flush=True))"]
    with open(tmp_path / "errors", "w+") as errors, open(inside, "w") as stdout:
        os.close(terminal)
        done = subprocess.run(command, cwd=ROOT, env=PROCESS_ENVIRONMENT, stdout=stdout, stderr=errors, check=False)
        errors.seek(0)
        assert (done.returncode, errors.read()) == (141, "")


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
    with pytest.raises(ValueError, match="a bug"):
        run_command(have_a_bug)
    utils.set_up_logging()
    log = (tmp_path / "train.log").read_text()
    assert "ERROR error: the disk is full\n" in log
    assert log.endswith("ValueError: a bug\n")


def has_a_bug(rank):
    if rank == 1:
        raise ValueError("a bug")
    utils.gather(rank)


def receives_a_fault(rank):
    raise torch.distributed.DistBackendError("NCCL error: network error")


def is_killed_if_main(rank):
    if rank == 0:  # hosts the store, too
        os.kill(os.getpid(), signal.SIGKILL)
    utils.gather(rank)


FOLLOWED = "ended because another process failed first; see the error of that process"


@pytest.mark.parametrize(
    ("behavior", "whole", "short", "logged"),
    [
        (has_a_bug, "[rank 1] ValueError: a bug", 1, "[rank 1] ValueError: a bug"),
        (receives_a_fault, "DistBackendError: NCCL error: network error", 1, "NCCL error: network error"),
        (is_killed_if_main, "[rank 1] RuntimeError: ", 0, None),
    ],
)  # fmt: skip
def test_the_first_error_of_several_processes_is_printed_in_full(
    behavior, whole, short, logged, two_processes, tmp_path
):
    """The other processes print one line, and the log of the main process contains the first error."""

    def main():
        rank = utils.init_distributed("cpu").rank
        utils.set_up_logging(rank, tmp_path / "train.log")
        utils.gather(rank)
        behavior(rank)

    host_is_killed = behavior is is_killed_if_main
    statuses, printed = two_processes(main, torchrun=not host_is_killed)
    assert statuses == ([-signal.SIGKILL, 1] if host_is_killed else [1, 1])
    assert printed.count("Traceback") == 1
    assert whole in printed
    assert printed.count(FOLLOWED) == short
    if logged:
        assert logged in (tmp_path / "train.log").read_text()
