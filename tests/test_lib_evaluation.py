"""The evaluate loop, predict, one training epoch and the pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from CrossVLT import CrossVLTOutput
from lib.criterion import CrossVLTCriterion
from lib.engine import train_one_epoch, training_step
from lib.evaluation import evaluate, predict
from lib.optim import build_lr_scheduler, build_optimizer
from lib.visualize import PREDICTION_COLOR, overlay, panel, sheet
from utils import UserError


class Echo(torch.nn.Module):
    """Predicts as the object what is above 0 in the picture's first channel."""

    def forward(self, images, input_ids, attention_mask, return_similarities=None):
        assert not torch.is_grad_enabled()
        assert not self.training
        return CrossVLTOutput(torch.stack([-images[:, 0], images[:, 0]], dim=1), None)


def batch_of(indices, masks, images=None):
    masks = torch.tensor(masks)
    images = masks.float()[:, None].expand(-1, 3, -1, -1) - 0.5 if images is None else images
    ids = torch.zeros(len(indices), 4, dtype=torch.long)
    return {"image": images, "input_ids": ids, "attention_mask": ids, "mask": masks, "index": torch.tensor(indices)}


def test_evaluate_counts_pixels_in_order():
    model = Echo().train()
    perfect = batch_of([2], [[[1, 1], [0, 0]]])
    half = batch_of(
        [0, 1], [[[1, 1], [0, 0]], [[0, 0], [0, 0]]], torch.tensor([[1.0, -1], [-1, -1]]).expand(2, 3, 2, 2)
    )
    result = evaluate(model, [perfect, half], num_expressions=3, device=torch.device("cpu"), keep_masks={0, 2})
    assert [tuple(row) for row in result.expressions] == [(0, 1, 2), (1, 0, 1), (2, 2, 2)]
    assert result.metrics["mIoU"] == pytest.approx(50)
    assert result.metrics["oIoU"] == pytest.approx(60)
    assert set(result.masks) == {0, 2}
    assert result.masks[0].tolist() == [[True, False], [False, False]]
    assert model.training  # left as it was


@pytest.mark.parametrize("indices", [[0, 0], [0], [0, 1, 2]])
def test_evaluate_insists_on_every_expression_once(indices):
    batch = batch_of(indices, [[[1, 0]]] * len(indices))
    with pytest.raises(RuntimeError, match="judged twice or never"):
        evaluate(Echo(), [batch], num_expressions=2, device=torch.device("cpu"))


def test_predict_at_another_size():
    images = torch.full((1, 3, 4, 4), -1.0)
    images[:, :, :2] = 1.0
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert predict(Echo().eval(), images, ids, ids)[0].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    mask = predict(Echo().eval(), images, ids, ids, size=(8, 6))[0]
    assert (mask.shape, mask.dtype) == ((8, 6), torch.bool)
    assert mask[:4].all()
    assert not mask[4:].any()


def training_parts(model, lr=1e-3):
    optimizer = build_optimizer(model, lr=lr, weight_decay=0.0)
    return model, CrossVLTCriterion(), optimizer, build_lr_scheduler(optimizer, 10)


def as_batch(images, ids, text_mask, masks):
    return {"image": images, "input_ids": ids, "attention_mask": text_mask, "mask": masks, "index": torch.arange(2)}


def test_a_step_clips_and_reports(small_model, small_inputs):
    parts = training_parts(small_model(drop_path_rate=0.0, text_dropout=0.0).train())
    batch, device = as_batch(*small_inputs()), torch.device("cpu")
    values = training_step(*parts, batch, device=device, clip_grad=0.0)
    assert values["loss"] == pytest.approx(
        2 * values["segmentation"] + sum(values[f"alignment{i}"] for i in (1, 2, 3, 4)), rel=1e-5
    )
    assert values["lr"] == 1e-3
    assert parts[2].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.9**0.9)
    clipped = training_parts(small_model(drop_path_rate=0.0, text_dropout=0.0).train())
    again = training_step(*clipped, batch, device=device, clip_grad=0.5 * values["grad_norm"])
    assert again["grad_norm"] == pytest.approx(values["grad_norm"], rel=1e-5)  # told before clipping
    norm = torch.stack(
        [p.grad.norm() for g in clipped[2].param_groups for p in g["params"] if p.grad is not None]
    ).norm()
    assert norm.item() == pytest.approx(0.5 * values["grad_norm"], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_update(small_model, small_inputs):
    parts = training_parts(small_model().train())
    batch = as_batch(*small_inputs())
    batch["image"] = batch["image"] * float("nan")
    before = [p.detach().clone() for p in parts[0].parameters()]

    def step(batch):
        return training_step(*parts, batch, device=torch.device("cpu"))

    with pytest.raises(UserError, match=r"epoch 1, step 8: the loss is nan on samples \[0, 1\]"):
        train_one_epoch(
            step, [batch], title="epoch 1", first_step=7, total_steps=9, print_freq=1, log=print, show_bar=False
        )
    assert all(torch.equal(a, b) for a, b in zip(before, parts[0].parameters(), strict=True))


def test_an_epoch_ends_with_the_training():
    lines = []
    done = train_one_epoch(
        lambda batch: {"loss": batch, "segmentation": 0.5, "alignment1": 1.0, "lr": 0.1, "grad_norm": 2.0},
        [1.0, 2.0, 3.0, 4.0, 5.0], title="epoch 3", first_step=6, total_steps=9, print_freq=2, log=lines.append,
        show_bar=False,
    )  # fmt: skip
    assert (done["steps"], done["loss"]) == (3, 2.0)
    assert [line.split("  ")[0] for line in lines] == ["epoch 3 step 8/9", "epoch 3 step 9/9"]
    assert "loss 1.5000" in lines[0]  # the mean since the last line
    assert "loss 3.0000" in lines[1]


def test_overlay_tints_the_mask_only():
    image = Image.new("RGB", (40, 30), (100, 100, 100))
    mask = np.zeros((30, 40), bool)
    mask[5:25, 10:30] = True
    drawn = np.asarray(overlay(image, mask))
    assert (drawn[~mask] == 100).all()
    assert (drawn[5, 10:30] == PREDICTION_COLOR).all()  # the outline
    inside = drawn[15, 20].astype(int)
    assert inside[0] > 100 > inside[2]
    assert np.array_equal(np.asarray(overlay(image, np.zeros((30, 40), bool))), np.asarray(image))
    with pytest.raises(ValueError, match="doesn't fit"):
        overlay(image, mask.T)


def test_panels_of_any_shape_and_sentence():
    panels = []
    for size, sentence in (((300, 100), "a dog"), ((50, 400), "left " * 60), ((1, 1), "«café» – ☃ 狗"), ((64, 64), "")):
        mask = np.ones(size[::-1], bool)
        panels.append(panel(Image.new("RGB", size, "blue"), mask, ~mask, sentence, "a note"))
        assert np.asarray(panels[-1]).min() < 50 < np.asarray(panels[-1]).max()
    together = sheet(panels)
    assert together.height == max(p.height for p in panels[:2]) + max(p.height for p in panels[2:])
    assert together.width == max(panels[0].width, panels[2].width) + max(panels[1].width, panels[3].width)
