"""Overlays, colors of alignment maps, panels of any shape and text, contact sheets."""

import numpy as np
import pytest
from PIL import Image

from lib import visualize
from lib.drawing import Box, Drawing, PlacedImage
from lib.errors import UserError
from lib.visualize import (
    CELL,
    CELLS_PER_ROW,
    CONTRAST,
    HEAT,
    HEAT_COLORS,
    MARGIN,
    MAX_CHARACTERS,
    MAX_SHEET_WIDTH,
    MODEL_COLORS,
    PREDICTION_COLOR,
    TARGET_COLOR,
    Cell,
    Prediction,
    Style,
    heat_overlay,
    overlay,
    parse_style,
)

GRAY = Image.new("RGB", (80, 60), (90, 90, 90))
NOTHING = np.zeros((60, 80), bool)
CELL_HEIGHT = CELL * 60 // 80
MAPS = [np.full((side, side), value, np.float32) for side, value in ((8, -1), (4, -0.5), (2, 0), (1, 1))]


def expression_panel(*args, **kwargs):
    return visualize.expression_panel(*args, **kwargs).render()


def panel(*args, **kwargs):
    return visualize.panel(*args, **kwargs).render()


def contact_sheet(images, **kwargs):
    drawings = [Drawing(*image.size, [PlacedImage(Box(0, 0, *image.size), image)]) for image in images]
    return visualize.contact_sheet(drawings, **kwargs).render()


def heat(value, lightness=90):
    """Return the color of a value on the default scale over a gray image."""
    stops = np.linspace(-1, 1, len(HEAT_COLORS))
    color = [np.interp(value, stops, channel) for channel in zip(*HEAT_COLORS, strict=True)]
    return HEAT * np.array(color) + (1 - HEAT) * (255 - CONTRAST * (255 - lightness))


def cells(drawn, rows, bottom):
    """Return the cells of a panel of GRAY by row and column, found from its bottom; a title is 39 pixels high."""
    pixels, pitch = np.asarray(drawn).astype(int), CELL_HEIGHT + 39
    tops = [drawn.height - bottom - (rows - row) * pitch + 27 for row in range(rows)]
    lefts = range(MARGIN, drawn.width - MARGIN, CELL + MARGIN)
    return [[pixels[top : top + CELL_HEIGHT, left : left + CELL] for left in lefts] for top in tops]


def close(pixels, color, tolerance=1.0):
    return np.abs(pixels - np.array(color)).max(-1) <= tolerance


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
    with pytest.raises(ValueError, match=r"The mask has shape \(40, 30\)"):
        overlay(image, mask.T)


@pytest.mark.parametrize("value", [-7, -1, -0.3, 0, 0.8, 1, 7, -np.inf, np.inf])
def test_the_color_of_a_map_is_that_of_its_value(value):
    drawn = np.asarray(heat_overlay(GRAY, np.full((3, 5), value, np.float32)))
    assert drawn.shape == (60, 80, 3)
    assert close(drawn, heat(np.clip(value, -1, 1)), 0.51).all()


def test_the_color_scale_is_symmetric():
    blue, white, red = heat(-1), heat(0), heat(1)
    assert blue[2] > blue[0] + 50
    assert red[0] > red[2] + 50
    assert np.ptp(white) == 0
    luminance = np.array(HEAT_COLORS) @ (0.2126, 0.7152, 0.0722)
    half = len(HEAT_COLORS) // 2
    assert (np.diff(luminance[: half + 1]) > 0).all()
    assert np.abs(luminance - luminance[::-1]).max() < 40  # so that neither side dominates when printed in gray
    shifted = np.asarray(heat_overlay(GRAY, np.full((2, 2), -3.0), -4, -2))
    assert close(shifted, white, 0.51).all()
    for low, high in ((1, 1), (1, -1), (0, np.nan)):
        with pytest.raises(ValueError, match="scale"):
            heat_overlay(GRAY, np.ones((2, 2)), low, high)


def test_maps_are_resized_smoothly_and_leave_the_image_visible():
    row = np.asarray(heat_overlay(GRAY, np.array([[-1.0, 1.0]])))[30].astype(int)
    assert (np.diff(row[:, 0] - row[:, 2]) >= 0).all()  # from blue to red
    assert close(row[0], heat(-1)).all()
    assert close(row[-1], heat(1)).all()
    assert len(np.unique(row, axis=0)) > 20
    dark, light = (
        heat_overlay(Image.new("RGB", (1, 1), (v, v, v)), np.ones((1, 1))).getpixel((0, 0)) for v in (0, 255)
    )
    assert max(np.subtract(light, dark)) > 40
    assert np.asarray(heat_overlay(GRAY, np.full((2, 2), np.nan, np.float32))).max() == 0
    assert np.asarray(heat_overlay(GRAY, np.array([[np.inf, 0.0]]))).min() > 0  # infinity is clipped


def test_a_panel_shows_image_target_and_prediction_in_order():
    target = NOTHING.copy()
    target[10:40, 10:40] = True
    drawn = expression_panel(GRAY, target, [Prediction("a", ~target, 0.0)], "x")
    assert drawn.width == MARGIN + 3 * (CELL + MARGIN)
    ((original, expected, predicted),) = cells(drawn, 1, bottom=8)
    assert close(original, (90, 90, 90)).all()
    inside = np.kron(target, np.ones((4, 4))).astype(bool)
    for image, area, color in ((expected, inside, TARGET_COLOR), (predicted, ~inside, PREDICTION_COLOR)):
        tinted = ~close(image, (90, 90, 90), 3)
        assert tinted[area].mean() > 0.99  # resampling blurs the outline by a pixel
        assert tinted[~area].mean() < 0.05
        assert close(image, color).any()
        assert (np.diff(image[80, 80]) * np.diff(color) > 0).all() == area[80, 80]  # the hue of model or target


def test_masks_of_other_sizes_are_resized_by_nearest_neighbor():
    small = np.zeros((3, 4), bool)
    small[1, 2] = True
    enlarged = np.kron(small, np.ones((20, 20))).astype(bool)
    first, second = (expression_panel(GRAY, NOTHING, [Prediction("a", mask, 0.5)], "x") for mask in (small, enlarged))
    assert np.array_equal(np.asarray(first), np.asarray(second))
    ((_, _, drawn),) = cells(first, 1, bottom=8)
    marked = ~close(drawn, (90, 90, 90), 3)
    assert marked[82:158, 162:238].all()
    assert not marked[:78].any()
    assert not marked[162:].any()
    assert not marked[:, :158].any()
    assert not marked[:, 242:].any()
    # A mask of stripes, larger than it is drawn: nearest neighbor takes only the even or only the odd columns.
    stripes = np.tile([False, True], (960, 640))
    halves = [expression_panel(GRAY, NOTHING, [Prediction("a", mask, 0.5)], "x") for mask in (stripes, ~stripes)]
    whole, empty = (~close(cells(half, 1, bottom=8)[0][2], (90, 90, 90), 3) for half in halves)
    assert whole.all() != empty.all()
    assert whole.any() != empty.any()
    with pytest.raises(ValueError, match="The target has shape"):
        expression_panel(GRAY, small, [], "x")


def test_each_model_has_its_own_cell_and_color():
    full = [Prediction(str(i), ~NOTHING, 1.0) for i in range(7)]
    drawn = expression_panel(GRAY, ~NOTHING, full, "x")
    assert drawn.width == MARGIN + CELLS_PER_ROW * (CELL + MARGIN)
    images = [image for row in cells(drawn, 3, bottom=8) for image in row]
    colors = [TARGET_COLOR, *MODEL_COLORS, PREDICTION_COLOR]
    for image, color in zip(images[1:], colors, strict=False):
        assert close(image[:2, 20:300], color, 12).any()  # the outline along the image's edge
        assert (~close(image, (90, 90, 90))).all()
    assert all((image == 255).all() for image in images[9:])
    assert len(set(colors)) == 1 + len(MODEL_COLORS)


def test_maps_have_a_row_per_model_and_a_fixed_scale():
    without_maps = Prediction("b", NOTHING, 0.0)
    for predictions, rows in (
        ([Prediction("a", NOTHING, 0.0, MAPS)], 2),
        ([Prediction("a", NOTHING, 0.0, MAPS), without_maps], 2),
        ([Prediction("a", NOTHING, 0.0, MAPS), Prediction("b", NOTHING, 0.0, MAPS[::-1])], 3),
    ):
        drawn = expression_panel(GRAY, NOTHING, predictions, "x")
        found = cells(drawn, rows, bottom=8 + 28)
        for row, values in zip(found[1:], ((-1, -0.5, 0, 1), (1, 0, -0.5, -1)), strict=False):
            assert all(close(image, heat(value)).all() for image, value in zip(row, values, strict=True))
        bar = np.asarray(drawn)[-28, -(CELL + MARGIN) : -MARGIN]
        for value in (-0.9, 0, 0.9):
            assert close(bar, heat(value, 255), 4).any()
    wide = expression_panel(GRAY, NOTHING, [Prediction("a", NOTHING, 0.0, MAPS)], "x", style=Style(scale=(-2, 2)))
    assert close(cells(wide, 2, bottom=36)[1][0], heat(-0.5)).all()


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((300, 100), "left " * 60),
        ((50, 400), "w" * 300),
        ((1, 1), ""),
        ((2000, 1), "«café» – ☃ 狗\n\t\0 \ud800"),
        ((1, 2000), "dog"),
    ],
)
def test_panels_of_any_shape_and_sentence(size, sentence):
    mask = np.ones(size[::-1], bool)
    models = [Prediction(f"a rather long name of a model/{i} " * 3, ~mask, 0.1, MAPS) for i in range(2)]
    drawn = expression_panel(Image.new("RGB", size, "blue"), mask, models, sentence, "a note " * 60)
    pixels = np.asarray(drawn)
    assert drawn.width == MARGIN + CELLS_PER_ROW * (CELL + MARGIN)
    assert pixels[:MARGIN].min() == 255  # no text runs over an edge
    assert pixels[:, : MARGIN - 2].min() == 255
    assert pixels[:, 2 - MARGIN :].min() == 255
    assert pixels[-8:].min() == 255
    assert (pixels == TARGET_COLOR).all(-1).any()


def test_titles_stay_inside_their_cell():
    """A long title loses its middle and keeps its score; the next title does not move."""
    drawn = [
        panel(GRAY, [Cell(name, GRAY, TARGET_COLOR, "IoU 0.50"), Cell("b", GRAY)], "x") for name in ("m", "m" * 90)
    ]
    short, long = (np.asarray(image)[: -CELL_HEIGHT - 20].astype(int) for image in drawn)
    changed = np.nonzero((short != long).any((0, 2)))[0]
    assert changed.min() > MARGIN + (CELL + MARGIN)
    assert MARGIN + 2 * CELL < changed.max() <= 2 * (MARGIN + CELL)


def test_panels_of_a_contact_sheet_are_aligned():
    sizes = ((300, 100), (200, 50), (250, 70), (310, 20), (10, 10))
    panels = [Image.new("RGB", size, color) for size, color in zip(sizes, MODEL_COLORS, strict=False)]
    together = contact_sheet(panels, columns=2)
    assert together.size == (300 + 310, 100 + 70 + 10)
    for (left, top), color in zip(((0, 0), (300, 0), (0, 101), (300, 101), (0, 171)), MODEL_COLORS, strict=False):
        assert together.getpixel((left, top)) == color
    assert together.getpixel((305, 175)) == (255, 255, 255)
    assert contact_sheet(panels[:1], columns=3).size == (300, 100)


def test_contact_sheets_are_no_wider_than_a_page_by_default():
    for width, columns in ((MAX_SHEET_WIDTH + 1, 1), (MAX_SHEET_WIDTH // 2 + 1, 1), (MAX_SHEET_WIDTH // 2, 2), (9, 5)):
        assert contact_sheet([Image.new("RGB", (width, 10))] * 5).width == columns * width
    plain = expression_panel(GRAY, NOTHING, [Prediction("a", NOTHING, 0.0)], "x")
    with_maps = expression_panel(GRAY, NOTHING, [Prediction("a", NOTHING, 0.0, MAPS)], "x")
    assert contact_sheet([plain] * 4).size == (2 * plain.width, 2 * plain.height)
    assert contact_sheet([with_maps] * 2).size == (with_maps.width, 2 * with_maps.height)


def test_very_long_sentences_are_shortened():
    """Drawing a million characters would take minutes."""
    longest = panel(GRAY, [], "w" * MAX_CHARACTERS)
    assert panel(GRAY, [], "wider words " * 100_000).height <= longest.height
    assert panel(GRAY, [], "w" * 1_000_000, note="n" * 1_000_000).width == longest.width


def test_colors_and_scale_are_selectable():
    style = parse_style("red, #00ff00", [-0.5, 0.25])
    assert style.scale == (-0.5, 0.25)
    assert style.colors[:2] == ((255, 0, 0), (0, 255, 0))
    assert parse_style(None, None) == Style()
    models = [Prediction(name, ~NOTHING, 1.0, MAPS) for name in "ab"]
    found = cells(expression_panel(GRAY, ~NOTHING, models, "x", style=style), 3, bottom=8 + 28)
    for image, color in zip(found[0][1:], (TARGET_COLOR, *style.colors), strict=False):
        assert close(image[:2, 20:300], color, 12).any()
    for image, value in zip(found[1], (-1, -1, 1 / 3, 1), strict=True):  # -1, -0.5, 0 and 1 on this scale
        assert close(image, heat(value)).all()
    for colors, scale, message in (
        ("redd", None, "--vis-color redd: not a color"),
        ("red,", None, "--vis-color : not a color"),
        (None, [1.0, 1.0], "--vis-scale 1 1: the first number must be lower"),
        (None, [0.0, float("nan")], "--vis-scale 0 nan"),
        (None, [0.0, float("inf")], "--vis-scale 0 inf"),
    ):
        with pytest.raises(UserError, match=message):
            parse_style(colors, scale)
