"""The decoder: from the four stages' features to two-class logits (``classifier`` in the state dict)."""

import torch
import torch.nn.functional as F
from torch import nn


class SegDecoder(nn.Module):
    """Top-down: up-sample, concatenate the next finer feature, two 3×3 convolutions, three times; then a 1×1.

    Args:
        embed_dim: channels C0 of the finest feature; feature i has C0·2^i, the hidden width is 4·C0.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        hidden = 4 * embed_dim
        running = 8 * embed_dim
        for level, skip in ((4, 4 * embed_dim), (3, 2 * embed_dim), (2, embed_dim)):
            for k, width in ((1, running + skip), (2, hidden)):
                self.add_module(f"conv{k}_{level}", nn.Conv2d(width, hidden, 3, padding=1, bias=False))
                self.add_module(f"bn{k}_{level}", nn.BatchNorm2d(hidden))
            running = hidden
        self.conv1_1 = nn.Conv2d(hidden, 2, 1)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """features y1…y4, each [B, C0·2^i, H/2^(i+2), W/2^(i+2)] → logits [B, 2, H/4, W/4]; class 1 is the object."""
        y1, y2, y3, y4 = features
        x = y4
        for level, skip in ((4, y3), (3, y2), (2, y1)):
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=True)
            x = torch.cat([x, skip], dim=1)
            for k in (1, 2):
                x = getattr(self, f"conv{k}_{level}")(x)
                x = F.relu(getattr(self, f"bn{k}_{level}")(x))
        return self.conv1_1(x)
