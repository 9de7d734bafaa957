"""LAVT: a Swin encoder into which word features are fused at every stage (Yang et al., CVPR 2022).

This is the form ``lavt_one``, which contains BERT as ``text_encoder``. The earlier form ``lavt``, with a separate BERT,
computes the same. BERT never sees the image. There are no similarity maps.

Shapes: B batch size, H×W image size, N tokens, T text width. Vision stage i = 0…3 has C = embed_dim·2^i channels, and
L = h·w positions with h×w = H/2^(i+2) × W/2^(i+2).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bert.language_encoder import LanguageStage1, bert_config, initialize_language
from CrossVLT import CrossVLTOutput
from lib.fusion import padding_bias
from lib.network import SegmentationNetwork
from lib.rivals.lavt_layers import LAVTBackbone, LAVTStage, PixelWordAttention
from lib.seg_decoder import SegDecoder
from lib.state_dict import StateDict, infer_swin_config, infer_text_config
from lib.variants import BERT_VOCAB_SIZE, NUM_STAGES, check_rates, complete_sizes, drop_path_rates
from lib.vision_encoder import build_blocks, check_image_size, initialize_vision

ONE_HEAD = "1-1-1-1"


class LAVT(SegmentationNetwork):
    """The network. Use :func:`build_lavt` to build it.

    Args:
        backbone: :class:`LAVTBackbone`.
        text_encoder: the whole BERT.
        decoder: :class:`SegDecoder`.
    """

    def __init__(self, backbone: LAVTBackbone, text_encoder: LanguageStage1, decoder: SegDecoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.text_encoder = text_encoder
        self.classifier = decoder

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Apply the blocks of the first stage, which depend only on the image: [B, 3, H, W] → [B, H/4, W/4, C].

        Raises:
            ValueError: the images are too small.
        """
        check_image_size(*images.shape[-2:])
        return self.backbone.encode(images)

    def segment(
        self,
        encoded_images: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        size: tuple[int, int],
        return_similarities: bool | None = None,
    ) -> CrossVLTOutput:
        """Run the network on images that :meth:`encode_images` has encoded, one per sentence, [B, H/4, W/4, C].

        ``return_similarities`` has no effect: the network has no similarity maps.
        """
        bias = padding_bias(attention_mask, self.backbone.norm0.weight.dtype)  # [B, 1, 1, N]
        words = self.text_encoder(input_ids, bias)  # [B, N, T]
        logits = self.classifier(self.backbone(encoded_images, words, bias))  # [B, 2, H/4, W/4]
        return CrossVLTOutput(F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True), None)

    def blocks(self) -> list[nn.Module]:
        """Return the Swin blocks and BERT layers, which torch.compile compiles separately."""
        swin_blocks = [block for stage in self.backbone.layers for block in stage.blocks]
        return [*swin_blocks, *self.text_encoder.encoder.layer]


def build_lavt(
    swin_type: str = "base",
    *,
    window_size: int | None = None,
    drop_path_rate: float = 0.3,
    mha: str | Sequence[int] = "",
    fusion_drop: float = 0.0,
    embed_dim: int | None = None,
    depths: tuple[int, ...] | None = None,
    num_heads: tuple[int, ...] | None = None,
    text_dim: int = 768,
    text_layers: int = 12,
    text_heads: int = 12,
    text_dropout: float = 0.1,
    vocab_size: int = BERT_VOCAB_SIZE,
) -> LAVT:
    """Build a LAVT with randomly initialized weights. Reads no file.

    Args:
        swin_type, window_size, embed_dim, depths, num_heads, drop_path_rate: as in :func:`CrossVLT.build_crossvlt`.
        mha: heads of the fusion of each stage, ``2-4-8-16`` or a sequence. Empty: one each (released).
        fusion_drop: dropout of the fusion (released: 0).
        text_dim, text_heads, vocab_size: as in :func:`CrossVLT.build_crossvlt`.
        text_layers: layers of BERT.
        text_dropout: dropout of BERT. Published: 0 for ``lavt``, 0.1 for ``lavt_one``.

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
    )
    check_rates(drop_path_rate=drop_path_rate, fusion_drop=fusion_drop, text_dropout=text_dropout)
    channels = [sizes["embed_dim"] * 2**i for i in range(NUM_STAGES)]
    fusion_heads = _fusion_heads(mha, channels)
    drop_path = drop_path_rates(drop_path_rate, sizes["depths"])
    stages = [
        LAVTStage(
            PixelWordAttention(dim, text_dim, fusion_heads[i], fusion_drop),
            build_blocks(dim, sizes["num_heads"][i], sizes["window_size"], drop_path[i]),
            dim,
            is_last=i == NUM_STAGES - 1,
        )
        for i, dim in enumerate(channels)
    ]
    backbone = LAVTBackbone(stages, sizes["embed_dim"])
    text_encoder = LanguageStage1(bert_config(text_dim, text_heads, text_dropout, vocab_size), text_layers)
    initialize_vision(backbone, convolutions=False)
    initialize_language(text_encoder, zero_padding=False)
    model = LAVT(backbone, text_encoder, SegDecoder(sizes["embed_dim"]))
    model.config = {
        "swin_type": swin_type,
        "drop_path_rate": drop_path_rate,
        "mha": "-".join(map(str, fusion_heads)),
        "fusion_drop": fusion_drop,
        "text_dropout": text_dropout,
        **sizes,
    }
    return model


def _fusion_heads(mha: str | Sequence[int], channels: Sequence[int]) -> list[int]:
    """Return the heads of the fusion of each stage. Raise a ValueError if they do not fit the channels."""
    text = mha if isinstance(mha, str) else "-".join(map(str, mha))
    parts = (text or ONE_HEAD).split("-")
    if len(parts) != NUM_STAGES or not all(part.isdecimal() and part.isascii() and int(part) for part in parts):
        raise ValueError(f"mha must be {NUM_STAGES} numbers of heads, such as 2-4-8-16, not {mha!r}.")
    for i, (dim, heads) in enumerate(zip(channels, map(int, parts), strict=True)):
        if dim % heads:
            raise ValueError(f"mha {mha}: the {dim} channels of stage {i} cannot be divided into {heads} equal heads.")
    return list(map(int, parts))


def infer_lavt_config(state_dict: StateDict, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of build_lavt that fit a state dict.

    Args:
        state_dict: of the form ``lavt_one``.
        options: those that the published code saves. The heads of the fusion are visible in no shape.

    Raises:
        KeyError, IndexError, ValueError: the state dict is not from a LAVT.
    """
    return {
        **infer_swin_config(state_dict, "backbone.patch_embed.", r"backbone\.layers\.(\d)\.blocks\.(\d+)\."),
        **infer_text_config(state_dict, "text_encoder."),
        "mha": options.get("mha") or ONE_HEAD,
        "fusion_drop": options.get("fusion_drop") or 0.0,
    }
