"""The network that is measured: its flags, random weights and random inputs. Imports torch only inside functions."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from benchmarks.machine import DTYPES
from lib import config, variants
from lib.cli import Parser
from lib.options import OPTIONS

if TYPE_CHECKING:
    import torch
    from torch import nn

MODELS = ("plain", "prepared")


def add_arguments(parser: Parser, *keys: str) -> None:
    """Add ``--cfg``, the flags of the network and of the device, and those of more options."""
    parser.add_input("--cfg", metavar="FILE", help="YAML file with configuration keys, such as configs/demo.yaml")
    for option in OPTIONS:
        if option.key in ("MODEL.NAME", "MODEL.SWIN_TYPE", "DATA.IMG_SIZE", "DEVICE", "TRAIN.TF32", *keys):
            config.add_flags(parser, option, is_used=True)


def add_inference_arguments(parser: Parser) -> None:
    """Add the flags for the first arguments of :func:`for_inference`."""
    models = {"nargs": "+", "choices": MODELS, "default": list(MODELS)}
    parser.add_argument("--models", **models, help="without and with lib.inference.prepare (default: both)")
    precisions = {"nargs": "+", "choices": tuple(DTYPES), "default": ["off", "bf16"]}
    parser.add_argument("--amp", **precisions, help="precisions (default: off bf16)")


def read_config(args: Any) -> CfgNode:
    """Return the configuration of the network and of training. UserError: a flag or the file is invalid."""
    return config.load_config(args)[0]


def describe(cfg: CfgNode) -> str:
    """Return type, image size and sentence length."""
    model, changed = cfg.MODEL, "" if not cfg.MODEL.EMBED_DIM else f" with {cfg.MODEL.EMBED_DIM} channels"
    network, size = variants.MODELS[model.NAME].title, cfg.DATA.IMG_SIZE
    return f"{network} {model.SWIN_TYPE}{changed}, {size}×{size}, {cfg.DATA.MAX_TOKENS} tokens"


def build_network(cfg: CfgNode, device: "torch.device") -> "nn.Module":
    """Return the configured network with random weights, in training mode."""
    import torch

    from lib.models import NETWORKS

    torch.manual_seed(0)
    with device:
        return NETWORKS[cfg.MODEL.NAME].build(**config.model_keywords(cfg, cfg.MODEL.WINDOW_SIZE))


def for_inference(
    cfg: CfgNode, model_name: str, amp: str, device: "torch.device"
) -> tuple["nn.Module", AbstractContextManager]:
    """Return the configured network in evaluation mode, and the context manager in which it is called.

    Args:
        cfg: the configuration.
        model_name: ``plain``, the network under autocast, or ``prepared`` by lib.inference.prepare.
        amp: ``off``, ``bf16`` or ``fp16``.
        device: of the weights.
    """
    from lib.precision import autocast

    model = build_network(cfg, device).eval()
    if model_name == "plain":
        return model, autocast(amp, device)
    from lib.inference import prepare

    return prepare(model, amp=amp), nullcontext()


def random_inputs(
    cfg: CfgNode, batch_size: int, device: "torch.device", *, sentences: int = 1
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Return random inputs of the network, with the longest sentences, without padding.

    Args:
        batch_size: B, the number of expressions.
        sentences: the number of expressions of each image; a divisor of B.

    Returns:
        images [B / sentences, 3, S, S], and input_ids and attention_mask [B, N].
    """
    import torch

    size = cfg.DATA.IMG_SIZE
    images = torch.randn(batch_size // sentences, 3, size, size, device=device)
    input_ids = torch.randint(5, cfg.MODEL.VOCAB_SIZE, (batch_size, cfg.DATA.MAX_TOKENS), device=device)
    return images, input_ids, torch.ones_like(input_ids)
