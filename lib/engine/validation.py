"""The validation of a training: the whole split after each epoch, two batches before the first."""

import contextlib
import logging
import time
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, Subset

from lib.evaluation import Batch, EvaluationResult, evaluate
from lib.visualize import result_panel

LOG = logging.getLogger("crossvlt")
DRAWN = 4  # expressions whose masks are drawn after each epoch


class Validation:
    """Judges models on the validation split.

    Args:
        dataset: the split, a ReferDataset.
        make_batches: gives this process's share of a dataset's batches, on the model's device.
        looked_at: how many expressions :meth:`look_ahead` judges: two batches of every process.
        title: of the progress bar; None: no bar here.
        stop_asked: see :func:`evaluate`.
        compiled: whether the model's blocks are. Here they run uncompiled: compiling them once more for this would take
            minutes, and so the numbers are test.py's.
    """

    def __init__(
        self,
        dataset: Any,
        make_batches: Callable[[Dataset], Collection[Batch]],
        *,
        looked_at: int,
        title: str | None,
        stop_asked: Callable[[], bool],
        compiled: bool,
    ) -> None:
        self.dataset, self.make_batches, self.title = dataset, make_batches, title
        self.looked_at, self.stop_asked, self.compiled = min(looked_at, len(dataset)), stop_asked, compiled
        self.drawn = set(np.linspace(0, len(dataset) - 1, min(DRAWN, len(dataset))).astype(int).tolist())

    def __call__(self, model: nn.Module) -> EvaluationResult:
        return self._judge(model, self.dataset, keep_masks=self.drawn, progress=self.title)

    def look_ahead(self, model: nn.Module) -> float:
        """Judge two batches; gives back the seconds that the whole split will take.

        Better to stumble over it at once than after an epoch.
        """
        started = time.perf_counter()
        self._judge(model, Subset(self.dataset, range(self.looked_at)))
        return (time.perf_counter() - started) / self.looked_at * len(self.dataset)

    def draw(self, result: EvaluationResult) -> dict[str, Image.Image]:
        """Pictures of some results, by name."""
        masks = enumerate(sorted(result.masks))
        return {f"val/{number}": result_panel(self.dataset, result, index) for number, index in masks}

    def _judge(self, model: nn.Module, dataset: Dataset, **how: Any) -> EvaluationResult:
        with torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext():
            return evaluate(
                model,
                self.make_batches(dataset),
                num_expressions=len(dataset),
                log=LOG.debug,
                stop_asked=self.stop_asked,
                **how,
            )
