"""CrossVLT: a Swin and a BERT encoder that exchange features at every stage by cross-attention (paper, figure 2).

Shapes: B batch size, H×W image size, N tokens, T text width, A width of the alignment space. Vision stage i = 0…3 has
C = embed_dim·2^i channels and a map of h×w = H/2^(i+2) × W/2^(i+2) positions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bert.language_encoder import LanguageStage1, VisionToLanguageStage, bert_config, initialize_language
from lib.fusion import FUSION_LAYERS, padding_bias
from lib.network import SegmentationNetwork
from lib.seg_decoder import SegDecoder
from lib.variants import BERT_VOCAB_SIZE, FUSIONS, NUM_STAGES, check_rates, complete_sizes, drop_path_rates
from lib.vision_encoder import VisionStage, check_image_size, initialize_vision


class CrossVLTOutput(NamedTuple):
    """Outputs of the network."""

    mask_logits: torch.Tensor  # [B, 2, H, W]; class 1 is the referred object
    similarities: tuple[torch.Tensor, ...] | None  # one map [B, 1, h, w] per stage; None unless requested


class CrossVLT(SegmentationNetwork):
    """The network of the paper's figure 2. Use :func:`build_crossvlt` to build it.

    Args:
        vision_stages: four :class:`VisionStage`, finest first.
        language_stages: :class:`LanguageStage1` and three :class:`VisionToLanguageStage`.
        decoder: :class:`SegDecoder`.
    """

    def __init__(self, vision_stages: list[nn.Module], language_stages: list[nn.Module], decoder: nn.Module) -> None:
        super().__init__()
        # The names of the published state dict.
        self.backbone = nn.ModuleList(vision_stages)
        self.lang_stage1, self.lang_stage2, self.lang_stage3, self.lang_stage4 = language_stages
        self.classifier = decoder
        self.temp = nn.Parameter(torch.ones(NUM_STAGES))  # temperature of each stage's similarity map

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Apply the first stage's Swin blocks: [B, 3, H, W] → [B, H/4, W/4, C].

        The result depends only on the image, so evaluation computes it once for all sentences of an image. H or W must
        be more than 32.
        """
        check_image_size(*images.shape[-2:])
        return self.backbone[0].encode(images)

    def segment(
        self,
        encoded_images: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        size: tuple[int, int],
        return_similarities: bool | None = None,
    ) -> CrossVLTOutput:
        """Run the network on images that :meth:`encode_images` has encoded.

        Args:
            encoded_images: one per sentence, [B, H/4, W/4, C]. An image may occur several times.
            input_ids, attention_mask, return_similarities: as in :meth:`forward`.
            size: (H, W), the size of the images and of the logits.
        """
        if return_similarities is None:
            return_similarities = self.training
        bias = padding_bias(attention_mask, self.temp.dtype)  # [B, 1, 1, N]

        pixels = encoded_images  # [B, h, w, C]
        words = self.lang_stage1(input_ids, bias)  # [B, N, T]
        vision_input = None  # output of the previous vision stage, [B, h, w, C]
        features, similarities = [], []
        for i, (vision_stage, language_stage) in enumerate(zip(self.backbone, self.language_stages, strict=True)):
            if i > 0:
                words = language_stage(words, bias, vision_input)
                pixels = vision_stage.encode(vision_input)
            if return_similarities:
                aligned_pixels = vision_stage.layers.proj(pixels)  # [B, h, w, A]
                sentence = language_stage.proj(words[:, 0])  # [B, A], from [CLS]
                similarities.append(similarity_map(aligned_pixels, sentence) / self.temp[i])
            decoder_feature, vision_input = vision_stage(pixels, words, attention_mask)
            features.append(decoder_feature)

        logits = self.classifier(features)  # [B, 2, H/4, W/4]
        logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)
        return CrossVLTOutput(logits, tuple(similarities) if return_similarities else None)

    @property
    def language_stages(self) -> tuple[nn.Module, ...]:
        """The four language stages, without the word embeddings.

        Each has ``layer``, its BERT layers, and ``proj``, the projection to the alignment space.
        """
        return self.lang_stage1.encoder, self.lang_stage2, self.lang_stage3, self.lang_stage4

    def blocks(self) -> list[nn.Module]:
        """Return the Swin blocks and BERT layers of both encoders, which torch.compile compiles separately."""
        swin_blocks = [block for stage in self.backbone for block in stage.layers.blocks]
        return swin_blocks + [layer for stage in self.language_stages for layer in stage.layer]


def similarity_map(pixels: torch.Tensor, sentence: torch.Tensor) -> torch.Tensor:
    """Return the cosine similarity of each position of ``pixels`` [B, h, w, A] to ``sentence`` [B, A]: [B, 1, h, w]."""
    return F.cosine_similarity(pixels, sentence[:, None, None, :], dim=-1)[:, None]


def build_crossvlt(
    swin_type: str = "base",
    *,
    window_size: int | None = None,
    drop_path_rate: float = 0.3,
    fusion: str = "cross",
    embed_dim: int | None = None,
    depths: tuple[int, ...] | None = None,
    num_heads: tuple[int, ...] | None = None,
    text_dim: int = 768,
    text_layers: int = 6,
    text_heads: int = 12,
    text_dropout: float = 0.1,
    vocab_size: int = BERT_VOCAB_SIZE,
    align_dim: int = 256,
) -> CrossVLT:
    """Build a CrossVLT with randomly initialized weights. Reads no file.

    Args:
        swin_type: a name in ``lib.variants.SWIN_VARIANTS``, which provides the defaults of the Swin sizes below.
        window_size, embed_dim, depths, num_heads: sizes of the Swin encoder; depths and num_heads have one entry per
            stage.
        drop_path_rate: drop path rate of the last Swin block. The rate increases linearly from 0 in the first block.
        fusion: a name in ``lib.variants.FUSIONS``: ``cross`` (published), or an ablation: ``vision`` has no
            vision-to-language attention; ``late`` has only the language-to-vision fusion of the last stage.
        text_dim, text_heads, text_dropout: width, heads and dropout of every language layer.
        text_layers: BERT layers in language stage 1. Stages 2 to 4 have two layers each.
        vocab_size: rows of the word embedding.
        align_dim: A, width of the space in which positions and sentences are compared.

    Raises:
        ValueError: an unknown name, or sizes that do not fit each other.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, not {fusion!r}.")
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
    embed_dim, depths, num_heads = sizes["embed_dim"], sizes["depths"], sizes["num_heads"]

    vision_to_language, language_to_vision = FUSIONS[fusion]
    drop_path = drop_path_rates(drop_path_rate, depths)
    vision_stages = [
        VisionStage(
            index=i,
            embed_dim=embed_dim,
            num_heads=num_heads[i],
            window_size=sizes["window_size"],
            drop_path=drop_path[i],
            text_dim=text_dim,
            align_dim=align_dim,
            fusion_layer=FUSION_LAYERS[fusion] if language_to_vision or i == NUM_STAGES - 1 else None,
        )
        for i in range(NUM_STAGES)
    ]
    config = bert_config(text_dim, text_heads, text_dropout, vocab_size)
    language_stages = [LanguageStage1(config, text_layers, align_dim)]
    language_stages += [
        VisionToLanguageStage(config, embed_dim * 2**i if vision_to_language else None, align_dim)
        for i in range(1, NUM_STAGES)
    ]
    initialize_vision(nn.ModuleList(vision_stages))
    for stage in (language_stages[0].embeddings, language_stages[0].encoder.layer, *language_stages[1:]):
        initialize_language(stage)

    model = CrossVLT(vision_stages, language_stages, SegDecoder(embed_dim))
    model.config = {
        "swin_type": swin_type,
        "drop_path_rate": drop_path_rate,
        "fusion": fusion,
        "text_dropout": text_dropout,
        **sizes,
    }
    return model
