"""The evaluate loop, predict and the pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from CrossVLT import CrossVLTOutput
from lib.evaluation import evaluate, predict
from lib.visualize import PREDICTION_COLOR, overlay, panel, sheet
from utils import StoppedError


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
    result = evaluate(model, [perfect, half], num_expressions=3, keep_masks={0, 2})
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
        evaluate(Echo(), [batch], num_expressions=2)


def test_predict_at_another_size():
    images = torch.full((1, 3, 4, 4), -1.0)
    images[:, :, :2] = 1.0
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert predict(Echo().eval(), images, ids, ids)[0].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    mask = predict(Echo().eval(), images, ids, ids, size=(8, 6))[0]
    assert (mask.shape, mask.dtype) == ((8, 6), torch.bool)
    assert mask[:4].all()
    assert not mask[4:].any()


def test_evaluation_can_be_stopped_between_batches():
    seen = []
    batches = [batch_of([i], [[[1, 0]]]) for i in range(3)]

    def asked():
        seen.append(None)
        return len(seen) > 1

    model = Echo().train()
    with pytest.raises(StoppedError):
        evaluate(model, batches, num_expressions=3, stop_asked=asked)
    assert len(seen) == 2  # before the first batch and before the second
    assert model.training


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
