"""Validation during training: the whole split after each epoch, and two batches before the first."""

import time

from torch import nn

from data.dataset_refer_bert import ReferDataset
from lib.collector import EvaluationResult
from lib.evaluation import EvalSetup, evaluate
from lib.inference import prepare
from lib.protocols import PAPER
from lib.visualize import spread_indices

NUM_KEPT_MASKS = 4  # predicted masks kept after each epoch, to be drawn
TRIAL_BATCHES = 2  # per process, before the first epoch


def validate(
    model: nn.Module, dataset: ReferDataset, setup: EvalSetup, *, indices: range | None = None
) -> EvaluationResult:
    """Evaluate a model on the validation split under the ``paper`` protocol, in float32, prepared as in test.py.

    Args:
        model: an unwrapped CrossVLT, compiled or not.
        dataset: the validation split.
        setup: processes and resources.
        indices: of the expressions to evaluate (default: all).

    Raises:
        StoppedError: ``setup.stop_requested`` returned True.
    """
    kept = spread_indices(len(dataset), NUM_KEPT_MASKS) if indices is None else ()
    return evaluate(prepare(model), dataset, [PAPER], setup, indices=indices, keep_masks=kept)[PAPER.name]


def time_validation(model: nn.Module, dataset: ReferDataset, setup: EvalSetup) -> float:
    """Validate two batches per process and return the expected seconds for the whole split.

    An error in validation, such as too little memory, then occurs before the first epoch instead of after it.
    """
    count = min(len(dataset), TRIAL_BATCHES * setup.batch_size * setup.dist.world_size)
    started = time.perf_counter()
    validate(model, dataset, setup, indices=range(count))
    return (time.perf_counter() - started) / count * len(dataset)
