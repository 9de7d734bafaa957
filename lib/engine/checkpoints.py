"""The checkpoints that a run writes into its folder, and which of them stay."""

import os
import re
from pathlib import Path
from typing import Any

from lib.checkpoint import save_checkpoint
from lib.files import atomic_write

NAME = re.compile(r"step_(\d{8})(_epoch_\d{3,})?\.pth")
LAST, BEST = "last.pth", "best.pth"


class CheckpointFolder:
    """Writes a run's checkpoints and keeps the newest.

    A resumable checkpoint is ``step_<step>.pth``, at the end of an epoch ``step_<step>_epoch_<epoch>.pth``, and
    ``last.pth`` is the newest one under a second name (a hard link, where there are such). The ``keep`` newest
    stay, and the newest that ends an epoch. ``best.pth`` holds weights alone.

    Args:
        folder: exists, and is written to by this process alone.
        keep: at least 1.
        from_step: that the run goes on from. What is there of later steps is dropped with the next checkpoint: it is
            torn, or was gone back behind.
    """

    def __init__(self, folder: Path, keep: int, from_step: int = 0) -> None:
        self.folder, self.keep, self.from_step = folder, keep, from_step
        self._written: set[Path] = set()

    def save(self, content: dict[str, Any], *, ends_epoch: bool) -> None:
        """Write a resumable checkpoint and drop those that are no longer kept.

        Raises:
            UserError: the disk is full or can't be written to; what was saved before is still there.
        """
        ending = f"_epoch_{content['epoch']:03d}" if ends_epoch else ""
        path = self.folder / f"step_{content['step']:08d}{ending}.pth"
        save_checkpoint(path, content)
        self._written.add(path)
        with atomic_write(self.folder / LAST) as aside:
            try:
                os.link(path, aside)
            except OSError:  # a file system without links
                save_checkpoint(aside, content)
        self._drop_old()

    def save_best(self, content: dict[str, Any]) -> None:
        """Write the weights that scored best so far."""
        save_checkpoint(self.folder / BEST, content)

    def clean(self) -> None:
        """Remove what processes left that were killed while writing."""
        for stale in self.folder.glob(".*.pth.*.part"):
            stale.unlink(missing_ok=True)

    def _drop_old(self) -> None:
        ours = numbered(self.folder)
        kept = [path for path in ours if path in self._written or _step_of(path) <= self.from_step]
        ends = [path for path in kept if NAME.fullmatch(path.name)[2]]
        for path in set(ours) - set(kept[: self.keep]) - set(ends[:1]):
            path.unlink(missing_ok=True)


def numbered(folder: Path) -> list[Path]:
    """The resumable checkpoints of a folder but for ``last.pth``, newest first."""
    found = [path for path in folder.glob("step_*.pth") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])
