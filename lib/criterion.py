"""Training loss: cross-entropy of the mask, and alignment of pixels and sentence at each stage (paper, section III).

Shapes: B batch size, H×W image size, h×w size of a stage's map.
"""

import torch
import torch.nn.functional as F
from torch import nn

from CrossVLT import CrossVLTOutput


class CrossVLTCriterion(nn.Module):
    """Published loss: 2 · cross-entropy + sum of the alignment terms of the four stages.

    Args:
        alignment: whether the loss has the alignment terms. False is an ablation of the paper, and necessary for
            networks without similarity maps.
        segmentation_weight: factor of the cross-entropy; 1 in LAVT.
        class_weights: weights of background and object in the cross-entropy.
    """

    def __init__(
        self, alignment: bool = True, segmentation_weight: float = 2.0, class_weights: tuple[float, float] = (0.9, 1.1)
    ) -> None:
        super().__init__()
        self.alignment = alignment
        self.segmentation_weight = segmentation_weight
        self.class_weights = class_weights

    def forward(
        self, output: CrossVLTOutput, masks: torch.Tensor, normalizer: float | None = None
    ) -> dict[str, torch.Tensor]:
        """Compute the loss and its terms, in float32 or float64.

        Args:
            output: output of the network, with similarity maps if ``alignment`` is on.
            masks: target masks, int64 [B, H, W] of 0 and 1.
            normalizer: divisor of the summed cross-entropy. None: :meth:`weight_sum` of ``masks`` (published).

        Returns:
            ``loss``: scalar. ``segmentation``: scalar, the cross-entropy without its factor. ``alignment``: one term
            per stage, [4], or [0] if alignment is off.

        Raises:
            ValueError: the shapes do not fit, or alignment is on and the output has no similarity maps.
        """
        logits = _at_least_float32(output.mask_logits)
        if masks.shape != (logits.shape[0], *logits.shape[2:]):
            raise ValueError(f"Masks of shape {tuple(masks.shape)} do not fit logits of shape {tuple(logits.shape)}.")
        # Created on the device, because copying it would wait for the device.
        weight = torch.stack([logits.new_full((), weight) for weight in self.class_weights])
        if normalizer is None:
            segmentation = F.cross_entropy(logits, masks, weight=weight)
        else:
            segmentation = F.cross_entropy(logits, masks, weight=weight, reduction="sum") / normalizer
        alignment = logits.new_zeros(0)
        if self.alignment:
            if output.similarities is None:
                raise ValueError(
                    "The alignment loss needs similarity maps: call the model with return_similarities=True."
                )
            alignment = torch.stack([alignment_loss(similarity, masks) for similarity in output.similarities])
        loss = self.segmentation_weight * segmentation + alignment.sum()
        return {"loss": loss, "segmentation": segmentation, "alignment": alignment}

    def weight_sum(self, *masks: torch.Tensor) -> float:
        """Return the sum of the class weights of all pixels of batches of masks [B, H, W], the cross-entropy's divisor.

        The device is read once.
        """
        background, foreground = self.class_weights
        areas = torch.stack([batch.sum() for batch in masks]).tolist()
        return sum(
            background * (batch.numel() - area) + foreground * area for batch, area in zip(masks, areas, strict=True)
        )


def alignment_loss(similarity: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return the mean binary cross-entropy of a stage's similarity map [B, 1, h, w], resized to masks [B, H, W]."""
    similarity = F.interpolate(_at_least_float32(similarity), size=masks.shape[1:], mode="bilinear", align_corners=True)
    return F.binary_cross_entropy_with_logits(similarity[:, 0], masks.to(similarity))


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
