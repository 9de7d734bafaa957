"""What CrossVLT and its rivals have in common."""

from typing import Any

import torch
from torch import nn


class SegmentationNetwork(nn.Module):
    """A network that segments the object that a sentence refers to.

    Subclasses define ``encode_images``, the part of the forward pass that depends only on the image; ``segment``, the
    rest; and ``blocks``, the parts that torch.compile compiles separately.

    Attributes:
        config: arguments of the network's build function, defaults included; saved in checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}

    def forward(
        self,
        images: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        return_similarities: bool | None = None,
    ) -> Any:
        """Segment the object that each sentence refers to.

        Args:
            images: [B, 3, H, W], normalized, in the model's dtype.
            input_ids: [B, N] token ids, [CLS] first, padded with 0.
            attention_mask: [B, N], 1 on tokens and 0 on padding.
            return_similarities: whether to compute the similarity maps of the alignment losses. None: only in training
                mode. Without effect on networks that have none.

        Returns:
            a named tuple with ``mask_logits`` [B, 2, H, W] and ``similarities``, see :class:`CrossVLT.CrossVLTOutput`.

        Raises:
            ValueError: the images are too small.
        """
        return self.segment(
            self.encode_images(images),
            input_ids,
            attention_mask,
            size=images.shape[-2:],
            return_similarities=return_similarities,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable gradient checkpointing in both encoders. The gradients stay the same."""
        for part in self.modules():
            if hasattr(part, "grad_checkpointing"):
                part.grad_checkpointing = enable
