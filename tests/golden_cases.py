"""Weights and inputs of the golden cases. They are generated from names, so that only the outputs are stored."""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import DropPath

NUM_TOKENS = 21


class GoldenInputs(NamedTuple):
    images: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    masks: torch.Tensor


def generator(text: str) -> np.random.Generator:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(seed))


def normals(source: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(source.standard_normal(shape, dtype=np.float32))


def golden_value(key: str, entry: torch.Tensor) -> torch.Tensor:
    """Generate the value of one state-dict entry from its key."""
    if key.endswith(("num_batches_tracked", "relative_position_index")):
        return entry
    n = torch.from_numpy(np.asarray(generator(key).standard_normal(tuple(entry.shape), dtype=np.float32)))
    if key.endswith("running_mean"):
        return 0.1 * n
    if key.endswith("running_var") or key == "temp":
        return 1 + 0.1 * n.abs()
    if key.endswith("relative_position_bias_table"):
        return 0.2 * n
    if key == "classifier.conv1_1.bias":
        return 0.02 * n + torch.tensor([0.187, -0.187])
    if key.endswith(".bias"):
        return 0.02 * n
    if n.ndim == 1:
        return 1 + 0.1 * n
    value = n / float(np.sqrt(np.prod(entry.shape[1:])))
    # LAVT: twelve random BERT layers would make all words alike.
    return value / 4 if key.startswith("text_encoder.encoder.") and key.endswith("output.dense.weight") else value


def set_golden_weights(model: torch.nn.Module) -> torch.nn.Module:
    model.load_state_dict({key: golden_value(key, entry) for key, entry in model.state_dict().items()})
    return model


def _upsample(low: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize as for the recorded numbers: with one thread, PyTorch uses another kernel that rounds differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    try:
        return F.interpolate(low, size=(height, width), mode="bilinear", align_corners=False)
    finally:
        torch.set_num_threads(threads)


def golden_inputs(name: str, batch: int, height: int, width: int, tokens: int = NUM_TOKENS) -> GoldenInputs:
    source = generator(f"input:{name}")
    low = normals(source, (batch, 3, height // 16, width // 16))
    noise = normals(source, (batch, 3, height, width))
    images = _upsample(low, height, width) + 0.1 * noise
    lengths = source.integers(4, 21, size=batch)
    lengths[0] = tokens
    ids = np.zeros((batch, tokens), dtype=np.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[0] = 101
        row[1 : length - 1] = source.integers(1000, 30000, size=length - 2)
        row[length - 1] = 102
    attention_mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    masks = np.zeros((batch, height, width), dtype=np.int64)
    for mask in masks:
        y, x = source.integers(0, height // 2), source.integers(0, width // 2)
        h, w = source.integers(height // 8, height // 2), source.integers(width // 8, width // 2)
        mask[y : y + h, x : x + w] = 1
    return GoldenInputs(images, torch.from_numpy(ids), torch.from_numpy(attention_mask), torch.from_numpy(masks))


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
    return model


def check_golden_updates(model: torch.nn.Module, start: dict[str, torch.Tensor], recorded: dict[str, dict]) -> None:
    """Compare the changes of a model's parameters since ``start`` with the recorded ones.

    Parameters whose true gradient is 0, such as biases before a norm, are moved by rounding errors and not compared.
    """
    for name, parameter in model.named_parameters():
        expected, update = recorded[name], (parameter - start[name]).detach()
        if expected["norm"] == 0:
            assert torch.equal(parameter, start[name]), name
        elif expected["grad_rms"] is not None and expected["grad_rms"] > 1e-9:
            direction = normals(generator(f"update:{name}"), tuple(parameter.shape)).double()
            projection = (direction * update).sum().item()
            assert abs(update.norm().item() - expected["norm"]) <= 1e-3 * expected["norm"], name
            assert abs(projection - expected["projection"]) <= 1e-3 * expected["norm"], name
