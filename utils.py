"""What every room shares: errors a user can cause, processes, logging, seeding, safe writing."""

import gc
import hashlib
import logging
import os
import re
import select
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from termcolor import colored
from torch.distributed.rendezvous import rendezvous

LOGGER = logging.getLogger("crossvlt")
LEVEL_COLORS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}
EXIT_MISTAKE = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal with everything saved, start it again
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141  # as a shell shows a program that wrote into a closed pipe


class UserError(ValueError):
    """A mistake of the user's (a flag, a file, an annotation), told in one line that says what to do."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder the user has to provide is not there."""


class StoppedError(Exception):
    """A signal asked this program to end, and what it had done is saved."""


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


def launched_world_size() -> int:
    """How many processes the launcher has started, 1 without one; known before anything is set up."""
    return int(os.environ.get("WORLD_SIZE", 1))


def set_up_processes(device: str = "auto", *, tf32: bool = False) -> Processes:
    """Join the processes a launcher (torchrun, torch.distributed.launch) has started, or be the only one.

    Args:
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or, for a single process, ``cuda:N``.
        tf32: let a GPU round the factors of float32 products to TF32: faster, and off by more than the golden
            numbers allow.

    Raises:
        UserError: the device isn't there, or there are more processes than GPUs.
    """
    world_size = launched_world_size()
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
        torch.backends.cudnn.allow_tf32 = tf32  # PyTorch's own default is True here, and False for products
        torch.backends.cuda.matmul.allow_tf32 = tf32
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
        store, rank, world_size = next(rendezvous("env://"))
        # torchrun --max-restarts keeps one store: what the processes before wrote there would be taken for these ones'.
        store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        device_id = chosen if backend == "nccl" else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=device_id)
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
        sys.exit(EXIT_MISTAKE)
    return result


def attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """A result, or why there is none on some process: the same decision on all of them."""
    result, reason = None, ""
    try:
        result = function()
    except UserError as error:
        reason = str(error)
    return result, next(filter(None, gather(reason)), "")


def agree(values: list[float], group: dist.ProcessGroup | None = None) -> list[float]:
    """The sums of every process's values, in float64, the same on every process.

    Args:
        values: as many on every process.
        group: processes joined by gloo (see :func:`cpu_group`): nothing on a GPU is waited for.
    """
    if not dist.is_initialized():
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums, group=group)
    return sums.tolist()


def cpu_group() -> dist.ProcessGroup | None:
    """A group of all processes that exchanges numbers on the CPU, whatever the gradients go through."""
    if not dist.is_initialized() or dist.get_backend() == "gloo":
        return None
    return dist.new_group(backend="gloo")


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


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """On a full disk the log stops; what needs the disk more says so itself."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


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
        to_file = _LogFile(file, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(to_file)
    return LOGGER


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of the parts and of nothing else (machine, Python's hash seed, process)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def file_sha256(path: str | Path) -> str:
    """What tells one file's content from any other's, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def paused_collector() -> Iterator[None]:
    """Keep Python from looking for garbage again and again among millions of new records: that is half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def writing(path: str | Path):  # noqa: ANN201  (a context manager)
    """What keeps ``path`` from being written, such as a full disk, as a UserError that names it."""
    try:
        yield
    except UserError:  # some are OSErrors too
        raise
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from error


@contextmanager
def written_aside(path: str | Path):  # noqa: ANN201  (a context manager over a path)
    """Write a file so that it is whole or not there: yields a temporary path that becomes ``path`` on success.

    Raises:
        UserError: the folder can't be written to, or the disk is full.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for stale in path.parent.glob(f".{path.name}.*.part"):  # left by a process that was killed while writing
                stale.unlink(missing_ok=True)
            yield aside
            sync(aside)
            os.replace(aside, path)
            sync(path.parent)  # else a power failure could still take the name back
    finally:
        if aside.exists():
            aside.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8), whole or not at all. UserError: it can't be written."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until the disk has a file, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: str | Path, *, suffix: str = "", inputs: Iterable[str | Path] = ()) -> None:
    """Find out before the work whether its result can be written.

    suffix: what its name must end in; inputs: files and folders that are read, of which nothing is overwritten.

    Raises: UserError: ``path`` is a folder or an input, ends otherwise, or no file can be made beside it.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"can't write {path}: it is a folder")
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"can't write {path}: must end in {suffix}")
    if path.exists() and any(path.resolve().is_relative_to(Path(one).resolve()) for one in inputs):
        raise UserError(f"can't write {path}: it is one of the files that are read")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def run_command(main: Callable[[], None]) -> None:
    """Run an entry point; what ends it becomes an exit status, and a user's mistake one line.

    Statuses: 0; 1 a bug, with its traceback, or another process that died; 2 (``EXIT_MISTAKE``) a user's mistake;
    75 (``EXIT_STOPPED``) stopped by a signal with everything saved; 130 Ctrl-C where there was nothing to save; 141
    nobody reads what is printed any more.
    A mistake that every process finds before they have joined is told by one process of each node.
    """
    status = 0
    where = f"[rank {launched_rank()}] " if launched_rank() else ""
    try:
        main()
        sys.stdout.flush()  # else what can't be printed is found when nobody is there to tell
    except UserError as error:
        status = EXIT_MISTAKE
        # Before they have joined, all processes of a node find the same.
        if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0" or dist.is_initialized():
            _tell(f"{where}error: {_last_line(error)}")
    except StoppedError as error:
        status = EXIT_STOPPED
        if launched_rank() == 0:
            _tell(str(error))
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
        _tell("interrupted")
    except SystemExit as leaving:  # another process tells why, or --help was asked for
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except Exception as error:
        unread = isinstance(error, BrokenPipeError) and _is_unread()
        if not dist.is_initialized() and not unread:
            raise
        status = EXIT_PIPE if unread else 1
        if unread:
            pass
        elif is_lost_process(error):
            _tell(f"{where}ended, because another process ended first: its error is the one to read")
        else:
            _tell("".join(f"{where}{line}" for line in traceback.format_exc().splitlines(True)))
    if status not in (0, EXIT_STOPPED) and dist.is_initialized():
        # An orderly tear-down would wait for processes that are stuck without this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    tear_down_processes()
    if status:
        sys.exit(status)


def _is_unread() -> bool:
    """Whether it is stdout that nobody reads any more, as after ``… | head``; then it is closed quietly."""
    look = select.poll()
    look.register(sys.stdout.fileno(), 0)  # errors are told unasked
    if not any(event & select.POLLERR for _, event in look.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
    return True


def _tell(text: str) -> None:
    """Say why a run ends, on stderr and in its log."""
    print(text, file=sys.stderr)
    for handler in LOGGER.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(LOGGER.makeRecord(LOGGER.name, logging.ERROR, "", 0, text.rstrip(), (), None))


def is_lost_process(error: Exception) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and re.search(r"gloo|[Cc]onnection (closed|reset)", str(error)) is not None
    )


def _last_line(error: UserError) -> str:
    """A data-loading worker hands over its whole traceback as the message: the user's line is its last."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1].removeprefix("utils.UserError: ").removeprefix("utils.MissingFileError: ")
    return text
