"""lib.engine.state: position, meters and random states survive a checkpoint."""

import random

import numpy as np
import pytest
import torch
from yacs.config import CfgNode

from lib.config import DEFAULTS
from lib.engine.state import build_train_state, random_states, restore_random_states, seed_everything
from lib.errors import UserError


def recipe(**changes):
    merged = DEFAULTS.TRAIN.clone()
    merged.merge_from_other_cfg(CfgNode({"EPOCHS": 3, **changes}))
    return merged


def test_position_and_meters_survive_a_checkpoint(tmp_path, small_model):
    state = build_train_state(small_model(), recipe(), steps_per_epoch=10)
    state.epoch, state.epoch_step, state.step, state.best_oIoU = 2, 3, 31, 41.5
    state.metrics, state.skipped = {"oIoU": 40.0}, 1
    state.recent.add({"loss": 0.1, "lr": 0.3})
    state.whole.add({"loss": 0.7})
    state.whole.add({"skipped": 1.0})
    torch.save(state.position(), tmp_path / "p.pth")
    loaded = build_train_state(small_model(), recipe(), steps_per_epoch=10)
    loaded.load_position({**torch.load(tmp_path / "p.pth", weights_only=True), "model": None})
    assert loaded.position() == state.position()
    loaded.whole.add({"loss": 0.9})
    assert loaded.whole.means() == {"loss": (0.7 + 0.9) / 2, "skipped": 1.0}  # each over the steps that reported it
    assert state.whole.means()["loss"] == 0.7  # the loaded meters are copies


def test_steps_of_epoch_and_training(small_model):
    state = build_train_state(small_model(), recipe(STEPS=25), steps_per_epoch=10)
    assert (state.total_steps, state.remaining_steps()) == (25, 10)
    for _ in range(4):
        state.count_step({"loss": 1.0})
    assert (state.step, state.remaining_steps(), state.is_finished) == (4, 6, False)
    state.step, state.epoch_step = 25, 5
    assert state.remaining_steps() == 0
    assert not state.is_finished  # the validation is missing
    state.epoch_step = 0
    assert state.is_finished
    assert build_train_state(small_model(), recipe(), steps_per_epoch=10).total_steps == 30


def test_a_warmup_longer_than_the_training_is_refused(small_model):
    with pytest.raises(UserError, match="--warmup_steps 31: the whole training has only 30 steps"):
        build_train_state(small_model(), recipe(WARMUP_STEPS=31), steps_per_epoch=10)


def test_random_states_survive_a_checkpoint(tmp_path):
    def draw():
        numbers = np.random.rand(3).tolist(), np.random.randn()
        return torch.rand(3).tolist(), *numbers, random.random(), random.gauss(0, 1)

    seed_everything(5)
    draw()
    torch.save(random_states(), tmp_path / "r.pth")
    expected = draw()
    assert draw() != expected
    restore_random_states(torch.load(tmp_path / "r.pth", weights_only=True))
    assert draw() == expected
