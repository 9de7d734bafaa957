"""AdamW with the published parameter groups, and the polynomial decay of its learning rate."""

from typing import NamedTuple

import torch
from torch import nn

POLY_POWER = 0.9
NO_DECAY_WORDS = ("norm", "relative_position_bias_table")  # in names of the vision encoder only


class ParameterGroups(NamedTuple):
    """Names of a model's parameters, each in exactly one place."""

    decay: list[str]
    no_decay: list[str]
    not_optimized: list[str]


def group_parameter_names(names: list[str], *, train_temperature: bool = False) -> ParameterGroups:
    """Sort parameter names as the published recipe does (spec: training).

    Vision parameters named after norms and position biases don't decay; everything else does, the decoder's BatchNorm
    and BERT's LayerNorm too. The word embeddings and ``temp`` are in no group: they stay as they start. With
    ``train_temperature`` (the paper's description) ``temp`` is trained, without decay: similarities are divided by it.
    """
    groups = ParameterGroups([], [], [])
    for name in names:
        if name == "temp" and train_temperature:
            groups.no_decay.append(name)
        elif name == "temp" or name.startswith("lang_stage1.embeddings."):
            groups.not_optimized.append(name)
        elif name.startswith("backbone.") and any(word in name for word in NO_DECAY_WORDS):
            groups.no_decay.append(name)
        else:
            groups.decay.append(name)
    return groups


def names_without_gradient(model: nn.Module, *, alignment: bool, train_temperature: bool = False) -> list[str]:
    """Parameters that no loss reaches or no optimizer moves; DistributedDataParallel wants them frozen.

    Besides those outside the optimizer: the last stage's gate, which nothing follows, and with the alignment loss off
    the projections into its space and ``temp``.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = set(group_parameter_names(names, train_temperature=train_temperature and alignment).not_optimized)
    last = len(model.backbone) - 1
    for name in names:
        projects = name.endswith((".proj.weight", ".proj.bias")) and ".attn." not in name and "patch_embed" not in name
        if name.startswith(f"backbone.{last}.layers.linear1.") or (projects and not alignment):
            frozen.add(name)
    return [name for name in names if name in frozen]


def freeze(model: nn.Module, names: list[str]) -> None:
    """Switch off the gradients of the named parameters."""
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)


def build_optimizer(
    model: nn.Module, lr: float, weight_decay: float, *, amsgrad: bool = False, train_temperature: bool = False
) -> torch.optim.AdamW:
    """AdamW over the published groups of an unwrapped CrossVLT (betas and eps are PyTorch's defaults).

    On a GPU it is PyTorch's fused one: one kernel for all parameters, the same update.
    """
    parameters = dict(model.named_parameters())
    groups = group_parameter_names(list(parameters), train_temperature=train_temperature)
    assert len(parameters) == sum(map(len, groups)), "a parameter is in no group or in two"
    return torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in groups.no_decay], "weight_decay": 0.0},
            {"params": [parameters[name] for name in groups.decay], "weight_decay": weight_decay},
        ],
        lr=lr,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        fused=all(parameter.is_cuda for parameter in parameters.values()),
    )


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """lr·(1 − step/total)^0.9, to be stepped after every optimizer step.

    Args:
        optimizer: whose learning rates are scaled.
        total_steps: optimizer steps of the whole training; from there on the rate is 0.
        warmup_steps: the first steps rise linearly to the curve (published: none).
    """
    if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"need at least 1 step and 0…{total_steps} of them warm-up, not {total_steps} and {warmup_steps}"
        )

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (warmup_steps + 1))
        return warm * max(0.0, 1 - step / total_steps) ** POLY_POWER

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
