"""Run the commands of a comparison, several at a time. Imports no torch.

A signal to lib.compare is passed on to the running commands, which save their state. They also receive a signal when
lib.compare is killed (on Linux), so that no training is left behind.
"""

import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lib.compare.plan import Run, Step
from lib.errors import StoppedError, UserError
from lib.files import open_to_append, translate_write_errors
from lib.locks import check_unlocked
from lib.threads import NUMBER_VARIABLES, available_cores

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # Linux
SECONDS_BETWEEN_CHECKS = 0.2
SECONDS_TO_SAVE = 60


class Running(NamedTuple):
    """A command that is running."""

    run: Run
    steps: list[Step]  # the first one is running
    process: subprocess.Popen
    started: float


def threads_per_job(jobs: int) -> int:
    """Return the number of threads of each command: that of the environment, or a share of the cores."""
    given = next((os.environ[name] for name in NUMBER_VARIABLES if os.environ.get(name, "").isdecimal()), None)
    return int(given or max(1, available_cores() // jobs))


def execute(runs: Sequence[Run], jobs: int) -> None:
    """Execute the remaining steps of the runs, ``jobs`` runs at a time. A run that fails does not stop the others.

    Raises:
        StoppedError: a signal was received; the running commands have saved their state and ended.
        UserError: some runs failed.
    """
    waiting = [(run, steps) for run in runs if (steps := run.remaining_steps())]
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are already finished.", flush=True)
    _wait_for_earlier_commands([run for run, _ in waiting])
    running: list[Running] = []
    failures: list[str] = []
    with _recorded_signals() as received:
        while waiting or running:
            if received:
                _stop(running, received)
                raise StoppedError("Stopped. Run the same command again to continue.")
            while waiting and len(running) < jobs:
                running.append(_start(*waiting.pop(0), threads_per_job(jobs)))
            time.sleep(SECONDS_BETWEEN_CHECKS)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                done, status = job.steps[0], job.process.returncode
                if status:
                    failures.append(f"{job.run.name} ({done.title}): {_last_line(job.run.output)}")
                    print(f"{job.run.name}: {done.title} failed, see {job.run.output}", flush=True)
                    continue
                minutes = (time.monotonic() - job.started) / 60
                print(f"{job.run.name}: {done.title} finished after {minutes:.1f} min", flush=True)
                if job.steps[1:]:
                    running.append(_start(job.run, job.steps[1:], threads_per_job(jobs)))
    if failures:
        raise UserError(
            f"{len(failures)} of {len(runs)} runs failed. {failures[0]} Correct the cause and run the same command "
            "again: finished runs are kept."
        )


def _wait_for_earlier_commands(runs: Sequence[Run]) -> None:
    """Wait until the commands of a killed lib.compare have saved their state. UserError: they do not end."""
    deadline = time.monotonic() + SECONDS_TO_SAVE
    for path in [path for run in runs for path in run.locks]:
        while True:
            try:
                check_unlocked(
                    path, f"Another command is writing {path.parent}", "Wait until it has ended, or stop it."
                )
                break
            except UserError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(SECONDS_BETWEEN_CHECKS)


def _start(run: Run, steps: list[Step], threads: int) -> Running:
    """Start the first of the steps. UserError: its output cannot be written."""
    step = steps[0]
    run.remove_outdated(step)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with translate_write_errors(run.output):
        run.output.parent.mkdir(parents=True, exist_ok=True)
    with open_to_append(run.output) as output:
        process = subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C in the terminal reaches lib.compare only, which passes it on
            preexec_fn=_end_with_parent(),
        )
    print(f"{run.name}: {step.title}", flush=True)
    return Running(run, steps, process, time.monotonic())


def _end_with_parent() -> Callable[[], None] | None:
    """Return a function that lets the calling process receive SIGTERM when its parent dies. None: not on this system.

    The function runs between fork and exec. lib.compare has a single thread at that time.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    parent = os.getpid()

    def set_signal() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it has died in the meantime
            os._exit(1)

    return set_signal if prctl else None


@contextmanager
def _recorded_signals() -> Iterator[list[int]]:
    """Yield a list to which the numbers of received signals are added, instead of ending the process."""
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda received_number, _: received.append(received_number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(running: Sequence[Running], received: list[int]) -> None:
    """Let the running commands save their state and wait until they have ended. A second signal kills them."""
    names = ", ".join(job.run.name for job in running)
    print(f"{signal.Signals(received[0]).name}: waiting until {names} have saved their state", flush=True)
    for job in running:
        job.process.terminate()
    while any(job.process.poll() is None for job in running):
        if len(received) > 1:
            for job in running:
                job.process.kill()
        time.sleep(SECONDS_BETWEEN_CHECKS)


def _last_line(path: Path) -> str:
    """Return the last line that a command printed, without ``error:``."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return re.sub(r"^error: ", "", next((line.strip() for line in reversed(lines) if line.strip()), "no output"))
