"""The networks of ``--model``: their build functions, the names in their files, and which parameters are trained.

The part of the registry that needs no torch (titles, published settings) is ``MODELS`` in lib/variants.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from CrossVLT import CrossVLT, build_crossvlt
from lib.rivals.lavt import LAVT, build_lavt, infer_lavt_config
from lib.rivals.vlt import VLT, build_vlt, infer_vlt_config
from lib.state_dict import RENAMED_KEYS, infer_model_config
from lib.variants import MODELS

# Turns names in BERT files into those of a network that contains the whole BERT as ``text_encoder``.
BERT_NAMES = (r"^(bert\.)?(embeddings|encoder)\.", r"text_encoder.\2.")


@dataclass(frozen=True)
class Network:
    """What training and checkpoints know about a network. Patterns match whole names of its state dict.

    Args:
        network: its class.
        build: build function; its arguments are the ``model_config`` of checkpoints.
        key_prefix: beginning of state-dict keys that no other network has.
        infer_config: returns arguments of ``build`` that fit a state dict (first argument), and those in the options
            that the published code saves (second argument, by name).
        inferred: the arguments that follow from shapes.
        pretrained_names: patterns and replacements that turn the names of official Swin and BERT files into its own.
        swin_part, bert_part: the entries that such a file must contain.
        not_optimized, no_decay: the published parameter groups. All other parameters have weight decay.
        unused: parameters without influence on the output.
        alignment_only: parameters that only the alignment losses depend on.
    """

    network: type[nn.Module]
    build: Callable[..., nn.Module]
    key_prefix: str
    infer_config: Callable[..., dict[str, Any]]
    inferred: tuple[str, ...]
    pretrained_names: tuple[tuple[str, str], ...]
    swin_part: str
    bert_part: str
    not_optimized: str
    no_decay: str
    unused: str
    alignment_only: str = ""


SIZES = ("window_size", "embed_dim", "depths", "num_heads", "text_dim", "text_layers", "vocab_size")
STAGED_SWIN = r"backbone\.(0\.patch_embed|\d\.layers\.(blocks|downsample))\..*"  # made of VisionStage
NO_DECAY = r"backbone\..*(norm|relative_position_bias_table).*"
LAVT_NETWORK = Network(
    LAVT,
    build_lavt,
    key_prefix="backbone.layers.0.fusion.image_lang_att.",
    infer_config=infer_lavt_config,
    inferred=SIZES,
    pretrained_names=((r"^(patch_embed|layers)\.", r"backbone.\1."), BERT_NAMES),
    swin_part=r"backbone\.(patch_embed|layers\.\d\.(blocks|downsample))\..*",
    bert_part=r"text_encoder\..*",
    not_optimized=r"text_encoder\.(embeddings|encoder\.layer\.(10|11))\..*",  # BERT's last two layers, too
    no_decay=NO_DECAY,
    unused=r"backbone\.layers\.3\.res_gate\..*",
)
# The keys are those of MODELS (lib/variants.py).
NETWORKS = {
    "crossvlt": Network(
        CrossVLT,
        build_crossvlt,
        key_prefix="lang_stage1.",
        infer_config=infer_model_config,
        inferred=(*SIZES, "align_dim"),
        pretrained_names=RENAMED_KEYS,
        swin_part=STAGED_SWIN,
        bert_part=r"lang_stage1\.(embeddings|encoder\.layer)\..*",
        # The word embeddings and the temperature keep their initial values. Weight decay also acts on the decoder's
        # BatchNorm and BERT's LayerNorm.
        not_optimized=r"temp|lang_stage1\.embeddings\..*",
        no_decay=NO_DECAY,
        unused=r"backbone\.3\.layers\.linear1\..*",  # the gate of the last stage, which has no next stage
        alignment_only=r"(backbone\.\d\.layers|lang_stage1\.encoder|lang_stage[234])\.proj\..*",
    ),
    "lavt_one": LAVT_NETWORK,
    "lavt": LAVT_NETWORK,
    "vlt": Network(
        VLT,
        build_vlt,
        key_prefix="query_generation.",
        infer_config=infer_vlt_config,
        inferred=(*SIZES, "align_dim"),
        pretrained_names=(*RENAMED_KEYS[:2], BERT_NAMES),
        swin_part=STAGED_SWIN,
        bert_part=r"text_encoder\..*",
        not_optimized=r"text_encoder\.embeddings\..*",
        no_decay=NO_DECAY,
        unused="",
    ),
}


def name_of(model: nn.Module) -> str:
    """Return a name of a model's network; of ``lavt`` and ``lavt_one``, the latter. The model must not be wrapped."""
    return next(name for name, entry in NETWORKS.items() if isinstance(model, entry.network))


def network_of(model: nn.Module) -> Network:
    """Return the entry of a model's network."""
    return NETWORKS[name_of(model)]


def recognize(keys: Iterable[str]) -> str | None:
    """Return the name of the network with these state-dict keys; None: not a network of this project."""
    keys = list(keys)
    names = (name for name, entry in NETWORKS.items() if any(key.startswith(entry.key_prefix) for key in keys))
    return next(names, None)


def titles() -> str:
    """Return the names of all networks for messages."""
    return " or ".join(dict.fromkeys(facts.title for facts in MODELS.values()))
