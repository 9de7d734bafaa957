"""The folders of a training run: names, locks, and which run they belong to."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from yacs.config import CfgNode

from lib.checkpoint import Checkpoint
from lib.engine.checkpoints import BEST, LAST, numbered, read_run_id
from lib.engine.journal import ENVIRONMENT_FILE, read_run_ids
from lib.errors import UserError
from lib.files import METRICS_FILE
from lib.locks import Lock, check_unlocked, lock

LOG = logging.getLogger("crossvlt")
MAX_NAME_BYTES = 255  # of file systems


def run_folders(cfg: CfgNode) -> tuple[Path, Path]:
    """Return the folders of a run's checkpoints and of its logs.

    Raises:
        UserError: ``--model_id`` is not the name of a folder.
    """
    name = cfg.MODEL_ID
    if Path(name).name != name or name == ".." or "\0" in name:
        raise UserError(f"--model_id {name!r}: must be a plain name, because a folder is named after it.")
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise UserError(f"--model_id {name[:20]}…: the name is too long. Use at most {MAX_NAME_BYTES} bytes.")
    return Path(cfg.OUTPUT_DIR, name), Path(cfg.LOG_DIR, name)


def check_not_running(cfg: CfgNode) -> None:
    """Raise a UserError that names the process which is training the configured run now, if there is one."""
    for folder in run_folders(cfg):
        check_unlocked(*_lock_arguments(folder))


def _lock_arguments(folder: Path) -> tuple[Path, str, str]:
    """Return the arguments of :func:`lib.locks.lock` for a folder of a run."""
    advice = "Wait until it has ended, stop it, or choose another --model_id."
    return folder / ".lock", f"Another training is writing {folder}", advice


@contextmanager
def lock_folder(folder: Path, flag: str) -> Iterator[Lock]:
    """Create and lock a folder of a run; ``flag`` sets its location."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot create the folder {folder}: {error.strerror}. Choose another {flag}.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"Cannot write into the folder {folder}. Choose another {flag}.")
    with lock(*_lock_arguments(folder)) as held:
        yield held


def continues_in(folder: Path, resumed: Checkpoint | None) -> bool:
    """Return whether a run resumes from a checkpoint of its own folder."""
    return resumed is not None and resumed.path.resolve().parent == folder.resolve()


def check_logs(logs: Path, run_id: str, *, is_new: bool) -> None:
    """Raise a UserError if a locked folder contains the logs of another run, which this run would shorten.

    Args:
        logs: the folder of the run's logs.
        run_id: of this run.
        is_new: whether the run has just begun, so that no log can be its own.
    """
    metrics = logs / METRICS_FILE
    if not metrics.exists() or metrics.stat().st_size == 0:
        return
    if is_new or read_run_ids(logs / ENVIRONMENT_FILE)[-1:] not in ([], [run_id]):
        raise UserError(f"{metrics} is from another run. Choose another --model_id or --log_dir, or move it away.")


def find_run_id(folder: Path, resumed: Checkpoint | None) -> str:
    """Return the id of the run that continues in a locked folder, or the id of a new run.

    Args:
        folder: of the run's checkpoints.
        resumed: the checkpoint that the run resumes from. If it is in another folder, a new run starts.

    Raises:
        UserError: the folder contains another run.
    """
    if continues_in(folder, resumed):
        if "run_id" not in resumed.extra:
            LOG.warning("%s has no run id (older version), so it may be from another run", resumed.path)
        return read_run_id(folder) or secrets.token_hex(8)
    if (folder / LAST).exists() or numbered(folder):
        raise UserError(
            f"{folder} already contains a run. Choose another --model_id, or resume that run with --auto_resume."
        )
    if (folder / BEST).exists():
        raise UserError(f"{folder / BEST} is from another run. Choose another --model_id, or move it away.")
    return secrets.token_hex(8)
