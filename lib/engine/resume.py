"""Which checkpoint a run goes on from: the newest good one, and one that fits the processes there are."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.checkpoint import Checkpoint, read_checkpoint
from lib.engine.checkpoints import LAST, numbered
from lib.errors import UserError
from utils import launched_rank

LOG = logging.getLogger("crossvlt")

# What may change when a run is resumed; everything else is the recipe that the checkpoint was trained by.
CHANGEABLE = {
    "DATA.ROOT", "PRETRAINED.TOKENIZER", "TRAIN.EPOCHS", "TRAIN.STEPS", "OUTPUT_DIR", "LOG_DIR", "MODEL_ID",
    "PRINT_FREQ", "BATCH_SIZE", "WORKERS", "PIN_MEM", "DEVICE", "PRETRAINED.DDP_TRAINED", "TRAIN.ACCUM_STEPS",
    "TRAIN.GLOBAL_BATCH", "TRAIN.COMPILE", "TRAIN.GRAD_CHECKPOINT", "TRAIN.SAVE_STEPS", "TRAIN.SAVE_MINUTES",
    "TRAIN.KEEP",
}  # fmt: skip


def warn_once(text: str) -> None:
    """A warning that every process has, told by one."""
    if launched_rank() == 0:
        LOG.warning(text)


def open_resumed(path: str) -> Checkpoint:
    """The checkpoint of a run to go on with.

    Raises:
        UserError: it has no optimizer state, so that going on would not be going on.
    """
    checkpoint = read_checkpoint(path)
    if not checkpoint.is_resumable:
        raise UserError(
            f"--resume {path}: no optimizer state in it, so the training can't go on where it was; "
            f"start a new one from its weights with --init_from {path}"
        )
    return checkpoint


def find_resumed(resume: str | None, auto_resume: bool, output_dir: str, model_id: str) -> Checkpoint | None:
    """What ``--resume`` or ``--auto_resume`` means; None: a new run begins.

    Raises:
        UserError: the flags contradict each other, or no file of the run's can be read.
    """
    if not auto_resume:
        return open_resumed(resume) if resume else None
    if resume:
        raise UserError("--resume and --auto_resume both say where to go on: give one of them")
    if not model_id:
        raise UserError("--auto_resume needs --model_id: it goes on with the run of that name")
    folder = Path(output_dir, model_id)
    found = newest_good(folder)
    if found is None and ((folder / LAST).exists() or numbered(folder)):
        raise UserError(f"--auto_resume: no checkpoint in {folder} can be read; move them away to begin anew")
    return found


def check_recipe(resumed: Checkpoint, now: dict[str, Any], given: set[str]) -> None:
    """Refuse flags that contradict the recipe of the run that is resumed.

    Args:
        resumed: its checkpoint.
        now: the dotted keys of the configuration.
        given: those of them that a flag or a file sets.
    """
    for key in sorted(given - CHANGEABLE):
        saved, asked = resumed.extra["config"].get(key), now[key]
        if key == "MODEL.WINDOW_SIZE" and asked:  # saved as 0 where the window came from a file's name
            saved = resumed.model_config["window_size"]
        if saved != asked:
            raise UserError(
                f"{resumed.path} goes on with its saved recipe, where {key} is {saved!r}, not {asked!r}: "
                "drop that flag, or start a new run with --init_from"
            )


def check_same(where: list[object]) -> None:
    """Refuse to train where the processes found different checkpoints (``where``: what each of them found)."""
    if any(found != where[0] for found in where):
        raise UserError(f"the processes found different checkpoints ({where}): --output-dir must be one folder for all")


def newest_good(folder: Path, wanted: Callable[[Checkpoint], bool] = lambda checkpoint: True) -> Checkpoint | None:
    """The newest checkpoint of a folder that can be read, can be gone on with, and is wanted; None without one.

    A torn or foreign file is named in a warning, and the one before it is tried.
    """
    last, candidates = folder / LAST, numbered(folder)
    if last.exists() and not any(path.samefile(last) for path in candidates):
        candidates.append(last)  # a copy, or all that is left
    for path in candidates:
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            warn_once(f"{error}; trying the checkpoint before it")
            continue
        if not checkpoint.is_resumable:
            warn_once(f"{path} has no optimizer state to go on with; trying the checkpoint before it")
        elif wanted(checkpoint):
            return checkpoint
    return None


def share_of(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """(processes, batch size, accumulation steps) that a resumable checkpoint was saved under."""
    return tuple(checkpoint.extra["share"])


def for_share(checkpoint: Checkpoint, share: tuple[int, int, int]) -> Checkpoint:
    """The checkpoint itself, or, saved inside an epoch and under another share, the last one that ends an epoch.

    Inside an epoch only the same division of the samples over the same processes can be gone on with exactly.

    Raises:
        UserError: there is none beside it.
    """
    saved = share_of(checkpoint)
    if share == saved:
        return checkpoint
    differs = f"saved by {_told(*saved)}, now {_told(*share)}"
    if checkpoint.extra["epoch_step"] == 0:
        warn_once(f"{checkpoint.path}: {differs}; the epoch to come is divided anew")
        return checkpoint
    step = checkpoint.extra["step"]
    found = newest_good(
        checkpoint.path.parent, lambda other: other.extra["epoch_step"] == 0 and other.extra["step"] <= step
    )
    if found is None:
        raise UserError(
            f"{checkpoint.path} was saved inside an epoch ({differs}), and no checkpoint between two epochs lies "
            "beside it: go on with as many processes, the same --batch-size and --accum-steps"
        )
    warn_once(
        f"{checkpoint.path}: {differs}; going back from step {step} to the end of epoch {found.extra['epoch']}, "
        f"step {found.extra['step']}"
    )
    return found


def _told(processes: int, batch_size: int, accum_steps: int) -> str:
    return f"{processes} process(es) × {batch_size} × {accum_steps} accumulated"
