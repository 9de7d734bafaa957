"""AdamW with the published parameter groups, and polynomial decay of the learning rate (paper, section IV)."""

import re
from typing import NamedTuple

import torch
from torch import nn

from lib.models import NETWORKS, Network, network_of

POLY_POWER = 0.9


class ParameterGroups(NamedTuple):
    """Names of a model's parameters; each is in exactly one list."""

    decay: list[str]
    no_decay: list[str]
    not_optimized: list[str]


def group_parameter_names(
    names: list[str], *, train_temperature: bool = False, network: Network = NETWORKS["crossvlt"]
) -> ParameterGroups:
    """Divide parameter names into the published groups.

    Args:
        names: of all parameters of a model.
        train_temperature: put CrossVLT's ``temp`` into ``no_decay``. The paper describes a trained temperature, the
            published code keeps it at 1.
        network: the model's entry in lib.models.
    """
    groups = ParameterGroups([], [], [])
    for name in names:
        if re.fullmatch(network.not_optimized, name):
            group = groups.no_decay if name == "temp" and train_temperature else groups.not_optimized
        else:
            group = groups.no_decay if re.fullmatch(network.no_decay, name) else groups.decay
        group.append(name)
    return groups


def names_without_gradient(model: nn.Module, *, alignment: bool, train_temperature: bool = False) -> list[str]:
    """Return the names of the parameters to freeze: those not optimized, and those without influence on the loss.

    DistributedDataParallel waits for the gradients of all parameters that are not frozen.

    Args:
        model: a network of lib.models, not wrapped.
        alignment: whether the loss has alignment terms.
        train_temperature: as in :func:`group_parameter_names`; without alignment the temperature is never trained.
    """
    network, names = network_of(model), [name for name, _ in model.named_parameters()]
    groups = group_parameter_names(names, train_temperature=train_temperature and alignment, network=network)
    without_influence = network.unused if alignment else f"{network.unused}|{network.alignment_only}"
    return [name for name in names if name in groups.not_optimized or re.fullmatch(without_influence, name)]


def freeze(model: nn.Module, names: list[str]) -> None:
    """Disable the gradients of the named parameters."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)


def build_optimizer(
    model: nn.Module, lr: float, weight_decay: float, *, amsgrad: bool = False, train_temperature: bool = False
) -> torch.optim.AdamW:
    """Build AdamW with the published parameter groups, betas and eps (PyTorch's defaults).

    Args:
        model: a network of lib.models, not wrapped.
        lr: initial learning rate.
        weight_decay: weight decay of the group ``decay``.
        amsgrad: use the AMSGrad variant.
        train_temperature: as in :func:`group_parameter_names`.
    """
    parameters = dict(model.named_parameters())
    groups = group_parameter_names(list(parameters), train_temperature=train_temperature, network=network_of(model))
    assert len(parameters) == sum(map(len, groups)), "A parameter is in no group or in two groups."
    return torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in groups.no_decay], "weight_decay": 0.0},
            {"params": [parameters[name] for name in groups.decay], "weight_decay": weight_decay},
        ],
        lr=lr,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        fused=True,
    )


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build the schedule lr · (1 − step/total_steps)^0.9, stepped after every optimizer step.

    Args:
        optimizer: its learning rates are scaled.
        total_steps: optimizer steps of the whole training; after them the rate is 0.
        warmup_steps: number of first steps in which the rate increases linearly to the curve (published: 0).

    Raises:
        ValueError: ``total_steps`` is less than 1, or ``warmup_steps`` is negative or larger than ``total_steps``.
    """
    if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            "total_steps must be at least 1 and warmup_steps between 0 and total_steps, "
            f"not {total_steps} and {warmup_steps}."
        )

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (warmup_steps + 1))
        return warm * max(0.0, 1 - step / total_steps) ** POLY_POWER

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
