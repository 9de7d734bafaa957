"""Pictures: overlays, the maps' colours, panels of any shape and text, sheets."""

import numpy as np
import pytest
from PIL import Image

from lib.visualize import (
    ALIGNED_COLOR,
    APART_COLOR,
    CELL_HEIGHT,
    CELL_WIDTH,
    MOST_HEAT,
    PREDICTION_COLOR,
    TRUTH_COLOR,
    Prediction,
    expression_panel,
    heat_overlay,
    overlay,
    sheet,
)


def has_color(picture, color):
    return (np.asarray(picture) == color).all(-1).any()


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


def test_the_maps_colours_are_a_fixed_function_of_their_values():
    image = Image.new("RGB", (60, 40), (0, 255, 0))
    grey = np.asarray(image.convert("L").convert("RGB"))[0, 0].astype(float)
    for value, color, strength in (
        (-1, APART_COLOR, 1),
        (1, ALIGNED_COLOR, 1),
        (0, grey, 0),
        (0.5, ALIGNED_COLOR, 0.5),
    ):
        for clipped in {value, 3 * value if abs(value) == 1 else value}:
            drawn = np.asarray(heat_overlay(image, np.full((3, 5), clipped, np.float32)))
            wanted = grey * (1 - MOST_HEAT * strength) + np.array(color) * MOST_HEAT * strength
            assert np.abs(drawn - wanted).max() <= 0.51
    assert np.array_equal(np.asarray(heat_overlay(image, np.ones((2, 2)), 1, 1))[0, 0], grey)  # a map of one value
    halves = np.asarray(heat_overlay(image, np.array([[-4.0, -2.0]]), -4, -2)).astype(int)
    assert (halves[:, 0, 2] > halves[:, 0, 0]).all()
    assert (halves[:, -1, 0] > halves[:, -1, 2]).all()


def test_a_panel_shows_truth_and_every_prediction():
    image, truth = Image.new("RGB", (80, 60), (90, 90, 90)), np.zeros((60, 80), bool)
    truth[10:40, 10:40] = True
    nothing, small = np.zeros((60, 80), bool), np.zeros((6, 8), bool)
    small[1:3, 1:3] = True
    blank = expression_panel(image, nothing, [Prediction("a", nothing, 0.0)], "x")
    with_truth = expression_panel(image, truth, [Prediction("a", nothing, 0.0)], "x")
    whole = expression_panel(image, truth, [Prediction("a", small, 0.5)], "x")
    cell = (blank.width - 10) // 3
    for other, column in ((blank, 1), (whole, 2)):
        changed = np.nonzero((np.asarray(with_truth) != np.asarray(other)).any(-1))[1]
        assert changed.min() >= 10 + column * cell
        assert changed.max() <= 10 + (column + 1) * cell
    # A mask of a tenth of the size is drawn ten times as large, by nearest neighbour.
    tinted = np.array(Image.new("RGB", (80, 60), (90, 90, 90)))
    enlarged = overlay(Image.fromarray(tinted), np.kron(small, np.ones((10, 10))).astype(bool))
    shown = expression_panel(image, truth, [Prediction("a", np.kron(small, np.ones((10, 10))).astype(bool), 0.5)], "x")
    assert np.array_equal(np.asarray(shown), np.asarray(whole))
    assert has_color(enlarged, PREDICTION_COLOR)
    assert has_color(overlay(image, truth, TRUTH_COLOR), TRUTH_COLOR)
    several = expression_panel(image, truth, [Prediction(name, small, 0.5) for name in "abc"], "x")
    assert several.width == 10 + 5 * cell


def test_maps_have_rows_of_their_own_and_one_scale():
    image, mask = Image.new("RGB", (80, 60), (90, 90, 90)), np.zeros((60, 80), bool)
    maps = [np.full((side, side), value, np.float32) for side, value in ((8, -1.0), (4, 0.0), (2, 0.5), (1, 1.0))]
    plain = expression_panel(image, mask, [Prediction("a", mask, 0.0)], "x")
    one = expression_panel(image, mask, [Prediction("a", mask, 0.0, maps)], "x")
    two = expression_panel(image, mask, [Prediction(name, mask, 0.0, maps) for name in "ab"], "x")
    assert plain.height < one.height < two.height
    assert one.width == two.width > plain.width
    for color in (APART_COLOR, ALIGNED_COLOR):
        found = (1 - MOST_HEAT) * 90 + MOST_HEAT * np.array(color)
        assert (np.abs(np.asarray(one).astype(float) - found).max(-1) < 1).sum() > 1000
        assert (np.abs(np.asarray(plain).astype(float) - found).max(-1) < 1).sum() == 0


@pytest.mark.parametrize("size", [(300, 100), (50, 400), (1, 1), (2000, 30), (64, 64)])
@pytest.mark.parametrize("sentence", ["a dog", "left " * 60, "«café» – ☃ 狗", "", "w" * 300])
def test_panels_of_any_shape_and_sentence(size, sentence):
    mask = np.ones(size[::-1], bool)
    predictions = [Prediction("a rather long name of a model/best", ~mask, 0.123, [np.eye(4, dtype=np.float32)] * 4)]
    drawn = expression_panel(Image.new("RGB", size, "blue"), mask, predictions, sentence, "a note " * 9)
    assert drawn.width <= 10 + 4 * (CELL_WIDTH + 10)
    assert drawn.height < 2 * CELL_HEIGHT + 700
    pixels = np.asarray(drawn)
    assert pixels.min() < 90 < pixels.max()
    assert (pixels[:, -8:] == 255).all()  # no text runs over the edge
    assert (pixels[-5:] == 255).all()


def test_sheets_are_aligned():
    panels = [
        Image.new("RGB", (width, height), "blue") for width, height in ((300, 100), (200, 50), (250, 70), (310, 20))
    ]
    together = sheet(panels)
    assert together.size == (300 + 20 + 310, 100 + 20 + 70)
    pixels = np.asarray(together)
    assert (pixels[0, 320] == (0, 0, 255)).all()  # the second column begins behind the widest of the first
    assert (pixels[120, 0] == (0, 0, 255)).all()
    assert sheet([Image.new("RGB", (1500, 10))] * 3).size == (1500, 70)  # wide ones below each other
    assert sheet(panels[:1]).size == (300, 100)
    assert sheet(panels, columns=3).width == 310 + 20 + 200 + 20 + 250
