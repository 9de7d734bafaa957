"""Draw masks and alignment maps: overlays, a panel per expression, a contact sheet of panels. Imports no torch.

Shapes: H×W the image; h×w a mask or an alignment map of any size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor

from lib.charts import check_format
from lib.drawing import Box, Color, Drawing, PlacedImage, Rectangle, Text
from lib.errors import UserError
from lib.fonts import TextFont, load_font

# Okabe and Ito's colors, which color-blind readers can distinguish. Green is always the target.
TARGET_COLOR = (0, 158, 115)
MODEL_COLORS = ((213, 94, 0), (86, 180, 233), (240, 228, 66), (204, 121, 167), (0, 114, 178), (230, 159, 0))
PREDICTION_COLOR = MODEL_COLORS[0]
BLACK, GRAY, RULE_COLOR = (0, 0, 0), (110, 110, 110), (215, 215, 215)
TINT = 100  # opacity out of 255; the colors of the object stay recognizable
# Every second color of ColorBrewer's RdBu, evenly spaced over the scale. The lightness shows the distance from zero.
HEAT_COLORS = ((33, 102, 172), (146, 197, 222), (255, 255, 255), (244, 165, 130), (178, 24, 43))
HEAT = 0.65  # opacity of the map's color over the image in light gray
CONTRAST = 0.7  # of the gray image, so that black does not look like a dark color of the map
SCALE = (-1.0, 1.0)  # range of a cosine

# In pixels. If four cells are printed 7 inches wide, the letters are 6 to 9 points high.
CELL, CELLS_PER_ROW = 320, 4
MARGIN, GAP = 12, 8
SENTENCE_SIZE, TITLE_SIZE, NOTE_SIZE = 24, 19, 16
MAX_SHEET_WIDTH = 2200
MAX_PANELS = 60  # on a contact sheet
MAX_CHARACTERS = 400  # of a sentence or a note in a panel
OVERSAMPLING = 2  # masks are drawn at twice the size shown, for smooth outlines


class Cell(NamedTuple):
    """An image of a panel with its title. ``color``, shown before the title, identifies the mask or model."""

    title: str
    image: Image.Image
    color: Color | None = None
    score: str = ""


class Prediction(NamedTuple):
    """Output of one model for one expression."""

    name: str  # of the model
    mask: np.ndarray  # bool [h, w]
    iou: float  # 0–1
    maps: Sequence[np.ndarray] | None = None  # alignment maps of the stages, finest first, float [h, w] each


class Style(NamedTuple):
    """How predictions are drawn."""

    colors: tuple[Color, ...] = MODEL_COLORS  # of the models' masks
    scale: tuple[float, float] = SCALE  # color scale of the maps, see :func:`heat_overlay`
    file_format: str = "png"  # one of lib.charts.FORMATS


DEFAULT_STYLE = Style()


def parse_style(colors: str | None, scale: Sequence[float] | None, file_format: str = "png") -> Style:
    """Return the style that flags select.

    Args:
        colors: names or #rrggbb, separated by commas: of the first models. None: the default.
        scale: LOW and HIGH. None: the default.
        file_format: one of lib.charts.FORMATS.

    Raises:
        UserError: a color is unknown, the scale is empty, or the format needs a package that is not installed.
    """
    check_format(file_format)
    chosen: tuple[Color, ...] = ()
    for name in colors.split(",") if colors is not None else ():
        try:
            chosen += (ImageColor.getrgb(name.strip())[:3],)
        except ValueError as error:
            raise UserError(f"--vis-color {name}: not a color. Pass a name, such as red, or #rrggbb.") from error
    low, high = scale or SCALE
    if not (low < high and np.isfinite([low, high]).all()):
        raise UserError(f"--vis-scale {low:g} {high:g}: the first number must be lower than the second.")
    others = tuple(color for color in MODEL_COLORS if color not in chosen)
    return Style(chosen + others, (low, high), file_format)


def spread_indices(length: int, count: int) -> list[int]:
    """Return at most ``count`` indices below ``length``, evenly spaced: the expressions to draw."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(int)).tolist()


def overlay(image: Image.Image, mask: np.ndarray, color: Color = PREDICTION_COLOR) -> Image.Image:
    """Return the image with a mask (bool [H, W]) tinted and outlined. ValueError: the mask has another size."""
    if mask.shape != image.size[::-1]:
        raise ValueError(f"The mask has shape {mask.shape}, the image {image.size[::-1]}.")
    area = Image.fromarray(mask.astype(np.uint8) * 255)
    tinted = Image.composite(Image.new("RGB", image.size, color), image, area.point(lambda v: v * TINT // 255))
    half = max(1, round(min(max(image.size) / 150, min(image.size) / 20)))
    side = 2 * half + 1  # a pixel is inside if the square with this side around it is within the mask and the image
    sums = np.pad(mask, ((half + 1, half), (half + 1, half))).astype(np.int64).cumsum(0).cumsum(1)
    inside = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side] == side**2
    outline = Image.fromarray((mask & ~inside).astype(np.uint8) * 255)
    tinted.paste(color, mask=outline)
    return tinted


def heat_overlay(image: Image.Image, values: np.ndarray, low: float = -1.0, high: float = 1.0) -> Image.Image:
    """Return the image in gray with a map drawn over it: blue at ``low``, white in the middle, red at ``high``.

    Args:
        image: RGB, any size.
        values: float [h, w]; resized to the image (bilinear).
        low, high: ends of the color scale; values beyond them are clipped. Use the same scale for maps to compare.

    Raises:
        ValueError: ``low`` is not below ``high``.
    """
    if not low < high:
        raise ValueError(f"The color scale from {low} to {high} is empty: low must be below high.")
    resized = Image.fromarray(values.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    channels, stops = zip(*HEAT_COLORS, strict=True), np.linspace(low, high, len(HEAT_COLORS))
    color = np.stack([np.interp(np.asarray(resized), stops, channel) for channel in channels], axis=-1)
    gray = 255 - CONTRAST * (255 - np.asarray(image.convert("L"), dtype=np.float32)[..., None])
    blended = HEAT * color + (1 - HEAT) * gray
    # NaN, from a diverged model, is drawn black.
    return Image.fromarray(np.rint(np.nan_to_num(blended)).astype(np.uint8))


def expression_panel(
    image: Image.Image,
    target: np.ndarray,
    predictions: Sequence[Prediction],
    sentence: str,
    note: str = "",
    style: Style = DEFAULT_STYLE,
) -> Drawing:
    """Return the image, the target mask and the predictions below the sentence, and each model's alignment maps.

    Args:
        image: RGB, any size.
        target: bool [H, W].
        predictions: one per model; with several models, titles contain their names. Masks are resized (nearest).
        sentence: the expression.
        note: origin of the expression, in small gray letters.
        style: colors of the models and scale of the maps.

    Raises:
        ValueError: the target has another size than the image.
    """
    cells, map_rows = mask_cells(image, target, predictions, style), []
    for cell, prediction in zip(cells[1:], predictions, strict=True):
        if prediction.maps is not None:
            suffix, tag = (f", {prediction.name}", cell.color) if len(predictions) > 1 else ("", None)
            resized = image.resize(cell.image.size, Image.Resampling.LANCZOS)
            heats = [heat_overlay(resized, values, *style.scale) for values in prediction.maps]
            map_rows.append([Cell(f"stage {stage}{suffix}", heat, tag) for stage, heat in enumerate(heats, 1)])
    return panel(image, cells, sentence, note, map_rows=map_rows, scale=style.scale)


def mask_cells(
    image: Image.Image, target: np.ndarray, predictions: Sequence[Prediction], style: Style = DEFAULT_STYLE
) -> list[Cell]:
    """Return the image with the target mask, and with each prediction. Arguments: see :func:`expression_panel`."""
    if target.shape != image.size[::-1]:
        raise ValueError(f"The target has shape {target.shape}, the image {image.size[::-1]}.")
    size = _fit(image.size, OVERSAMPLING * CELL)
    resized = image.resize(size, Image.Resampling.LANCZOS)

    def draw_mask(mask: np.ndarray, color: Color) -> Image.Image:
        fitted = Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        return overlay(resized, np.asarray(fitted, dtype=bool), color)

    cells = [Cell("ground truth", draw_mask(target, TARGET_COLOR), TARGET_COLOR)]
    for i, prediction in enumerate(predictions):
        color = style.colors[i % len(style.colors)]
        title = prediction.name if len(predictions) > 1 else "prediction"
        cells.append(Cell(title, draw_mask(prediction.mask, color), color, f"IoU {prediction.iou:.2f}"))
    return cells


def panel(
    image: Image.Image,
    cells: Sequence[Cell],
    sentence: str,
    note: str = "",
    *,
    map_rows: Sequence[Sequence[Cell]] = (),
    scale: tuple[float, float] = SCALE,
) -> Drawing:
    """Return the image and other cells side by side, in rows of four, below the sentence.

    Args:
        image: RGB, any size; all cells are resized to its aspect ratio.
        cells: shown after the image.
        sentence, note: long texts are wrapped, and shortened to ``MAX_CHARACTERS``.
        map_rows: rows of alignment maps, below the other rows.
        scale: values at the ends of the maps' color scale.
    """
    cells = [Cell("image", image), *cells]
    sentence, note = (s if len(s) <= MAX_CHARACTERS else f"{s[:MAX_CHARACTERS]}…" for s in (sentence, note))
    rows = [cells[i : i + CELLS_PER_ROW] for i in range(0, len(cells), CELLS_PER_ROW)] + list(map_rows)
    width = max(map(len, rows)) * (CELL + MARGIN) + MARGIN
    large, small = load_font(SENTENCE_SIZE), load_font(NOTE_SIZE)
    text = [(line, BLACK, SENTENCE_SIZE) for line in _wrap(f"“{sentence}”", large, width - 2 * MARGIN)]
    text += [(line, GRAY, NOTE_SIZE) for line in _wrap(note, small, width - 2 * MARGIN)]
    size = _fit(image.size, CELL)
    row_height = TITLE_SIZE + GAP + size[1] + MARGIN
    height = MARGIN + sum(s + GAP for *_, s in text) + GAP + len(rows) * row_height
    drawing, top = Drawing(width, height + (NOTE_SIZE + MARGIN if map_rows else 0) + GAP), MARGIN
    for line, color, line_height in text:
        drawing.items.append(Text(MARGIN, top, line, line_height, color))
        top += line_height + GAP
    top += GAP
    for row in rows:
        for i, cell in enumerate(row):
            left = MARGIN + i * (CELL + MARGIN)
            _draw_title(drawing, left, top, cell)
            drawing.items.append(PlacedImage(Box(left, top + TITLE_SIZE + GAP, *size), cell.image))
        top += row_height
    if map_rows:
        _draw_scale(drawing, width - MARGIN - CELL, top, scale)
    return drawing


def contact_sheet(panels: Sequence[Drawing], columns: int | None = None) -> Drawing:
    """Return the panels in rows of ``columns`` (default: as many as fit into ``MAX_SHEET_WIDTH``)."""
    if columns is None:
        columns = max(1, min(len(panels), MAX_SHEET_WIDTH // max(item.width for item in panels)))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    lefts = np.cumsum([0] + [max(item.width for item in panels[i::columns]) for i in range(len(rows[0]))]).tolist()
    tops = np.cumsum([0] + [max(item.height for item in row) for row in rows]).tolist()
    sheet = Drawing(lefts[-1], tops[-1])
    for row, top in zip(rows, tops, strict=False):
        for item, left in zip(row, lefts, strict=False):
            sheet.place(item, left, top)
        if top:
            sheet.items.append(Rectangle(Box(MARGIN, top, sheet.width - 2 * MARGIN, 1), RULE_COLOR))
    return sheet


def _fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return ``size`` scaled such that the longer side is ``side``."""
    return tuple(max(1, round(length * side / max(size))) for length in size)


def _draw_title(drawing: Drawing, left: int, top: int, cell: Cell) -> None:
    """Draw color, title and score in the width of a cell."""
    font, right = load_font(TITLE_SIZE), left + CELL
    if cell.color:
        drawing.items.append(Rectangle(Box(left, top + 4, TITLE_SIZE - 4, TITLE_SIZE - 4), cell.color))
        left += TITLE_SIZE + 1
    score = cell.score and f"  {cell.score}"
    title = _shorten(cell.title, font, right - left - font.getlength(score))
    drawing.items.append(Text(left, top, title, TITLE_SIZE, BLACK))
    drawing.items.append(Text(left + font.getlength(title), top, score, TITLE_SIZE, GRAY))


def _draw_scale(drawing: Drawing, left: int, top: int, scale: tuple[float, float]) -> None:
    """Draw the color scale of the maps with the values at its ends, as wide as a cell."""
    font = load_font(NOTE_SIZE)
    low, high = (f"{value:+.4g}".replace("-", "−") for value in scale)
    low, high = f"apart {low}", f"{high} aligned"
    start, stop = left + round(font.getlength(low)) + GAP, left + CELL - round(font.getlength(high)) - GAP
    bar = Image.new("RGB", (stop - start, NOTE_SIZE), "white")
    box = Box(start, top, *bar.size)
    drawing.items += [
        Text(left, top, low, NOTE_SIZE, GRAY),
        Text(stop + GAP, top, high, NOTE_SIZE, GRAY),
        PlacedImage(box, heat_overlay(bar, np.linspace(*SCALE, bar.width)[None])),
        Rectangle(box, RULE_COLOR, filled=False),
    ]


def _wrap(text: str, font: TextFont, width: float) -> list[str]:
    """Split the text into lines of at most ``width`` pixels. Longer words are broken."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for character in word:
            if font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def _shorten(text: str, font: TextFont, width: float) -> str:
    """Shorten a text to ``width`` pixels. The middle is removed, because names of runs often differ at their ends."""
    shortened, length = text, len(text)
    while length and font.getlength(shortened) > width:
        length -= 1
        shortened = f"{text[: length - length // 2]}…{text[len(text) - length // 2 :]}"
    return shortened
