"""The learning signal: weighted cross-entropy on the mask and, per stage, alignment of pixels with the sentence."""

import torch
import torch.nn.functional as F
from torch import nn


class CrossVLTCriterion(nn.Module):
    """Loss = 2·CE + Σ of the four alignment terms (spec of the published recipe; paper, section III).

    Args:
        alignment: False trains by the mask alone (the paper's ablation).
        segmentation_weight: factor of the cross-entropy.
        class_weights: of background and object in the cross-entropy.
    """

    def __init__(
        self, alignment: bool = True, segmentation_weight: float = 2.0, class_weights: tuple[float, float] = (0.9, 1.1)
    ) -> None:
        super().__init__()
        self.alignment = alignment
        self.segmentation_weight = segmentation_weight
        self.class_weights = class_weights

    def weight_sum(self, masks: torch.Tensor) -> float:
        """Sum of the class weights over all pixels of masks [B, H, W]: what the cross-entropy is divided by."""
        pixels, foreground = masks.numel(), int(masks.sum())
        return self.class_weights[0] * (pixels - foreground) + self.class_weights[1] * foreground

    def forward(
        self,
        output: "CrossVLTOutput",  # noqa: F821
        masks: torch.Tensor,
        normalizer: float | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compare the network's output with the true masks.

        Args:
            output: ``mask_logits`` [B, 2, H, W] and, where alignment is on, ``similarities``: maps [B, 1, h, w].
            masks: int64 [B, H, W] of 0 and 1.
            normalizer: what the weighted cross-entropies' sum is divided by; None: by these masks' own
                :meth:`weight_sum` (published).

        Returns:
            ``loss``; ``segmentation``: the cross-entropy before its factor; ``alignment``: one term per stage [4]
            (empty where alignment is off). At least float32, whatever the network computes in.

        Raises:
            ValueError: shapes don't fit, or alignment is on and the output has no similarity maps.
        """
        logits = _at_least_float32(output.mask_logits)
        if masks.shape != (logits.shape[0], *logits.shape[2:]):
            raise ValueError(f"masks of shape {tuple(masks.shape)} don't fit logits of shape {tuple(logits.shape)}")
        weight = logits.new_tensor(self.class_weights)
        if normalizer is None:
            segmentation = F.cross_entropy(logits, masks, weight=weight)
        else:
            segmentation = F.cross_entropy(logits, masks, weight=weight, reduction="sum") / normalizer
        alignment = logits.new_zeros(0)
        if self.alignment:
            if output.similarities is None:
                raise ValueError(
                    "the alignment loss needs similarity maps: call the model with return_similarities=True"
                )
            alignment = torch.stack([_alignment_term(similarity, masks) for similarity in output.similarities])
        loss = self.segmentation_weight * segmentation + alignment.sum()
        return {"loss": loss, "segmentation": segmentation, "alignment": alignment}


def _alignment_term(similarity: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """BCE of a similarity map [B, 1, h, w], brought to the masks' size, with the masks: a plain mean over pixels."""
    similarity = F.interpolate(_at_least_float32(similarity), size=masks.shape[1:], mode="bilinear", align_corners=True)
    return F.binary_cross_entropy_with_logits(similarity[:, 0], masks.to(similarity))


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
