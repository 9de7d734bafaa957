"""lib.compare.jobs: several commands at a time, failures, and signals."""

import os
import signal
import subprocess
import sys
import time

import pytest
from compare_runs import STOPPABLE, FakeRun
from conftest import ROOT

from lib.compare.jobs import execute, threads_per_job
from lib.errors import StoppedError, UserError

SECONDS_TO_WAIT = 60


def wait_for(path):
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_steps_of_a_run_are_executed_in_order(tmp_path, capsys):
    runs = [FakeRun(name, tmp_path, ("print('first')", "print('second')")) for name in "ab"]
    execute([*runs, FakeRun("c", tmp_path, ())], jobs=2)
    assert [run.output.read_text() for run in runs] == ["first\nsecond\n"] * 2
    assert "1 of 3 runs are already finished." in capsys.readouterr().out


def test_runs_execute_at_the_same_time(tmp_path):
    """Each of the two programs waits for a file of the other."""
    program = """
import pathlib, sys, time
path = pathlib.Path(sys.argv[1])
path.touch()
other = path.with_name({"a": "b", "b": "a"}[path.name])
while not other.exists():
    time.sleep(0.02)
"""
    execute([FakeRun(name, tmp_path, (program,)) for name in "ab"], jobs=2)


def test_one_job_at_a_time(tmp_path):
    program = """
import pathlib, sys, time
path = pathlib.Path(sys.argv[1]).with_name("busy")
path.touch(exist_ok=False)
time.sleep(0.1)
path.unlink()
"""
    execute([FakeRun(name, tmp_path, (program,)) for name in "abc"], jobs=1)


def test_a_failed_run_does_not_stop_the_others(tmp_path):
    failing = FakeRun("bad", tmp_path, ("import sys; sys.exit('error: no such dataset')", "print('not executed')"))
    good = FakeRun("good", tmp_path, ("print('done')",))
    with pytest.raises(UserError, match=r"1 of 2 runs failed. bad \(training\): no such dataset"):
        execute([failing, good], jobs=1)
    assert good.output.read_text() == "done\n"
    assert "not executed" not in failing.output.read_text()


def test_a_signal_lets_the_commands_save_their_state(tmp_path):
    runs = [FakeRun(name, tmp_path, (STOPPABLE,)) for name in "ab"]
    started = f"all(__import__('os').path.exists({str(tmp_path)!r} + f'/{{name}}.started') for name in 'ab')"
    interrupt = f"import os, time\nwhile not {started}: time.sleep(0.02)\nos.kill({os.getpid()}, {int(signal.SIGTERM)})"
    with pytest.raises(StoppedError, match="Run the same command again to continue"):
        execute([*runs, FakeRun("interrupt", tmp_path, (interrupt,))], jobs=3)
    assert all((tmp_path / f"{name}.saved").exists() for name in "ab")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not signal the death of a parent")
def test_no_command_outlives_lib_compare(tmp_path):
    """Killed with SIGKILL, lib.compare cannot pass anything on."""
    program = (
        "import pathlib, sys; sys.path.insert(0, 'tests')\n"
        "from compare_runs import STOPPABLE, FakeRun\n"
        "from lib.compare.jobs import execute\n"
        "execute([FakeRun('a', pathlib.Path(sys.argv[1]), (STOPPABLE,))], jobs=1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=ROOT) as process:
        try:
            wait_for(tmp_path / "a.started")
        finally:
            process.kill()
    wait_for(tmp_path / "a.saved")


def test_commands_of_a_killed_comparison_are_waited_for(tmp_path, monkeypatch):
    """They need a moment to save their state, and are named if they do not end."""
    run = FakeRun("a", tmp_path, ("print('done')",))
    holder = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
    holder += "file.write('process 7'); file.flush(); print('held', flush=True); time.sleep(float(sys.argv[2]))"

    def hold(seconds):
        command = [sys.executable, "-c", holder, run.locks[0], str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        return process

    with hold(0.5):
        execute([run], jobs=1)
    assert run.output.read_text() == "done\n"
    monkeypatch.setattr("lib.compare.jobs.SECONDS_TO_SAVE", 0)
    with hold(60) as process:
        try:
            with pytest.raises(
                UserError, match=r"Another command is writing .* \(process 7\). Wait until it has ended"
            ):
                execute([run], jobs=1)
        finally:
            process.kill()


def test_jobs_share_the_cores(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("lib.compare.jobs.available_cores", lambda: 8)
    assert [threads_per_job(jobs) for jobs in (1, 3, 16)] == [8, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads_per_job(3) == 5
