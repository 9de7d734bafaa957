"""The checkpoints of a run: writing them, deleting old ones, and finding the one to resume from."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lib.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from lib.errors import UserError
from lib.files import atomic_write
from lib.options import OPTIONS
from utils import warn_once

NAME = re.compile(r"step_(\d{8})(_epoch_\d{3,})?\.pth")
LAST, BEST = "last.pth", "best.pth"
Division = tuple[int, int, int]  # of the global batch: processes, batch size, accumulation steps


class CheckpointFolder:
    """Write the checkpoints of a run and delete old ones.

    A resumable checkpoint is named ``step_<step>.pth``, or ``step_<step>_epoch_<epoch>.pth`` at the end of an epoch;
    ``last.pth`` is a hard link to the newest one (a copy if the file system has no links). The ``keep`` newest are
    kept, and also the newest one from the end of an epoch. ``best.pth`` contains weights only.

    Args:
        folder: exists; no other process writes into it.
        keep: at least 1.
        from_step: step of the checkpoint that the run resumes from. Existing checkpoints of later steps are outdated
            or corrupt; they are deleted after the next save.
    """

    def __init__(self, folder: Path, keep: int, from_step: int = 0) -> None:
        self.folder, self.keep, self.from_step = folder, keep, from_step
        self._written: set[Path] = set()

    def save(self, content: dict[str, Any], *, ends_epoch: bool) -> None:
        """Write a resumable checkpoint, then delete those that need not be kept.

        Raises:
            UserError: the disk is full or not writable; earlier checkpoints are unharmed.
        """
        suffix = f"_epoch_{content['epoch']:03d}" if ends_epoch else ""
        path = self.folder / f"step_{content['step']:08d}{suffix}.pth"
        save_checkpoint(path, content)
        self._written.add(path)
        with atomic_write(self.folder / LAST) as temporary:
            try:
                os.link(path, temporary)
            except OSError:  # a file system without hard links
                save_checkpoint(temporary, content)
        self._delete_old()

    def save_best(self, content: dict[str, Any]) -> None:
        """Write the weights with the best validation result so far."""
        save_checkpoint(self.folder / BEST, content)

    def delete_partial_files(self) -> None:
        """Delete temporary files of processes that were killed while writing."""
        for path in self.folder.glob(".*.pth.*.part"):
            path.unlink(missing_ok=True)

    def _delete_old(self) -> None:
        existing = numbered(self.folder)
        valid = [path for path in existing if path in self._written or _step_of(path) <= self.from_step]
        epoch_ends = [path for path in valid if NAME.fullmatch(path.name)[2]]
        for path in set(existing) - set(valid[: self.keep]) - set(epoch_ends[:1]):
            path.unlink(missing_ok=True)


def numbered(folder: Path) -> list[Path]:
    """Return the resumable checkpoints of a folder, newest first, without ``last.pth``."""
    found = [path for path in folder.glob("step_*.pth") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def find_resumed(resume: str | None, auto_resume: bool, output_dir: str, model_id: str) -> Checkpoint | None:
    """Read the checkpoint that ``--resume`` or ``--auto_resume`` refers to; None: a new run starts.

    Raises:
        UserError: the flags conflict, the file has no optimizer state, or no checkpoint of the run is readable.
    """
    if not auto_resume:
        return _read_resumable(resume) if resume else None
    if resume:
        raise UserError("--resume conflicts with --auto_resume. Drop one of them.")
    if not model_id:
        raise UserError("--auto_resume requires --model_id, the name of the run to resume.")
    folder = Path(output_dir, model_id)
    found = newest_usable(folder)
    if found is None and ((folder / LAST).exists() or numbered(folder)):
        raise UserError(
            f"--auto_resume: none of the checkpoints in {folder} is readable. Move them away to start anew."
        )
    return found


def _read_resumable(path: str) -> Checkpoint:
    checkpoint = read_checkpoint(path)
    if not checkpoint.is_resumable:
        raise UserError(
            f"Cannot resume: {path} has no optimizer state. Use --init_from {path} to start a new run from its weights."
        )
    return checkpoint


def newest_usable(folder: Path, condition: Callable[[Checkpoint], bool] = lambda _: True) -> Checkpoint | None:
    """Read the newest checkpoint of a folder that is intact, resumable and meets ``condition``, or None.

    A warning names each file that is skipped because it is corrupt or not resumable.
    """
    for path in _resumable_files(folder):
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            warn_once(f"{error} Trying the previous checkpoint.")
            continue
        if not checkpoint.is_resumable:
            warn_once(f"{path} has no optimizer state. Trying the previous checkpoint.")
        elif condition(checkpoint):
            return checkpoint
    return None


def _resumable_files(folder: Path) -> list[Path]:
    """Return the resumable checkpoints of a folder, newest first, and ``last.pth`` if it is another file."""
    last, files = folder / LAST, numbered(folder)
    if last.exists() and not any(path.samefile(last) for path in files):
        files.append(last)  # a copy, or the only file left
    return files


def read_run_id(folder: Path) -> str | None:
    """Return the id of the run whose resumable checkpoints are in a folder.

    Returns:
        None if no file has an id, because all were written before runs had ids. Corrupt files are ignored.

    Raises:
        UserError: the files are from different runs.
    """
    found: dict[str, Path] = {}
    for path in _resumable_files(folder):
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # reads no tensors
        except Exception:  # torch.load raises many classes for corrupt files, which newest_usable() reports
            continue
        if isinstance(content, dict) and content.get("run_id"):
            found.setdefault(content["run_id"], path)
    if len(found) > 1:
        first, second, *_ = found.values()
        raise UserError(
            f"Cannot resume in {folder}: {first.name} and {second.name} are from different runs. Move the checkpoints "
            "of the other run to another folder."
        )
    return next(iter(found), None)


def check_recipe(resumed: Checkpoint, config: dict[str, Any], given: dict[str, str]) -> None:
    """Raise a UserError if a flag or file changes the recipe of the resumed run.

    Args:
        resumed: the run's checkpoint.
        config: dotted keys of the current configuration.
        given: the file or flag that sets each key, by key; keys with their default value are absent.
    """
    for option in sorted(OPTIONS, key=lambda option: option.key):
        key = option.key
        if option.may_change_on_resume or key not in given:
            continue
        # Runs of older versions have no value for options that did not exist; they all trained CrossVLT.
        saved, current = resumed.extra["config"].get(key, option.default), config[key]
        if key == "MODEL.WINDOW_SIZE" and current:  # saved as 0 if the window was taken from a file name
            saved = resumed.model_config["window_size"]
        if saved != current:
            raise UserError(
                f"Cannot resume {resumed.path} with {given[key]}: {key} is {saved!r} in its recipe, not {current!r}. "
                "Drop that setting, or start a new run with --init_from."
            )


def check_same(found: Sequence[object]) -> None:
    """Raise a UserError if the processes found different checkpoints (``found``: one entry per process)."""
    if any(item != found[0] for item in found):
        raise UserError(
            f"The processes found different checkpoints ({found}). --output-dir must be the same folder for all nodes."
        )


def division_of(checkpoint: Checkpoint) -> Division:
    """Return (processes, batch size, accumulation steps) that a resumable checkpoint was saved with."""
    return tuple(checkpoint.extra["share"])


def match_division(checkpoint: Checkpoint, division: Division) -> Checkpoint:
    """Return ``checkpoint``, or the previous end of an epoch if the batch is divided differently now.

    Within an epoch, a run can continue exactly only with the same number of processes, batch size and accumulation
    steps. Between epochs, any division works.

    Raises:
        UserError: the checkpoint's folder has no checkpoint from the end of an epoch.
    """
    saved = division_of(checkpoint)
    if division == saved:
        return checkpoint
    change = f"saved with {_describe(saved)}, now {_describe(division)}"
    if checkpoint.extra["epoch_step"] == 0:
        warn_once(f"{checkpoint.path}: {change}. The next epoch is divided accordingly.")
        return checkpoint
    step, run_id = checkpoint.extra["step"], checkpoint.extra.get("run_id")

    def is_earlier_epoch_end(other: Checkpoint) -> bool:
        is_same_run = other.extra.get("run_id") in (run_id, None)
        return is_same_run and other.extra["epoch_step"] == 0 and other.extra["step"] <= step

    found = newest_usable(checkpoint.path.parent, is_earlier_epoch_end)
    if found is None:
        raise UserError(
            f"{checkpoint.path} was saved within an epoch ({change}), and its folder has no checkpoint from the end of "
            "an epoch. Resume with the same number of processes, --batch-size and --accum-steps."
        )
    warn_once(
        f"{checkpoint.path}: {change}. Returning from step {step} to the end of epoch {found.extra['epoch']}, "
        f"step {found.extra['step']}."
    )
    return found


def _describe(division: Division) -> str:
    processes, batch_size, accum_steps = division
    return f"{processes} process(es) × {batch_size} × {accum_steps} accumulated"
