"""What several test files share."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))  # helper modules beside the tests, such as golden_cases

SMALL = {
    "embed_dim": 32,
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 4, 8),
    "window_size": 4,
    "text_dim": 32,
    "text_layers": 1,
    "text_heads": 2,
    "vocab_size": 60,
    "align_dim": 16,
}


@pytest.fixture
def small_model():
    """Build a small CrossVLT: ``small_model(fusion=…)``."""
    from CrossVLT import build_crossvlt

    def build(**changes):
        torch.manual_seed(0)
        return build_crossvlt("tiny", **{**SMALL, **changes})

    return build


@pytest.fixture
def small_inputs():
    """Pictures, ids, text mask and object masks for a small model: ``small_inputs(batch, height, width)``."""

    def make(batch=2, height=64, width=64, tokens=7, dtype=torch.float32):
        source = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, height, width, generator=source).to(dtype)
        attention_mask = (torch.arange(tokens) < torch.randint(3, tokens + 1, (batch, 1), generator=source)).long()
        input_ids = torch.randint(1, SMALL["vocab_size"], (batch, tokens), generator=source) * attention_mask
        masks = (torch.rand(batch, height, width, generator=source) < 0.3).long()
        return images, input_ids, attention_mask, masks

    return make
