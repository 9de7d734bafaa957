"""The loss and its terms, compared with values computed by hand."""

import math

import pytest
import torch

from CrossVLT import CrossVLTOutput
from lib.criterion import CrossVLTCriterion


def output_of(logits, similarity=None):
    similarities = None if similarity is None else tuple(torch.full((1, 1, 2, 2), similarity) for _ in range(4))
    return CrossVLTOutput(torch.tensor(logits).reshape(1, 2, 1, 2), similarities)


def softplus(x):
    return math.log1p(math.exp(x))


def test_cross_entropy_is_a_weighted_mean():
    # Pixel 0 is background, with logits (2, 0). Pixel 1 is the object, with logits (1, 3).
    output = output_of([2.0, 1.0, 0.0, 3.0])
    masks = torch.tensor([[[0, 1]]])
    losses = CrossVLTCriterion(alignment=False)(output, masks)
    expected = (0.9 * softplus(-2) + 1.1 * softplus(-2)) / (0.9 + 1.1)
    assert losses["segmentation"].item() == pytest.approx(expected, rel=1e-6)
    assert losses["loss"].item() == pytest.approx(2 * expected, rel=1e-6)
    assert losses["alignment"].numel() == 0
    wrong = CrossVLTCriterion(alignment=False)(output, 1 - masks)
    assert wrong["segmentation"].item() == pytest.approx((1.1 * softplus(2) + 0.9 * softplus(2)) / 2, rel=1e-6)


def test_cross_entropy_is_divided_by_the_sum_of_the_class_weights():
    masks = torch.tensor([[[0, 1]]])
    losses = CrossVLTCriterion(alignment=False)(output_of([0.0, 5.0, 0.0, 0.0]), masks)
    assert losses["segmentation"].item() == pytest.approx((0.9 * math.log(2) + 1.1 * softplus(5)) / 2, rel=1e-6)


def test_alignment_is_a_plain_mean_over_pixels():
    masks = torch.zeros(1, 4, 6, dtype=torch.long)
    masks[:, :2, :3] = 1  # a quarter
    output = CrossVLTOutput(torch.zeros(1, 2, 4, 6), tuple(torch.full((1, 1, 2, 2), 0.7) for _ in range(4)))
    losses = CrossVLTCriterion()(output, masks)
    expected = 0.25 * softplus(-0.7) + 0.75 * softplus(0.7)
    assert losses["alignment"].tolist() == pytest.approx([expected] * 4, rel=1e-6)
    assert losses["loss"].item() == pytest.approx(2 * math.log(2) + 4 * expected, rel=1e-6)


def test_similarity_maps_are_upsampled_with_aligned_corners():
    ramp = torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2)
    output = CrossVLTOutput(torch.zeros(1, 2, 3, 3), (ramp,) * 4)
    term = CrossVLTCriterion()(output, torch.zeros(1, 3, 3, dtype=torch.long))["alignment"][0]
    assert term.item() == pytest.approx((softplus(0) + softplus(0.5) + softplus(1)) / 3, rel=1e-6)


def test_losses_of_a_bf16_output_are_float32():
    output = CrossVLTOutput(torch.zeros(1, 2, 2, 2).bfloat16(), (torch.zeros(1, 1, 2, 2).bfloat16(),) * 4)
    losses = CrossVLTCriterion()(output, torch.ones(1, 2, 2, dtype=torch.long))
    assert {value.dtype for value in losses.values()} == {torch.float32}


def test_outputs_and_masks_that_do_not_fit_are_rejected():
    with pytest.raises(ValueError, match="return_similarities"):
        CrossVLTCriterion()(output_of([0.0] * 4), torch.tensor([[[0, 1]]]))
    with pytest.raises(ValueError, match=r"\(1, 3, 3\) do not fit"):
        CrossVLTCriterion()(output_of([0.0] * 4, 0.0), torch.zeros(1, 3, 3, dtype=torch.long))
