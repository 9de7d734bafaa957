"""Stages of the language encoder: BERT layers, with cross-attention to vision from stage 2 on (paper, section III).

Shapes: B batch size, N tokens, T text width, h×w size of the vision map, V number of its channels.
"""

from collections.abc import Callable
from typing import Any

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


def bert_config(text_dim: int, text_heads: int, dropout: float, vocab_size: int) -> BertConfig:
    """Return the configuration of BERT-base with these sizes. The hidden layers of its MLPs are 4·text_dim wide.

    Raises:
        ValueError: ``text_heads`` does not divide ``text_dim``.
    """
    if text_heads < 1 or text_dim % text_heads:
        raise ValueError(f"text_dim {text_dim} cannot be divided into {text_heads} equal heads.")
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=text_dim,
        num_attention_heads=text_heads,
        intermediate_size=4 * text_dim,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="sdpa",
    )


class _CheckpointedModule(nn.Module):
    """Module that can recompute the activations of its parts in the backward pass instead of storing them."""

    grad_checkpointing = False

    def _run(self, part: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        return checkpoint(part, *inputs, use_reentrant=False) if self.grad_checkpointing else part(*inputs)


class LanguageEncoder(_CheckpointedModule):
    """BERT layers of stage 1, and the projection of [CLS] for the alignment loss; ``lang_stage1.encoder``."""

    def __init__(self, config: BertConfig, num_layers: int, align_dim: int | None) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(num_layers))
        self.proj = nn.Linear(config.hidden_size, align_dim) if align_dim else None

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return the hidden states after the layers, [B, N, T], for hidden [B, N, T] and padding bias [B, 1, 1, N]."""
        for layer in self.layer:
            hidden = self._run(layer, hidden, bias)
        return hidden


class LanguageStage1(nn.Module):
    """Stage 1, ``lang_stage1``: BERT's embeddings and first layers, without vision.

    Args:
        config: configuration of the BERT layers.
        num_layers: number of layers.
        align_dim: as in :class:`VisionToLanguageStage`. With None the stage has no projection: it is a plain BERT.
    """

    def __init__(self, config: BertConfig, num_layers: int, align_dim: int | None = None) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.encoder = LanguageEncoder(config, num_layers, align_dim)

    def forward(self, input_ids: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return the words' hidden states.

        Args:
            input_ids: [B, N].
            bias: [B, 1, 1, N], added to the attention scores.

        Returns:
            [B, N, T].

        Raises:
            ValueError: there are more tokens than position embeddings.
        """
        max_tokens = self.embeddings.position_embeddings.num_embeddings
        if input_ids.shape[1] > max_tokens:
            raise ValueError(
                f"{input_ids.shape[1]} tokens per sentence, but BERT has embeddings for {max_tokens} positions."
            )
        return self.encoder(self.embeddings(input_ids), bias)


class VisionToLanguageStage(_CheckpointedModule):
    """Stage 2, 3 or 4, ``lang_stage{2,3,4}``: a BERT layer with cross-attention to vision, then an ordinary BERT layer.

    Args:
        config: configuration of the BERT layers.
        vision_dim: V. If None, the first layer is an ordinary BERT layer too (ablations ``vision`` and ``late``).
        align_dim: width of the space in which pixels and sentences are aligned.
    """

    def __init__(self, config: BertConfig, vision_dim: int | None, align_dim: int) -> None:
        super().__init__()
        self.attention, self.crossattention = None, None
        if vision_dim is None:
            self.attention = BertAttention(config)
        else:
            self.crossattention = BertAttention(config, is_cross_attention=True)
            # BERT's own key and value projections have as many inputs as the text width; vision maps have V channels.
            self.crossattention.self.key = nn.Linear(vision_dim, config.hidden_size)
            self.crossattention.self.value = nn.Linear(vision_dim, config.hidden_size)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)
        self.layer = nn.ModuleList([BertLayer(config)])
        self.proj = nn.Linear(config.hidden_size, align_dim)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
        """Return the words' hidden states.

        Args:
            hidden: hidden states of the previous stage, [B, N, T].
            bias: [B, 1, 1, N], added to the scores of self-attention. Cross-attention has no mask.
            vision: feature map of the previous vision stage, [B, h, w, V].

        Returns:
            [B, N, T].
        """
        hidden = self._run(self._cross_attend, hidden, bias, vision.flatten(1, 2))
        for layer in self.layer:
            hidden = self._run(layer, hidden, bias)
        return hidden

    def _cross_attend(self, hidden: torch.Tensor, bias: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
        """Apply the stage's first layer; vision is [B, h·w, V]."""
        if self.crossattention is not None:
            attended, _ = self.crossattention(hidden, encoder_hidden_states=vision)
        else:
            attended, _ = self.attention(hidden, bias)
        return self.output(self.intermediate(attended), attended)


@torch.no_grad()
def initialize_language(module: nn.Module, *, zero_padding: bool = True) -> None:
    """Initialize Linear and Embedding layers as BERT does.

    Weights are normal with standard deviation 0.02. Biases are zero, and so is the embedding of [PAD] unless
    ``zero_padding`` is False.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(std=0.02)
            part.bias.zero_()
        elif isinstance(part, nn.Embedding):
            part.weight.normal_(std=0.02)
            if part.padding_idx is not None and zero_padding:
                part.weight[part.padding_idx].zero_()
