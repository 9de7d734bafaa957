"""State dicts: renaming keys of the supported files, strict loading, inferring sizes from shapes."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table_simple
from torch import nn

from lib.errors import UserError
from lib.variants import FUSIONS, SWIN_VARIANTS

StateDict = dict[str, torch.Tensor]

PREFIX = "module."  # added to all keys by DistributedDataParallel
RENAMED_KEYS = (  # to CrossVLT's names
    (r"^patch_embed\.", "backbone.0.patch_embed."),  # the official Swin repository
    (r"^layers\.(\d+)\.", r"backbone.\1.layers."),
    (r"^(bert\.)?(embeddings|encoder)\.", r"lang_stage1.\2."),  # BERT
)
ORIGINAL_BERT_KEYS = ((r"\.LayerNorm\.gamma$", ".LayerNorm.weight"), (r"\.LayerNorm\.beta$", ".LayerNorm.bias"))
# Index buffers, which the model computes itself, and BERT's pooler, which no network uses.
DROPPED_KEYS = r".*\.(relative_position_index|attn_mask|position_ids)|((bert|text_encoder)\.)?pooler\..*"
PRETRAINED_HEADS = r"(head|norm|cls)\..*"  # of official Swin and BERT files
OPTIONAL_KEYS = {"temp"}  # missing in the released inference files
MAX_NAMED_KEYS = 4


def has_prefix(state_dict: StateDict) -> bool:
    """Return whether all keys begin with ``module.``."""
    return all(key.startswith(PREFIX) for key in state_dict)


def repair_keys(state_dict: StateDict, renamed: tuple[tuple[str, str], ...] = RENAMED_KEYS) -> StateDict:
    """Return the entries of a checkpoint, official Swin or BERT file under the names that a network's state dict uses.

    The prefix ``module.`` is removed if all keys have it. Entries that are not part of any network are dropped.

    Args:
        state_dict: of a file.
        renamed: patterns and replacements for the names in official Swin and BERT files, by default CrossVLT's. Empty:
            the file is not one of them.
    """
    dropped = f"{DROPPED_KEYS}|{PRETRAINED_HEADS}" if renamed else DROPPED_KEYS
    prefix = PREFIX if has_prefix(state_dict) else ""
    repaired = {}
    for key, value in state_dict.items():
        key = key.removeprefix(prefix)
        if re.fullmatch(dropped, key):
            continue
        for pattern, replacement in (*ORIGINAL_BERT_KEYS, *renamed):
            key = re.sub(pattern, replacement, key)
        repaired[key] = value
    return repaired


def join_bert(state_dict: StateDict, bert: StateDict) -> StateDict:
    """Return the state dict of a LAVT that contains its BERT, from the two of a file with a separate BERT.

    The released files have both forms. Their names differ only in the prefix of BERT's.
    """
    return state_dict | {f"text_encoder.{key}": value for key, value in bert.items()}


def adapt_to_model(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Fit pretrained entries to the sizes of a model.

    Tables of relative position biases are resized to the model's window (bicubic interpolation). BERT layers that the
    model does not have are dropped.
    """
    expected = model.state_dict()
    layer = re.compile(r"\w+\.encoder\.layer\.\d+\.")
    layers = {match[0] for key in expected if (match := layer.match(key))}
    adapted = {}
    for key, value in state_dict.items():
        if (match := layer.match(key)) and match[0] not in layers:
            continue
        if key.endswith("relative_position_bias_table") and key in expected and value.ndim == 2:
            size, heads = expected[key].shape[0], value.shape[1]  # size = (2·window − 1)²
            window = _window_size(size)
            value = resize_rel_pos_bias_table_simple(
                value, new_window_size=(window, window), new_bias_shape=(size, heads)
            )
        adapted[key] = value
    return adapted


def load_strictly(model: nn.Module, state_dict: StateDict, source: str, part: str = r".*") -> None:
    """Load a state dict of finite weights. All keys and shapes must be equal, except for missing ``OPTIONAL_KEYS``.

    Args:
        model: not wrapped.
        state_dict: with repaired keys.
        source: name of the file, for error messages.
        part: pattern of the model's keys that the state dict must contain. Other entries of the model are not changed.

    Raises:
        UserError: a key is missing or unexpected, or has another shape; or a weight is NaN, infinite or not a
            floating-point number. The model is not changed.
    """
    expected = {key: value for key, value in model.state_dict().items() if re.fullmatch(part, key)}
    problems = {
        "missing": [key for key in expected if key not in state_dict and key not in OPTIONAL_KEYS],
        "unexpected": [key for key in state_dict if key not in expected],
        "of another shape": [
            f"{key}: {tuple(state_dict[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in state_dict and state_dict[key].shape != value.shape
        ],
    }
    if any(problems.values()):
        parts = [f"{len(keys)} {problem} ({_first_keys(keys)})" for problem, keys in problems.items() if keys]
        raise UserError(f"{source} does not fit the model. Keys: {'; '.join(parts)}.")
    problem = describe_unusable_weights({key: state_dict[key] for key in expected if key in state_dict})
    if problem:
        raise UserError(f"{source} has unusable weights: {problem}.")
    model.load_state_dict(state_dict, strict=False)


def describe_unusable_weights(state_dict: StateDict) -> str:
    """Name the weights that are NaN, infinite or not floating-point numbers. Empty if there are none.

    BatchNorm's counters (``num_batches_tracked``) are integers.
    """
    weights = {key: value for key, value in state_dict.items() if not key.endswith("num_batches_tracked")}
    not_floating = [f"{key}: {value.dtype}" for key, value in weights.items() if not value.is_floating_point()]
    not_finite = [key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    parts = [f"{len(not_floating)} not floating-point ({_first_keys(not_floating)})"] * bool(not_floating)
    parts += [f"{len(not_finite)} NaN or infinite ({_first_keys(not_finite)})"] * bool(not_finite)
    return "; ".join(parts)


def _first_keys(keys: list[str]) -> str:
    num_hidden = len(keys) - MAX_NAMED_KEYS
    return ", ".join(keys[:MAX_NAMED_KEYS]) + (f", and {num_hidden} more" if num_hidden > 0 else "")


def infer_model_config(state_dict: StateDict, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the arguments of build_crossvlt that fit a state dict with repaired keys.

    No shape depends on the number of text heads. The heads are assumed to have 64 channels each, as in BERT.

    Args:
        state_dict: with repaired keys.
        options: those that the published code saves; all of them follow from the shapes.

    Raises:
        KeyError, IndexError, ValueError, StopIteration: the state dict is not from a CrossVLT.
    """
    connections = (
        "lang_stage2.crossattention.self.key.weight" in state_dict,
        "backbone.0.layers.attn1.l_q.weight" in state_dict,
    )
    return {
        **infer_swin_config(state_dict, "backbone.0.patch_embed.", r"backbone\.(\d)\.layers\.blocks\.(\d+)\."),
        "fusion": next(name for name, fusion in FUSIONS.items() if fusion == connections),
        **infer_text_config(state_dict, "lang_stage1."),
        "align_dim": state_dict["backbone.0.layers.proj.weight"].shape[0],
    }


def infer_swin_config(state_dict: StateDict, patch_embed: str, blocks: str) -> dict[str, Any]:
    """Return the sizes of a Swin encoder from the shapes in a state dict.

    Args:
        state_dict: of a network.
        patch_embed: beginning of the keys of the patch embedding.
        blocks: pattern of the beginning of the keys of a block, with groups for stage and block.
    """
    embed_dim = state_dict[f"{patch_embed}proj.weight"].shape[0]
    bias_tables = {
        (int(match[1]), int(match[2])): value
        for key, value in state_dict.items()
        if (match := re.fullmatch(rf"{blocks}attn\.relative_position_bias_table", key))
    }
    stages = sorted({stage for stage, _ in bias_tables})
    depths = [sum(block_stage == stage for block_stage, _ in bias_tables) for stage in stages]
    swin_types = [name for name, variant in SWIN_VARIANTS.items() if variant["embed_dim"] == embed_dim] or ["base"]
    return {
        "swin_type": swin_types[-1] if depths[2] == 18 else swin_types[0],
        "window_size": _window_size(bias_tables[0, 0].shape[0]),
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": [bias_tables[stage, 0].shape[1] for stage in stages],
    }


def infer_text_config(state_dict: StateDict, prefix: str) -> dict[str, Any]:
    """Return the sizes of a BERT whose keys begin with ``prefix``."""
    vocab_size, text_dim = state_dict[f"{prefix}embeddings.word_embeddings.weight"].shape
    layer = f"{prefix}encoder.layer."
    return {
        "text_dim": text_dim,
        "text_layers": len({key.removeprefix(layer).split(".")[0] for key in state_dict if key.startswith(layer)}),
        "text_heads": max(1, text_dim // 64),
        "vocab_size": vocab_size,
    }


def _window_size(table_size: int) -> int:
    """Return the window size of a bias table with (2·window − 1)² rows."""
    return (round(table_size**0.5) + 1) // 2
