"""The language encoder in four stages: BERT's embeddings and first layers, then three stages that look at the picture.

Letters: B batch, N tokens, T text width, L positions of the vision map, V its channels, A width of the alignment space.
The layers are transformers'; the division into stages and the vision→language layer are the paper's (section III).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertIntermediate,
    BertLayer,
    BertOutput,
)


class LanguageStageOutput(NamedTuple):
    """What one language stage hands out."""

    hidden_states: torch.Tensor  # [B, N, T]
    alignment_feature: torch.Tensor  # c  [B, A], from the [CLS] state


def bert_config(text_dim: int, text_heads: int, dropout: float, vocab_size: int) -> BertConfig:
    """BERT-base's settings with the given sizes (published: 768, 12, 0.1, 30522); the FFN is 4·text_dim wide."""
    if text_heads < 1 or text_dim % text_heads:
        raise ValueError(f"text_dim {text_dim} can't be divided into {text_heads} equal heads")
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=text_dim,
        num_attention_heads=text_heads,
        intermediate_size=4 * text_dim,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="sdpa",
    )


class _Checkpointing(nn.Module):
    """Can compute a part's inner activations again for backward instead of keeping them."""

    grad_checkpointing = False

    def _run(self, part: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)


class LanguageEncoder(_Checkpointing):
    """The BERT layers of stage 1 and its alignment projection (``lang_stage1.encoder``)."""

    def __init__(self, config: BertConfig, num_layers: int, align_dim: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(num_layers))
        self.proj = nn.Linear(config.hidden_size, align_dim)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> LanguageStageOutput:
        """hidden [B, N, T], bias [B, 1, 1, N] added to the scores → the stage's output."""
        for layer in self.layer:
            hidden = self._run(layer, hidden, bias)
        return LanguageStageOutput(hidden, self.proj(hidden[:, 0]))


class LanguageStage1(nn.Module):
    """Words alone: BERT's embeddings and its first layers (``lang_stage1``)."""

    def __init__(self, config: BertConfig, num_layers: int, align_dim: int) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.encoder = LanguageEncoder(config, num_layers, align_dim)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [B, N] → [B, N, T]."""
        longest = self.embeddings.position_embeddings.num_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(f"{input_ids.shape[1]} tokens, but the language encoder has positions for {longest}")
        return self.embeddings(input_ids)


class VisionToLanguageStage(_Checkpointing):
    """One of ``lang_stage{2,3,4}``: a BERT layer whose attention looks at the picture, then an ordinary BERT layer.

    Args:
        config: of the BERT layers.
        vision_dim: V, channels of the vision map looked at; None makes the first layer an ordinary self-attention
            BERT layer too (the ``vision`` and ``late`` ablations), named ``attention`` as in BERT.
        align_dim: A.
    """

    def __init__(self, config: BertConfig, vision_dim: int | None, align_dim: int) -> None:
        super().__init__()
        if vision_dim is None:
            self.attention = BertAttention(config)
        else:
            self.crossattention = BertAttention(config, is_cross_attention=True)
            for name in ("key", "value"):  # the picture is not as wide as the text
                setattr(self.crossattention.self, name, nn.Linear(vision_dim, config.hidden_size))
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)
        self.layer = nn.ModuleList([BertLayer(config)])
        self.proj = nn.Linear(config.hidden_size, align_dim)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor, vision: torch.Tensor) -> LanguageStageOutput:
        """hidden [B, N, T], bias [B, 1, 1, N], vision [B, L, V] (every position is seen) → the stage's output."""
        hidden = self._run(self._look, hidden, bias, vision)
        for layer in self.layer:
            hidden = self._run(layer, hidden, bias)
        return LanguageStageOutput(hidden, self.proj(hidden[:, 0]))

    def _look(self, hidden: torch.Tensor, bias: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
        """The layer whose attention sees the picture."""
        if hasattr(self, "crossattention"):
            attended, _ = self.crossattention(hidden, encoder_hidden_states=vision)
        else:
            attended, _ = self.attention(hidden, bias)
        return self.output(self.intermediate(attended), attended)


@torch.no_grad()
def initialize_language(module: nn.Module) -> None:
    """BERT's own start: Linear and Embedding normal(0, 0.02) with [PAD] at zero, biases 0, LayerNorm 1/0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(std=0.02)
            part.bias.zero_()
        elif isinstance(part, nn.Embedding):
            part.weight.normal_(std=0.02)
            if part.padding_idx is not None:
                part.weight[part.padding_idx].zero_()
