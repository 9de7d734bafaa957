"""Shared by all commands: argument parser, suggestions for typos, exit statuses. Imports no torch."""

import argparse
import contextlib
import difflib
import errno
import logging
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lib.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_MISTAKE,
    EXIT_PIPE,
    EXIT_STOPPED,
    CommonError,
    MissingFileError,
    StoppedError,
    UserError,
)
from lib.files import Kind, check_replaceable, protect, protecting_inputs
from lib.threads import keep_freed_memory, shorten_waiting

LOGGER = logging.getLogger("crossvlt")
STORE_TIMEOUT = 10  # seconds


class Parser(argparse.ArgumentParser):
    """ArgumentParser that accepts no abbreviations and suggests the right name for a mistyped flag.

    It knows which arguments are files: :meth:`parse_args` protects the inputs and checks that no output replaces one of
    them.

    Attributes:
        inputs: the arguments that name files or folders which the command reads.
        existing: those of them that must exist, with hints where to get them.
        outputs: those that name files or folders which it writes, with their kinds.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.inputs: list[argparse.Action] = []
        self.existing: list[tuple[argparse.Action, str]] = []
        self.outputs: list[tuple[argparse.Action, Kind]] = []

    def add_input(self, *names: str, must_exist: bool = False, hint: str = "", **kwargs: Any) -> None:
        """Add an argument that names one or several files or folders to read.

        Args:
            must_exist: parse_args raises a MissingFileError if one of them does not exist, before anything is imported.
            hint: a sentence for that message that says where to get the file.
        """
        action = self.add_argument(*names, **kwargs)
        self.inputs.append(action)
        if must_exist:
            self.existing.append((action, hint))

    def add_output(self, *names: str, kind: Kind, **kwargs: Any) -> None:
        """Add an argument that names a file of this kind, or a folder, to write."""
        self.outputs.append((self.add_argument(*names, **kwargs), kind))

    def option_names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"Unknown flag {unknown[0]}." + did_you_mean(unknown[0].split("=")[0], self.option_names()))
        for action, hint in self.existing:
            for path in _values(parsed, action):
                if not os.path.exists(path):
                    name = f"{action.option_strings[0]} " if action.option_strings else ""
                    raise MissingFileError(f"{name}{path}: no such file or folder. {hint}".rstrip())
        protect(*(path for action in self.inputs for path in _values(parsed, action) if os.path.isfile(path)))
        for action, kind in self.outputs:
            for path in _values(parsed, action):
                check_replaceable(path, kind)
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{'' if message.endswith(('.', '?')) else '.'} See --help.")


def _values(parsed: argparse.Namespace, action: argparse.Action) -> Iterator[str | Path]:
    """Yield the paths that an argument was given, none if it was not given."""
    value = getattr(parsed, action.dest, None)
    yield from filter(None, value if isinstance(value, list) else [value])


def did_you_mean(name: str, candidates: Sequence[str]) -> str:
    """Return `` Did you mean X?`` for the closest candidate, or an empty string."""
    normalized = {candidate.lower().replace("-", "_").lstrip("_"): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower().replace("-", "_").lstrip("_"), normalized, n=1, cutoff=0.6)
    return f" Did you mean {normalized[close[0]]}?" if close else ""


def run_command(main: Callable[[], None]) -> None:
    """Call a command's main function and exit with a status that says how it ended.

    Exit statuses: 0 success; 1 a bug (with traceback) or another process that died; 2 a user's mistake (one line);
    75 stopped by a signal with everything saved; 130 Ctrl-C with nothing to save; 141 stdout was closed by its reader.
    A mistake found before the processes have joined a group is printed by one process per node.
    """
    shorten_waiting()
    keep_freed_memory()
    _open_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    status = 0
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"[rank {rank}] "
    try:
        with protecting_inputs():
            main()
        sys.stdout.flush()  # a closed pipe must raise here, not while the interpreter shuts down
    except UserError as error:
        status, text = EXIT_MISTAKE, f"{prefix}error: {message_of(error)}"
        _register_failure(text)
        every_process_reports = _distributed() is not None and not isinstance(error, CommonError)
        if os.environ.get("LOCAL_RANK", rank) == "0" or every_process_reports:
            report(text)
    except StoppedError as error:
        status = EXIT_STOPPED
        if rank == "0":
            report(str(error))
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
        _register_failure(f"{prefix}interrupted")
        report("interrupted")
    except SystemExit as error:  # --help, or a process whose error another one reports
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if status:
            _register_failure(f"{prefix}ended with exit status {status}")
    except Exception as error:
        text = "".join(f"{prefix}{line}" for line in traceback.format_exc().splitlines(True))
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO) and _stdout_is_closed():
            status = EXIT_PIPE
        elif _distributed() is None:
            _log(text)
            raise
        else:
            status = EXIT_BUG
            first = _register_failure(text)
            if first is None or not _is_communication_error(error):
                report(text)
            else:
                report(f"{prefix}ended because another process failed first; see the error of that process")
                _log(f"The first error of a process:\n{first}")
    distributed = _distributed()
    if distributed is not None:
        if status not in (0, EXIT_STOPPED):
            # destroy_process_group() would wait for the other processes, which are waiting for this one.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        distributed.destroy_process_group()
    if status:
        sys.exit(status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but exit at once during an import: extension modules abort or raise other errors."""
    current = frame
    while current is not None:
        if current.f_code.co_filename.startswith("<frozen importlib"):
            report("interrupted")
            os._exit(EXIT_INTERRUPTED)
        current = current.f_back
    signal.default_int_handler(number, frame)


def _open_closed_streams() -> None:
    """Connect stdout and stderr to /dev/null if the shell has closed them, as in ``command >&-``."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_WRONLY)  # the number of the closed stream, the smallest free one
            setattr(sys, name, os.fdopen(descriptor, "w"))


def _distributed() -> Any:
    """Return torch.distributed if the command has loaded it and joined a process group, else None."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed is not None and distributed.is_initialized() else None


def _stdout_is_closed() -> bool:
    """Return whether stdout is a closed pipe (``… | head``) or terminal. If so, redirect stdout to /dev/null."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # these two events are always reported
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python prints an error at exit
    return True


def report(text: str) -> None:
    """Print the reason why a command ends to stderr, and append it to the run's log file if there is one."""
    print(text, file=sys.stderr)
    _log(text)


def _log(text: str) -> None:
    """Append a text to the run's log file, which only the main process has."""
    for handler in LOGGER.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(LOGGER.makeRecord(LOGGER.name, logging.ERROR, "", 0, text.rstrip(), (), None))


def _register_failure(text: str) -> str | None:
    """Register that this process fails. Return the text of the process that failed first, or None for the first one.

    The processes agree through the store of their group. Where the store cannot be reached, because the process that
    hosts it has died, every process counts as the first one: its error is printed in full.
    """
    distributed = _distributed()
    if distributed is None:
        return None
    answers: list[str] = []

    def exchange() -> None:
        with contextlib.suppress(Exception):
            store = distributed.distributed_c10d._get_default_store()
            answers.append(store.compare_set("first failure", "", text).decode())

    thread = threading.Thread(target=exchange, daemon=True)
    thread.start()
    thread.join(STORE_TIMEOUT)  # an unreachable machine does not answer
    return answers[0] if answers and answers[0] != text else None


def _is_communication_error(error: Exception) -> bool:
    """Return whether a collective operation failed, as on all processes that wait for one that has ended."""
    distributed = sys.modules.get("torch.distributed")
    return (distributed is not None and isinstance(error, distributed.DistError)) or (
        isinstance(error, RuntimeError) and re.search(r"gloo|[Cc]onnection (closed|reset)", str(error)) is not None
    )


def message_of(error: UserError) -> str:
    """Return the error's message. For an error in a data-loading worker, this is the last line of its traceback."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = re.sub(r"^lib\.errors\.\w+: ", "", text.splitlines()[-1])
    return text
