"""The validation of a training: the whole split after each epoch, two batches before the first."""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from lib.evaluation import Batch, EvaluationResult, evaluate
from lib.protocols import PAPER
from lib.report.figures import Judged, result_panel, spread

LOG = logging.getLogger("crossvlt")
DRAWN = 4  # expressions whose masks are drawn after each epoch


class Validation:
    """Judges models on the validation split.

    Args:
        dataset: the split, a ReferDataset.
        make_batches: gives this process's share of the batches of some of its expressions, on the model's device.
        batch_size: the most expressions of a forward pass.
        looked_at: how many expressions :meth:`look_ahead` judges: about two batches of every process.
        title: of the progress bar; None: no bar here.
        stop_requested, group: see :func:`evaluate`.
        compiled: whether the model's blocks are. Here they run uncompiled: compiling them once more for this would take
            minutes, and so the numbers are test.py's.
    """

    def __init__(
        self,
        dataset: Any,
        make_batches: Callable[[Iterable[int]], Collection[Batch]],
        *,
        batch_size: int,
        looked_at: int,
        title: str | None,
        stop_requested: Callable[[], bool],
        group: dist.ProcessGroup | None,
        compiled: bool,
    ) -> None:
        self.dataset, self.make_batches, self.title = dataset, make_batches, title
        self.batch_size, self.looked_at, self.compiled = batch_size, min(looked_at, len(dataset)), compiled
        self.stop_requested, self.group = stop_requested, group
        self.drawn = spread(len(dataset), DRAWN)

    def __call__(self, model: nn.Module) -> EvaluationResult:
        return self._judge(model, range(len(self.dataset)), keep_masks=self.drawn, progress=self.title)

    def look_ahead(self, model: nn.Module) -> float:
        """Judge a few batches; gives back the seconds that the whole split will take.

        Better to stumble over it at once than after an epoch.
        """
        started = time.perf_counter()
        self._judge(model, range(self.looked_at))
        return (time.perf_counter() - started) / self.looked_at * len(self.dataset)

    def draw(self, result: EvaluationResult) -> dict[str, Image.Image]:
        """Pictures of some results, by name."""
        judged = [Judged("prediction", self.dataset, result)]
        return {f"val/{number}": result_panel(judged, index) for number, index in enumerate(sorted(result.masks))}

    def _judge(self, model: nn.Module, indices: range, **how: Any) -> EvaluationResult:
        with torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext():
            results = evaluate(
                model,
                self.make_batches(indices),
                indices=indices,
                batch_size=self.batch_size,
                log=LOG.debug,
                stop_requested=self.stop_requested,
                group=self.group,
                **how,
            )
        return results[PAPER.name]
