"""CrossVLT: a Swin and a BERT encoder, both in four stages, that look at each other at every stage.

Letters: B batch, H×W picture, N tokens, T text width, A width of the alignment space, C = embed_dim·2^i channels
of vision stage i, whose map has h×w = H/2^(i+2) × W/2^(i+2) positions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bert.language_encoder import LanguageStage1, VisionToLanguageStage, bert_config, initialize_language
from lib.fusion import padding_bias
from lib.seg_decoder import SegDecoder
from lib.variants import BERT_VOCAB_SIZE, FUSIONS, SWIN_VARIANTS
from lib.vision_encoder import VisionStage, initialize_vision

NUM_STAGES = 4


class CrossVLTOutput(NamedTuple):
    """``mask_logits`` [B, 2, H, W] (class 1 is the object); ``similarities``: four maps [B, 1, h, w], or None."""

    mask_logits: torch.Tensor
    similarities: tuple[torch.Tensor, ...] | None


class CrossVLT(nn.Module):
    """The network of the paper's figure 2. Build it with :func:`build_crossvlt`.

    Args:
        vision_stages: four :class:`VisionStage`, finest first.
        language_stages: :class:`LanguageStage1` and three :class:`VisionToLanguageStage`.
        decoder: :class:`SegDecoder`.
    """

    def __init__(self, vision_stages: list[nn.Module], language_stages: list[nn.Module], decoder: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(vision_stages)
        self.lang_stage1, self.lang_stage2, self.lang_stage3, self.lang_stage4 = language_stages
        self.classifier = decoder
        self.temp = nn.Parameter(torch.ones(NUM_STAGES))
        self.config: dict = {}  # what build_crossvlt was called with, all defaults resolved; saved in checkpoints

    def forward(
        self,
        images: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        return_similarities: bool | None = None,
    ) -> CrossVLTOutput:
        """Segment what each sentence means.

        Args:
            images: [B, 3, H, W], normalised, in the model's dtype; any H×W whose last stage has at least two positions.
            input_ids: [B, N] token ids, [CLS] first, padded with 0.
            attention_mask: [B, N], 1 on tokens and 0 on padding.
            return_similarities: give the alignment maps too; None: in training mode only.

        Raises:
            ValueError: the picture is so small that the last stage has a single position.
        """
        return self.segment(
            self.encode_images(images),
            input_ids,
            attention_mask,
            size=images.shape[-2:],
            return_similarities=return_similarities,
        )

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Stage 0's blocks, which see the pictures alone: [B, 3, H, W] → [B, h, w, C].

        Several sentences of a picture need it once; evaluation makes use of that.
        """
        _check_size(*images.shape[-2:])
        return self.backbone[0].encode(images)

    def segment(
        self,
        encoded: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        size: tuple[int, int],
        return_similarities: bool | None = None,
    ) -> CrossVLTOutput:
        """The rest of :meth:`forward`, with each sentence's picture encoded by :meth:`encode_images`.

        Args:
            encoded: [B, h, w, C]; ``encoded[picture]`` gives several sentences of a picture theirs.
            input_ids, attention_mask, return_similarities: as for :meth:`forward`.
            size: (H, W) of the logits, that is of the pictures.
        """
        bias = padding_bias(attention_mask, self.temp.dtype)  # [B, 1, 1, N]
        text = self.lang_stage1.encoder(self.lang_stage1.embed(input_ids), bias)
        vision = self.backbone[0](encoded, text.hidden_states, attention_mask, encoded=True)
        aligned, features = [(vision, text)], [vision.decoder_feature]
        for language_stage, vision_stage in zip(
            (self.lang_stage2, self.lang_stage3, self.lang_stage4), self.backbone[1:], strict=True
        ):
            text = language_stage(text.hidden_states, bias, vision.passed_on.flatten(1, 2))
            vision = vision_stage(vision.passed_on, text.hidden_states, attention_mask)
            aligned.append((vision, text))
            features.append(vision.decoder_feature)
        logits = self.classifier(features)
        logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)
        if not (self.training if return_similarities is None else return_similarities):
            return CrossVLTOutput(logits, None)
        similarities = tuple(
            similarity_map(v.alignment_feature, t.alignment_feature) / temperature
            for (v, t), temperature in zip(aligned, self.temp, strict=True)
        )
        return CrossVLTOutput(logits, similarities)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what enters the encoders' layers, and compute the rest again for backward: same gradients."""
        for part in self.modules():
            if hasattr(part, "grad_checkpointing"):
                part.grad_checkpointing = enable

    def blocks(self) -> list[nn.Module]:
        """The repeated layers of both encoders, Swin's and BERT's: what is worth compiling one by one."""
        stages = (self.lang_stage1.encoder, self.lang_stage2, self.lang_stage3, self.lang_stage4)
        swin = [block for stage in self.backbone for block in stage.layers.blocks]
        return swin + [layer for stage in stages for layer in stage.layer]


def similarity_map(pixels: torch.Tensor, sentence: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every position [B, h, w, A] with its sentence [B, A] → [B, 1, h, w]."""
    return F.cosine_similarity(pixels, sentence[:, None, None, :], dim=-1)[:, None]


def _check_size(height: int, width: int) -> None:
    """InstanceNorm in the last stage needs two positions: refuse pictures of at most 32×32."""
    coarsest = 4 * 2 ** (NUM_STAGES - 1)
    if height <= coarsest and width <= coarsest:
        raise ValueError(
            f"a picture of {height}×{width} leaves the last stage a single position: "
            f"one side must be longer than {coarsest} pixels"
        )


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
    """Build a CrossVLT with the published start of every weight; reads no file.

    Args:
        swin_type: ``tiny``, ``small``, ``base`` or ``large``; gives what the next four leave at None.
        window_size, embed_dim, depths, num_heads: of the Swin encoder (depths and num_heads: one per stage).
        drop_path_rate: reached linearly at the last block.
        fusion: ``cross`` (published), ``vision`` (language sees no picture) or ``late`` (in addition, vision sees
            language in the last stage only): the paper's ablations.
        text_dim, text_heads, text_dropout: width, heads and dropout of every language layer.
        text_layers: BERT layers in language stage 1; stages 2–4 have one vision→language and one BERT layer each.
        vocab_size: rows of the word embedding.
        align_dim: width of the space in which pixels and sentence are aligned.

    Raises:
        ValueError: an unknown name, or sizes that don't fit each other.
    """
    if swin_type not in SWIN_VARIANTS:
        raise ValueError(f"swin_type must be one of {', '.join(SWIN_VARIANTS)}, not {swin_type!r}")
    if fusion not in FUSIONS:
        raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, not {fusion!r}")
    variant = SWIN_VARIANTS[swin_type]
    embed_dim = variant["embed_dim"] if embed_dim is None else embed_dim
    depths = tuple(variant["depths"] if depths is None else depths)
    num_heads = tuple(variant["num_heads"] if num_heads is None else num_heads)
    window_size = variant["window_size"] if window_size is None else window_size
    _check_sizes(embed_dim, depths, num_heads, window_size)

    vision_to_language, language_to_vision = FUSIONS[fusion]
    rates = [drop_path_rate * k / max(1, sum(depths) - 1) for k in range(sum(depths))]
    drop_path = [rates[sum(depths[:i]) : sum(depths[: i + 1])] for i in range(NUM_STAGES)]
    vision_stages = [
        VisionStage(
            i,
            embed_dim=embed_dim,
            num_heads=num_heads[i],
            window_size=window_size,
            drop_path=drop_path[i],
            text_dim=text_dim,
            align_dim=align_dim,
            fuse=language_to_vision or i == NUM_STAGES - 1,
            last=i == NUM_STAGES - 1,
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
        "window_size": window_size,
        "drop_path_rate": drop_path_rate,
        "fusion": fusion,
        "embed_dim": embed_dim,
        "depths": list(depths),
        "num_heads": list(num_heads),
        "text_dim": text_dim,
        "text_layers": text_layers,
        "text_heads": text_heads,
        "text_dropout": text_dropout,
        "vocab_size": vocab_size,
        "align_dim": align_dim,
    }
    return model


def _check_sizes(embed_dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...], window_size: int) -> None:
    if len(depths) != NUM_STAGES or len(num_heads) != NUM_STAGES:
        raise ValueError(f"depths and num_heads need {NUM_STAGES} entries each, not {depths} and {num_heads}")
    if window_size < 2 or min(depths) < 1 or min(num_heads) < 1:
        raise ValueError(
            "window_size must be at least 2, every depth and number of heads at least 1, "
            f"not {window_size}, {depths} and {num_heads}"
        )
    for i, heads in enumerate(num_heads):
        if (embed_dim * 2**i) % heads:
            raise ValueError(f"stage {i} has {embed_dim * 2**i} channels, which {heads} heads can't share equally")
