"""Distributed set-up, collectives, logging and seeding, shared by all packages."""

import gc
import hashlib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from termcolor import colored
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from lib.errors import EXIT_MISTAKE, UserError
from lib.files import translate_write_errors
from lib.terminal import draws_bars
from lib.threads import default_number, number_is_given

LOGGER = logging.getLogger("crossvlt")
# They stop a training or an evaluation after saving its work. Data-loading processes ignore them.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LEVEL_COLORS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}

_cpu_group: dist.ProcessGroup | None = None  # set by init_distributed; None: the default group uses gloo


class Distributed(NamedTuple):
    """This process and its place among all processes of the command."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launched_rank() -> int:
    """Return this process's rank as set by the launcher, 0 without one. Works before :func:`init_distributed`."""
    return int(os.environ.get("RANK", 0))


def launched_world_size() -> int:
    """Return the number of processes started by the launcher, 1 without one. Works before :func:`init_distributed`."""
    return int(os.environ.get("WORLD_SIZE", 1))


def init_distributed(device: str = "auto", *, tf32: bool = False, saved_threads: int | None = None) -> Distributed:
    """Join the process group of the launcher (torchrun, torch.distributed.launch), or run as a single process.

    Args:
        device: ``auto`` (CUDA if available), ``cpu``, ``cuda`` or, for a single process, ``cuda:N``.
        tf32: allow TF32 matrix products and convolutions on GPUs. Faster, but outside the tolerance of the tests that
                compare with the published network.
        saved_threads: number of CPU threads of the run that is resumed; see :func:`set_num_threads`.

    Raises:
        UserError: the device does not exist, or there are more processes than GPUs.
    """
    world_size = launched_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    selected = select_device(device, local_rank, world_size)
    if selected.type == "cuda":
        set_tf32(tf32)
        torch.cuda.set_device(selected)
    elif tf32:
        warn_once("--tf32 is ignored: TF32 needs a CUDA GPU")
    set_num_threads(saved_threads if selected.type == "cpu" else None)
    if world_size > 1:
        global _cpu_group
        backend = "nccl" if selected.type == "cuda" else "gloo"
        store, rank, world_size = next(rendezvous("env://"))
        # torchrun --max-restarts reuses its store. Without a prefix, this process would read keys of earlier processes.
        store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        device_id = selected if backend == "nccl" else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=device_id)
        _cpu_group = dist.new_group(backend="gloo") if backend == "nccl" else None
    return Distributed(launched_rank(), local_rank, world_size, selected)


def set_tf32(allow: bool) -> None:
    """Allow or forbid TF32 on GPUs. PyTorch's defaults are True for convolutions and False for matrix products."""
    torch.backends.cudnn.allow_tf32 = allow
    torch.backends.cuda.matmul.allow_tf32 = allow


def select_device(device: str, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """Return the device of this process; see :func:`init_distributed`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        selected = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: use auto, cpu, cuda or cuda:N.") from error
    if selected.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: only cpu and cuda are supported.")
    if selected.type == "cpu":
        return selected
    if not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch finds no CUDA GPU. Use --device cpu or auto.")
    if world_size > 1 and selected.index is not None:
        raise UserError(f"--device {device}: with several processes, each one uses its own GPU. Use --device cuda.")
    index = local_rank if selected.index is None else selected.index
    # All processes of a node check the same condition, so the main process reports the error.
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if selected.index is None else index + 1
    if needed > torch.cuda.device_count():
        raise UserError(f"{needed} GPUs needed, {torch.cuda.device_count()} available. Start one process per GPU.")
    return torch.device("cuda", index)


def set_num_threads(saved: int | None = None) -> None:
    """Set the number of CPU threads: that of the environment, else ``saved``, else :func:`lib.threads.default_number`.

    Sums are rounded identically only with the same number of threads.
    """
    number = torch.get_num_threads() if number_is_given() else saved or default_number()
    if saved and number != saved:
        warn_once(
            f"The run continues with {number} CPU thread(s), but was saved with {saved}: its results will differ "
            f"slightly from those of an uninterrupted run. For identical results set OMP_NUM_THREADS={saved}."
        )
    torch.set_num_threads(number)


def float32_precision(device: torch.device) -> str:
    """Return the precision of float32 matrix products and convolutions on a device: ``float32`` or ``TF32``."""
    return "TF32" if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "float32"


def gather(item: Any) -> list[Any]:
    """Return a list of the items of all processes, ordered by rank, on every process."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def from_main(item: Any) -> Any:
    """Return the main process's item on every process."""
    return gather(item)[0]


def on_main(function: Callable[[], Any]) -> Any:
    """Call ``function`` on the main process only and return its result on every process.

    Raises:
        UserError: on the main process, if ``function`` raised one. The other processes exit silently with status 2.
    """
    result, error = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = function()
        except UserError as caught:
            error = caught
    result, failed = from_main((result, error is not None))
    if error is not None:
        raise error
    if failed:
        sys.exit(EXIT_MISTAKE)
    return result


def attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """Call ``function`` on every process. Return its result, and the first UserError of any process as text or ""."""
    result, reason = None, ""
    try:
        result = function()
    except UserError as error:
        reason = str(error)
    return result, next(filter(None, gather(reason)), "")


def sum_over_processes(values: list[float]) -> list[float]:
    """Return the element-wise sums over all processes, in float64, identical on every process.

    The values are exchanged between CPUs, without synchronizing with a GPU. All processes must pass the same number of
    values.
    """
    if not dist.is_initialized():
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums, group=_cpu_group)
    return sums.tolist()


class _ColoredFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        color = LEVEL_COLORS.get(record.levelname)
        return f"{colored(record.levelname.lower(), color)}: {text}" if color else text


class _TerminalHandler(logging.StreamHandler):
    """Write log lines to the current stderr without breaking a running tqdm bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _History(logging.Handler):
    """Keep the records logged before the log file is opened. They are written to the file later."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore OSErrors, such as a full disk. Code that depends on the disk raises its own error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Output(io.FileIO):
    """File of stdout or stderr that discards everything after the first write that fails.

    The reader of a pipe (``… 2>&1 | tee``) has died, the terminal was closed, or the disk is full. The log file
    contains the reason.
    """

    def __init__(self, stream: str, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.stream = stream

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            text = f"{self.stream}: {error.strerror}. Its further output is discarded; the program continues."
            record = LOGGER.makeRecord(LOGGER.name, logging.WARNING, "", 0, text, (), None)
            for handler in LOGGER.handlers:
                if not isinstance(handler, _TerminalHandler):  # it may be writing this very stream
                    handler.handle(record)
            return len(data)


def continue_without(stream: str) -> None:
    """Let the program continue when ``stream`` (stdout or stderr) can no longer be written; the log file says why.

    A stream that is replaced already, for example by a notebook or a test, is left unchanged.
    """
    current = getattr(sys, stream)
    if current is None or current is not getattr(sys, f"__{stream}__"):
        return
    current.flush()
    replacement = io.TextIOWrapper(
        io.BufferedWriter(_Output(stream, current.fileno())),
        encoding=current.encoding,
        errors=current.errors,
        line_buffering=current.line_buffering or current.write_through,  # or unbuffered, by PYTHONUNBUFFERED
    )
    setattr(sys, stream, replacement)


def set_up_logging(rank: int = 0, file: Path | None = None) -> logging.Logger:
    """Configure the project's logger: stderr (warnings only on ranks above 0) and, on the main process, ``file``.

    Debug lines (progress) go to the file and to a redirected stderr. They do not go to a terminal that shows progress
    bars instead (:func:`lib.terminal.draws_bars`). If an earlier call had no ``file``, the lines logged since then are
    written to the file first.
    A closed stderr does not end the program.

    Raises:
        UserError: ``file`` cannot be written.
    """
    continue_without("stderr")
    history = next((handler for handler in LOGGER.handlers if isinstance(handler, _History)), None) or _History()
    for handler in LOGGER.handlers:
        handler.close()
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.DEBUG if rank == 0 else logging.WARNING)
    terminal = _TerminalHandler()
    terminal.setLevel(logging.INFO if draws_bars() else logging.DEBUG)
    terminal.setFormatter(_ColoredFormatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    LOGGER.addHandler(terminal)
    if file is None:
        LOGGER.addHandler(history)
    elif rank == 0:
        with translate_write_errors(file):
            log_file = _LogFile(file, encoding="utf-8")
        log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for record in history.records:
            log_file.handle(record)
        LOGGER.addHandler(log_file)
    return LOGGER


def warn_once(message: str, *args: Any) -> None:
    """Log a warning on the main process only."""
    if launched_rank() == 0:
        LOGGER.warning(message, *args)


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on ``parts`` only, not on the machine, the process or Python's hash seed."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the garbage collector in this block. This halves the time to create millions of records."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
