"""What every room shares: errors a user can cause, processes, logging, seeding, safe writing."""

import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from termcolor import colored

LOGGER = logging.getLogger("crossvlt")
LEVEL_COLORS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


class UserError(ValueError):
    """A mistake of the user's (a flag, a file, an annotation), told in one line that says what to do."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder the user has to provide is not there."""


class Processes(NamedTuple):
    """This process among those that work together."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launched_rank() -> int:
    """This process's rank as the launcher says, 0 without one; known before anything is set up."""
    return int(os.environ.get("RANK", 0))


def set_up_processes(device: str = "auto") -> Processes:
    """Join the processes a launcher (torchrun, torch.distributed.launch) has started, or be the only one.

    Args:
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or, for a single process, ``cuda:N``.

    Raises:
        UserError: the device isn't there, or there are more processes than GPUs.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: PyTorch finds no CUDA GPU here; use --device cpu or auto")
        # float32 means float32: TF32 convolutions would be off by more than the golden numbers allow.
        torch.backends.cudnn.allow_tf32 = False
        index = local_rank if chosen.index is None else chosen.index
        if world_size > 1 and chosen.index is not None:
            raise UserError(f"--device {device}: with several processes each takes its own GPU; use --device cuda")
        # Every process finds this, so that the main one tells it.
        needed = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if chosen.index is None else index + 1
        if needed > torch.cuda.device_count():
            raise UserError(f"{needed} GPUs are needed, {torch.cuda.device_count()} here: start one process per GPU")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    elif chosen.type != "cpu":
        raise UserError(f"--device {device}: only cpu and cuda are supported")
    if world_size > 1:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=chosen if backend == "nccl" else None)
    return Processes(launched_rank(), local_rank, world_size, chosen)


def tear_down_processes() -> None:
    """The inverse of :func:`set_up_processes`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(item: Any) -> list[Any]:
    """Every process's item, in the order of ranks, on every process."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def from_main(item: Any) -> Any:
    """The main process's item, on every process."""
    return gather(item)[0]


def on_main(function: Callable[[], Any]) -> Any:
    """Run something on the main process alone; its result, or its failure, reaches every process.

    Raises:
        UserError: on the main process, as ``function`` raised it; the other processes leave quietly with status 2.
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
        sys.exit(2)
    return result


class _ColoredFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        color = LEVEL_COLORS.get(record.levelname)
        return f"{colored(record.levelname.lower(), color)}: {text}" if color else text


class _TerminalHandler(logging.StreamHandler):
    """Lines that leave a running tqdm bar whole, on whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(rank: int = 0, file: Path | None = None) -> logging.Logger:
    """The project's logger: to stderr (from other ranks only warnings), and into ``file`` on the main process.

    Debug lines (progress) go into the file and into a pipe, but not onto a terminal, where a bar shows the same.
    """
    for handler in LOGGER.handlers:
        handler.close()
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.DEBUG if rank == 0 else logging.WARNING)
    terminal = _TerminalHandler()
    terminal.setLevel(logging.INFO if sys.stderr.isatty() else logging.DEBUG)
    terminal.setFormatter(_ColoredFormatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    LOGGER.addHandler(terminal)
    if file is not None and rank == 0:
        to_file = logging.FileHandler(file, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(to_file)
    return LOGGER


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of the parts and of nothing else (machine, Python's hash seed, process)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def written_aside(path: str | Path):  # noqa: ANN201  (a context manager over a path)
    """Write a file so that it is whole or not there: yields a temporary path that becomes ``path`` on success.

    Raises:
        UserError: the folder can't be written to, or the disk is full.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{path.name}.*.part"):  # left by a process that was killed while writing
            stale.unlink(missing_ok=True)
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        if aside.exists():
            aside.unlink()


def check_writable(path: str | Path) -> None:
    """Find out before the work whether its result can be written.

    Raises:
        UserError: ``path`` is a folder, or no file can be made beside it.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"can't write {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from error


def run_command(main: Callable[[], None]) -> None:
    """Run an entry point: a user's mistake becomes one line and exit status 2, Ctrl-C becomes status 130.

    A mistake that every process finds before they have joined is told by the main process alone.
    """
    try:
        main()
    except UserError as error:
        if launched_rank() == 0 or dist.is_initialized():
            where = f"[rank {launched_rank()}] " if launched_rank() else ""
            print(f"{where}error: {_last_line(error)}", file=sys.stderr)
        if dist.is_initialized():  # an orderly tear-down would wait for processes that are stuck without this one
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        tear_down_processes()


def _last_line(error: UserError) -> str:
    """A data-loading worker hands over its whole traceback as the message: the user's line is its last."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1].removeprefix("utils.UserError: ").removeprefix("utils.MissingFileError: ")
    return text
