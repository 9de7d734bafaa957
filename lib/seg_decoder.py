"""Segmentation decoder: from the features of the four vision stages to two-class logits (paper, section III).

Shapes: B batch size, H×W image size, C channels of the finest feature (embed_dim).
"""

import torch
import torch.nn.functional as F
from torch import nn

from lib.kernels import to_conv_layout


class SegDecoder(nn.Module):
    """Top-down decoder, ``classifier`` in the state dict.

    Three times, it up-samples the features, concatenates those of the next finer stage and applies two 3×3
    convolutions. The layers ``*_4`` merge stages 4 and 3, ``*_3`` add stage 2, ``*_2`` add stage 1. A 1×1 convolution
    returns the logits.

    Args:
        embed_dim: C; the feature of stage i = 0…3 has C·2^i channels, all hidden layers have 4·C.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        hidden = 4 * embed_dim
        self.conv1_4 = nn.Conv2d(8 * embed_dim + 4 * embed_dim, hidden, 3, padding=1, bias=False)
        self.bn1_4 = nn.BatchNorm2d(hidden)
        self.conv2_4 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
        self.bn2_4 = nn.BatchNorm2d(hidden)

        self.conv1_3 = nn.Conv2d(hidden + 2 * embed_dim, hidden, 3, padding=1, bias=False)
        self.bn1_3 = nn.BatchNorm2d(hidden)
        self.conv2_3 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
        self.bn2_3 = nn.BatchNorm2d(hidden)

        self.conv1_2 = nn.Conv2d(hidden + embed_dim, hidden, 3, padding=1, bias=False)
        self.bn1_2 = nn.BatchNorm2d(hidden)
        self.conv2_2 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
        self.bn2_2 = nn.BatchNorm2d(hidden)

        self.conv1_1 = nn.Conv2d(hidden, 2, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Return logits [B, 2, H/4, W/4]; class 1 is the referred object.

        Args:
            features: y1 to y4, one per vision stage, [B, C·2^i, H/2^(i+2), W/2^(i+2)].
        """
        y1, y2, y3, y4 = map(to_conv_layout, features)
        x = _upsample_and_concatenate(y4, y3)  # [B, 8C + 4C, H/16, W/16]
        x = self.relu(self.bn1_4(self.conv1_4(x)))
        x = self.relu(self.bn2_4(self.conv2_4(x)))

        x = _upsample_and_concatenate(x, y2)  # [B, 4C + 2C, H/8, W/8]
        x = self.relu(self.bn1_3(self.conv1_3(x)))
        x = self.relu(self.bn2_3(self.conv2_3(x)))

        x = _upsample_and_concatenate(x, y1)  # [B, 4C + C, H/4, W/4]
        x = self.relu(self.bn1_2(self.conv1_2(x)))
        x = self.relu(self.bn2_2(self.conv2_2(x)))

        return self.conv1_1(x)

    def layer_names(self) -> list[tuple[str, str]]:
        """Return the names of the 3×3 convolutions and of the BatchNorms that follow them, in order."""
        return [(f"conv{i}_{stage}", f"bn{i}_{stage}") for stage in (4, 3, 2) for i in (1, 2)]


def _upsample_and_concatenate(x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """Resize x [B, Cx, h, w] to skip [B, Cs, H, W] and concatenate the channels: [B, Cx + Cs, H, W]."""
    x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=True)
    return torch.cat([x, skip], dim=1)
