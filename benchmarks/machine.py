"""Helpers of several benchmarks: a description of the machine, and random inputs of the network."""

import platform
from importlib.metadata import version

import torch

from lib.variants import MAX_TOKENS


def machine(device: torch.device) -> str:
    """Return a description of the hardware and the versions of the libraries."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return (
        f"{hardware}; Python {platform.python_version()}, torch {torch.__version__}, timm {version('timm')}, "
        f"transformers {version('transformers')}"
    )


def cpu_name() -> str:
    """Return the CPU's name, or the architecture if the system does not report a name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def random_inputs(
    batch_size: int, img_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random images [B, 3, S, S], and input_ids and attention_mask [B, 21] of sentences without padding."""
    images = torch.randn(batch_size, 3, img_size, img_size, device=device, dtype=dtype)
    input_ids = torch.randint(1000, 30000, (batch_size, MAX_TOKENS), device=device)
    return images, input_ids, torch.ones_like(input_ids)
