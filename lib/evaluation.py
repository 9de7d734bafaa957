"""Evaluate a model on a split, during training and in test.py, and turn logits into masks.

Shapes: B expressions, N tokens, S the model's image size, H×W the size at which masks are compared.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.dataset_refer_bert import ReferDataset
from data.loaders import Batch, build_eval_batches
from lib.cli import message_of
from lib.collector import Collector, EvaluationResult, ExpressionResult, ProgressBar, ResultSink
from lib.errors import LostWorkerError, StoppedError, UserError
from lib.metrics import intersection_and_union
from lib.protocols import PAPER, Protocol
from refer.masks import encode_mask
from utils import Distributed, gather

GATHER_BITS = 0x8040201008040201 - 2**64  # multiplier of _pack_bits, as a signed number


@dataclass(frozen=True)
class EvalSetup:
    """Processes and resources of an evaluation. They change results only by rounding.

    Args:
        dist: rank, number of processes and device.
        batch_size: expressions per forward pass.
        workers: data-loading processes per process.
        pin_memory: use page-locked memory.
        stop_requested: called before each batch on all processes; must return the same value on all of them.
    """

    dist: Distributed
    batch_size: int
    workers: int = 0
    pin_memory: bool = False
    stop_requested: Callable[[], bool] = lambda: False


def evaluate(
    model: nn.Module,
    dataset: ReferDataset,
    protocols: Sequence[Protocol],
    setup: EvalSetup,
    *,
    indices: Iterable[int] | None = None,
    keep_masks: Collection[int] = (),
    sink: ResultSink | None = None,
) -> dict[str, EvaluationResult]:
    """Evaluate every expression of a split exactly once, independent of the number of processes.

    All protocols use the same logits. The part of the model that depends only on the image runs once per image.

    Args:
        model: an unwrapped CrossVLT; its training mode is restored afterwards.
        dataset: the split, one sample per sentence.
        protocols: at least one.
        setup: processes and resources.
        indices: the expressions to evaluate (default: all).
        keep_masks: the expressions whose predicted masks are returned, for the first protocol.
        sink: receives the new results about once a minute. Results that it already has are not computed again.

    Returns:
        results by protocol name, the same on every process.

    Raises:
        StoppedError: ``setup.stop_requested`` returned True.
        CommonError: an image cannot be read, logits are not finite, or a batch does not fit into the GPU's memory.
            In both cases, ``sink`` has all results computed so far.
        UserError: ``sink`` cannot write.
        RuntimeError: an expression was evaluated twice or not at all.
    """
    selected = np.arange(len(dataset)) if indices is None else np.unique(np.fromiter(indices, np.int64))
    collector = Collector(dataset, selected, protocols, keep_masks, sink)
    batches = build_eval_batches(
        dataset,
        setup.dist.device,
        batch_size=setup.batch_size,
        workers=setup.workers,
        pin_memory=setup.pin_memory,
        rank=setup.dist.rank,
        world_size=setup.dist.world_size,
        targets=[protocol.target_key for protocol in protocols],
        indices=selected,
        evaluated=collector.complete_indices(),
    )
    progress = ProgressBar(dataset.split, collector, show=setup.dist.is_main)
    was_training = model.training
    model.eval()
    try:
        iterator = iter(batches)
        for _ in range(max(gather(len(batches)))):  # equally often on all processes
            if setup.stop_requested():
                collector.exchange()
                hint = f" {sink.resume_hint}" if sink else ""
                raise StoppedError(f"Stopped while evaluating split {dataset.split}.{hint}")
            new, failure = [], ""
            try:
                batch = next(iterator, None)
                if batch:
                    new = _evaluate_batch(model, batch, dataset, protocols, setup.batch_size, collector.needs_mask)
            except LostWorkerError:
                raise
            except UserError as error:
                failure = message_of(error)
            except torch.OutOfMemoryError:
                failure = f"{setup.batch_size} expressions do not fit into the GPU's memory. Lower --batch-size."
            progress.update(*collector.add(new, failure))
        collector.exchange()
    finally:
        progress.close()
        model.train(was_training)
    return collector.results()


@torch.inference_mode()
def _evaluate_batch(
    model: nn.Module,
    batch: Batch,
    dataset: ReferDataset,
    protocols: Sequence[Protocol],
    batch_size: int,
    needs_mask: Callable[[int], bool],
) -> list[ExpressionResult]:
    """Return the results of a batch of images, with at most ``batch_size`` expressions per forward pass.

    The device is read once for the numbers of the whole batch, and once more if masks are needed.

    Raises:
        UserError: the logits of an expression are inf or nan.
    """
    indices, objects = batch["index"].tolist(), batch["object_index"].tolist()
    needed = [needs_mask(index) for index in indices]
    keys: list[tuple[int, str, bool]] = []  # index, protocol and whether its mask is needed, for each row of counts
    finite, counts, masks = [], [], []  # on the device
    encoded = model.encode_images(batch["image"])
    for start in range(0, len(indices), batch_size):
        rows = slice(start, start + batch_size)
        logits = model.segment(
            encoded[batch["image_index"][rows]],
            batch["input_ids"][rows],
            batch["attention_mask"][rows],
            size=batch["image"].shape[-2:],
        ).mask_logits
        finite.append(logits.flatten(1).isfinite().all(1))
        for protocol in protocols:
            targets = [batch["targets"][protocol.target_key][k] for k in objects[rows]]
            if protocol.eval_size == "resized":
                pairs = [(logits, torch.stack(targets))]
            else:  # every image has its own size
                pairs = [(logits[i : i + 1], target[None]) for i, target in enumerate(targets)]
            for part, target in pairs:
                predicted = logits_to_masks(part, target.shape[-2:], protocol)
                counts.append(torch.stack(intersection_and_union(predicted, target), dim=1))
                masks += predicted
            keys += [(index, protocol.name, need) for index, need in zip(indices[rows], needed[rows], strict=True)]
    numbers = torch.cat([torch.cat(finite), torch.cat(counts).flatten()]).tolist()
    flags, counts = numbers[: len(indices)], numbers[len(indices) :]
    _check_finite(flags, dataset, indices)
    fetched = fetch_masks([mask for mask, (_, _, need) in zip(masks, keys, strict=True) if need])
    return [
        ExpressionResult(index, name, intersection, union, encode_mask(next(fetched)) if need else None)
        for (index, name, need), intersection, union in zip(keys, counts[::2], counts[1::2], strict=True)
    ]


def _check_finite(finite: Sequence[int], dataset: ReferDataset, indices: Sequence[int]) -> None:
    """Raise a UserError that names the first expression whose logits are inf or nan (0 in ``finite``)."""
    if not all(finite):
        index = indices[finite.index(0)]
        expression = dataset.expressions[index]
        raise UserError(
            f"The logits of expression {index} of split {dataset.split} are inf or nan (sent_id {expression.sent_id}, "
            f"{expression.sentence!r}). The weights are damaged, or training diverged: use an earlier checkpoint."
        )


def fetch_masks(masks: Sequence[torch.Tensor]) -> Iterator[np.ndarray]:
    """Copy masks, bool [H, W] of any sizes, from their device at once, eight pixels per byte. Yield uint8 [H, W]."""
    if not masks:
        return
    packed = [_pack_bits(mask.flatten()) for mask in masks]
    parts = np.split(torch.cat(packed).cpu().numpy(), np.cumsum([len(part) for part in packed])[:-1])
    for mask, part in zip(masks, parts, strict=True):
        H, W = mask.shape
        yield np.unpackbits(part, count=H * W).reshape(H, W)


def _pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Pack bool [n] into uint8 [⌈n/8⌉], the first of eight values into the highest bit, as np.packbits does."""
    octets = F.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(torch.int64)
    # Of eight bytes 0 or 1, the product has byte i as bit 63 - i. No two of its terms meet, so nothing is carried.
    return (octets * GATHER_BITS >> 56).to(torch.uint8)


def logits_to_masks(logits: torch.Tensor, size: Sequence[int], protocol: Protocol = PAPER) -> torch.Tensor:
    """Turn logits [B, 2, h, w] into masks, bool [B, H, W].

    Args:
        logits: of background and object.
        size: (H, W) of the masks. Logits of another size are resized first (bilinear).
        protocol: defines the threshold.
    """
    logits = resize_logits(logits, size)
    if protocol.threshold is None:
        return logits.argmax(1).bool()
    return logits.softmax(1)[:, 1] >= protocol.threshold


def resize_logits(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize logits [B, 2, h, w] to [B, 2, H, W] (bilinear)."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


@torch.inference_mode()
def alignment_maps(
    model: nn.Module, images: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> list[list[np.ndarray]]:
    """Return cosine similarities of pixels and sentence: for each sentence and stage, a float32 map [h, w] in [−1, 1].

    Args:
        model: a CrossVLT in eval mode.
        images: [B, 3, S, S], preprocessed, on any device.
        input_ids, attention_mask: [B, N].
    """
    device = model.temp.device
    inputs = (x.to(device) for x in (images, input_ids, attention_mask))
    similarities = model(*inputs, return_similarities=True).similarities
    cosines = [stage[:, 0] * temperature for stage, temperature in zip(similarities, model.temp, strict=True)]
    stages = [stage.float().cpu().numpy() for stage in cosines]
    return [[stage[b] for stage in stages] for b in range(len(images))]
