"""VLT-style network: two separate encoders, late fusion, and a transformer with queries made from the sentence.

After "VLT: Vision-Language Transformer and Query Generation for Referring Segmentation" (TPAMI 2023), on the Swin and
BERT of this project. docs/vlt.md states which parts are VLT's and which are choices of this project.

Shapes: B batch size, H×W image size, N tokens, T text width, D = align_dim, Q = 16 queries. Vision stage i = 0…3 has
C = embed_dim·2^i channels; h×w = H/16 × W/16 is the size of the map of stage 2, on which the network works.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from bert.language_encoder import LanguageStage1, bert_config, initialize_language
from lib.fusion import padding_bias
from lib.kernels import to_conv_layout
from lib.network import SegmentationNetwork
from lib.rivals.vlt_layers import (
    NUM_HEADS,
    MaskDecoder,
    QueryBalance,
    QueryGeneration,
    SpatialDynamicFusion,
    TransformerLayer,
    VisionNeck,
    sinusoidal_positions,
    to_positions,
)
from lib.state_dict import StateDict, infer_swin_config, infer_text_config
from lib.variants import BERT_VOCAB_SIZE, NUM_STAGES, check_rates, complete_sizes, drop_path_rates
from lib.vision_encoder import VisionStage, initialize_vision

NUM_LAYERS = 2  # of the transformer's encoder and of its decoder


class VLTOutput(NamedTuple):
    """Outputs of the network."""

    mask_logits: torch.Tensor  # [B, 2, H, W]; class 1 is the referred object
    similarities: None  # the network has no similarity maps
    confidences: torch.Tensor  # [B, Q], from 0 to 1: the weights of the queries' responses


class VLT(SegmentationNetwork):
    """The VLT-style network. Use :func:`build_vlt` to build it.

    Args:
        vision_stages: four :class:`VisionStage` without fusion, finest first.
        text_encoder: the whole BERT.
        embed_dim: channels of vision stage 0.
        text_dim: T.
        dim: D.
        dropout: of the transformer.
    """

    def __init__(
        self,
        vision_stages: list[VisionStage],
        text_encoder: LanguageStage1,
        *,
        embed_dim: int,
        text_dim: int,
        dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(vision_stages)
        self.text_encoder = text_encoder
        self.neck = VisionNeck(embed_dim, dim)
        self.fusion = SpatialDynamicFusion(dim, text_dim)
        self.query_generation = QueryGeneration(dim, text_dim)
        self.transformer_encoder = nn.ModuleList(
            TransformerLayer(dim, dropout, cross_attention=False) for _ in range(NUM_LAYERS)
        )
        self.transformer_decoder = nn.ModuleList(
            TransformerLayer(dim, dropout, cross_attention=True) for _ in range(NUM_LAYERS)
        )
        self.query_balance = QueryBalance(dim)
        self.classifier = MaskDecoder(dim)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Apply the vision encoder, which is blind to the sentence: [B, 3, H, W] → [B, D, h, w]."""
        features, x = [], images
        for stage in self.backbone:
            feature, x = stage(stage.encode(x))
            features.append(feature)
        return self.neck(*features[1:])  # the map works at stride 16; the finest feature is not used

    def segment(
        self,
        encoded_images: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        size: tuple[int, int],
        return_similarities: bool | None = None,
    ) -> VLTOutput:
        """Run the network on images that :meth:`encode_images` has encoded, one per sentence, [B, D, h, w].

        ``return_similarities`` has no effect: the network has no similarity maps.
        """
        bias = padding_bias(attention_mask, self.fusion.norm.weight.dtype)  # [B, 1, 1, N]
        words = self.text_encoder(input_ids, bias)  # [B, N, T]
        fused = to_conv_layout(self.fusion(encoded_images, words, bias))  # [B, D, h, w]
        queries = self.query_generation(fused, words, bias)  # [B, Q, D]

        positions = to_positions(fused) + sinusoidal_positions(fused)  # [B, h·w, D]
        for layer in self.transformer_encoder:
            positions = layer(positions)
        responses = queries
        for layer in self.transformer_decoder:
            responses = layer(responses, positions)

        confidences = self.query_balance(responses, queries)  # [B, Q, 1]
        maps = (confidences * responses) @ positions.transpose(1, 2) / positions.shape[2] ** 0.5  # [B, Q, h·w]
        maps = maps.unflatten(2, fused.shape[-2:])
        logits = self.classifier(torch.cat([maps.to(fused.dtype), fused], dim=1), tuple(size))
        return VLTOutput(logits, None, confidences[..., 0])

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the encoders and of the transformer, which torch.compile compiles separately."""
        swin_blocks = [block for stage in self.backbone for block in stage.layers.blocks]
        bert_layers = self.text_encoder.encoder.layer
        return [*swin_blocks, *bert_layers, *self.transformer_encoder, *self.transformer_decoder]


def build_vlt(
    swin_type: str = "base",
    *,
    window_size: int | None = None,
    drop_path_rate: float = 0.3,
    embed_dim: int | None = None,
    depths: tuple[int, ...] | None = None,
    num_heads: tuple[int, ...] | None = None,
    text_dim: int = 768,
    text_layers: int = 12,
    text_heads: int = 12,
    text_dropout: float = 0.1,
    vocab_size: int = BERT_VOCAB_SIZE,
    align_dim: int = 256,
) -> VLT:
    """Build a VLT-style network with randomly initialized weights. Reads no file.

    Args:
        swin_type, window_size, embed_dim, depths, num_heads, drop_path_rate: as in :func:`CrossVLT.build_crossvlt`.
        text_dim, text_heads, vocab_size: as in :func:`CrossVLT.build_crossvlt`.
        text_layers: layers of BERT.
        text_dropout: dropout of BERT and of the transformer.
        align_dim: D, width of the fused map, the queries and the transformer; a multiple of 8.

    Raises:
        ValueError: an unknown name, or sizes that do not fit each other.
    """
    sizes = complete_sizes(
        swin_type,
        window_size=window_size,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        text_dim=text_dim,
        text_layers=text_layers,
        text_heads=text_heads,
        vocab_size=vocab_size,
        align_dim=align_dim,
    )
    check_rates(drop_path_rate=drop_path_rate, text_dropout=text_dropout)
    if align_dim % NUM_HEADS:
        raise ValueError(f"align_dim {align_dim} cannot be divided into {NUM_HEADS} equal heads.")
    drop_path = drop_path_rates(drop_path_rate, sizes["depths"])
    vision_stages = [
        VisionStage(
            index=i,
            embed_dim=sizes["embed_dim"],
            num_heads=sizes["num_heads"][i],
            window_size=sizes["window_size"],
            drop_path=drop_path[i],
            text_dim=text_dim,
            align_dim=None,
            fusion_layer=None,
        )
        for i in range(NUM_STAGES)
    ]
    vision_stages[0].norm0 = nn.Identity()  # of a feature that is not used
    text_encoder = LanguageStage1(bert_config(text_dim, text_heads, text_dropout, vocab_size), text_layers)
    initialize_vision(nn.ModuleList(vision_stages))
    initialize_language(text_encoder)
    model = VLT(
        vision_stages,
        text_encoder,
        embed_dim=sizes["embed_dim"],
        text_dim=text_dim,
        dim=align_dim,
        dropout=text_dropout,
    )
    model.config = {"swin_type": swin_type, "drop_path_rate": drop_path_rate, "text_dropout": text_dropout, **sizes}
    return model


def infer_vlt_config(state_dict: StateDict, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the arguments of build_vlt that fit a state dict; see :func:`lib.state_dict.infer_model_config`."""
    return {
        **infer_swin_config(state_dict, "backbone.0.patch_embed.", r"backbone\.(\d)\.layers\.blocks\.(\d+)\."),
        **infer_text_config(state_dict, "text_encoder."),
        "align_dim": state_dict["fusion.norm.weight"].shape[0],
    }
