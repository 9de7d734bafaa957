"""Read the sizes of a pretrained encoder in BERT's format from its config.json."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from lib.errors import UserError
from lib.files import protect

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Properties that the network has as published. A config.json without one of them means the same value.
FIXED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "position_embedding_type": "absolute",
}


class EncoderSizes(NamedTuple):
    """Sizes of an encoder, under the names of the network's arguments."""

    text_dim: int
    text_layers: int
    text_heads: int
    vocab_size: int


def read_encoder_sizes(path: Path) -> EncoderSizes:
    """Read the sizes of an encoder from its config.json.

    Raises:
        UserError: the file is corrupt, or describes an encoder that the network cannot contain.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        sizes = [_positive(config[name], name) for name in SIZES]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        details = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{path} is not the config.json of an encoder: {details}.") from error
    protect(path)
    expected = FIXED | {"intermediate_size": 4 * config["hidden_size"]}
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise UserError(
                f"{path}: the encoder has {name} {config[name]!r}. Only {value!r} is supported. Pass another --ck_bert."
            )
    return EncoderSizes(*sizes)


def _positive(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}")
    return value
