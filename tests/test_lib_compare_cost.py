"""lib.compare.cost: parameters, operations and time of a checkpoint, measured once."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lib.checkpoint import read_checkpoint, rebuild, save_checkpoint
from lib.compare.cost import FILE, costs_of, measure
from lib.compare.plan import Model


class FakeRun(NamedTuple):
    model: Model
    checkpoint: Path


@pytest.fixture
def runs(small_model, tmp_path):
    """A model with a checkpoint, and one whose checkpoint is missing."""
    model, path = small_model(), tmp_path / "best.pth"
    config = {"DEVICE": "cpu", "DATA.IMG_SIZE": 64, "DATA.MAX_TOKENS": 7, "TRAIN.AMP": "off"}
    save_checkpoint(path, {"model": model.state_dict(), "model_config": model.config, "config": config})
    return [FakeRun(Model("ours", "", None), path), FakeRun(Model("other", "", None), tmp_path / "missing.pth")]


def test_the_cost_of_a_checkpoint(runs):
    checkpoint = read_checkpoint(runs[0].checkpoint)
    cost = measure(checkpoint)
    assert cost.parameters == sum(p.numel() for p in rebuild(checkpoint).parameters())
    assert cost.ms > 0
    assert cost.device.startswith("cpu")
    assert cost.gflop == pytest.approx(operations_of_hooks(checkpoint), rel=0.5)


def operations_of_hooks(checkpoint):
    """Count the multiply-adds of all linear layers and convolutions of a model by hooks, in 10⁹ operations."""
    model, total = rebuild(checkpoint).eval(), []
    for part in model.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.modules.conv._ConvNd):
            part.register_forward_hook(lambda part, _, out: total.append(2 * out.numel() * part.weight[0].numel()))
    size, tokens = (checkpoint.extra["config"][f"DATA.{name}"] for name in ("IMG_SIZE", "MAX_TOKENS"))
    ids = torch.ones(1, tokens, dtype=torch.long)
    with torch.inference_mode():
        model(torch.zeros(1, 3, size, size), ids, ids)
    return sum(total) / 1e9


def test_costs_are_measured_once(runs, tmp_path):
    costs = costs_of(runs, tmp_path)
    assert list(costs) == ["ours"]
    path = tmp_path / FILE
    stored = json.loads(path.read_text())
    (digest,) = stored
    path.write_text(json.dumps({digest: stored[digest] | {"ms": 12345}}))
    assert costs_of(runs, tmp_path)["ours"].ms == 12345
    path.write_text("{")
    assert costs_of(runs, tmp_path)["ours"].gflop == costs["ours"].gflop
