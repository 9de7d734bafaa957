"""Draw masks and alignment maps: overlays, a panel per expression, a contact sheet of panels. Imports no torch.

Shapes: H×W the image; h×w a mask or an alignment map of any size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.files import atomic_write

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Okabe and Ito's colors, which color-blind readers can distinguish. Green is always the target.
TARGET_COLOR = (0, 158, 115)
MODEL_COLORS = ((213, 94, 0), (86, 180, 233), (240, 228, 66), (204, 121, 167), (0, 114, 178), (230, 159, 0))
PREDICTION_COLOR = MODEL_COLORS[0]
GRAY, RULE_COLOR = (110, 110, 110), (215, 215, 215)
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


def spread_indices(length: int, count: int) -> list[int]:
    """Return at most ``count`` indices below ``length``, evenly spaced: the expressions to draw."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(int)).tolist()


def overlay(image: Image.Image, mask: np.ndarray, color: Color = PREDICTION_COLOR) -> Image.Image:
    """Return the image with a mask (bool [H, W]) tinted and outlined. ValueError: the mask has another size."""
    if mask.shape != image.size[::-1]:
        raise ValueError(f"The mask has shape {mask.shape}, the image {image.size[::-1]}.")
    area = Image.fromarray(mask.astype(np.uint8) * 255)
    tinted = Image.composite(Image.new("RGB", image.size, color), image, area.point(lambda v: v * TINT // 255))
    half = max(1, round(max(image.size) / 150))
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
    scale: tuple[float, float] = SCALE,
) -> Image.Image:
    """Return the image, the target mask and the predictions below the sentence, and each model's alignment maps.

    Args:
        image: RGB, any size.
        target: bool [H, W].
        predictions: one per model; with several models, titles contain their names. Masks are resized (nearest).
        sentence: the expression.
        note: origin of the expression, in small gray letters.
        scale: color scale of the maps, see :func:`heat_overlay`.

    Raises:
        ValueError: the target has another size than the image.
    """
    if target.shape != image.size[::-1]:
        raise ValueError(f"The target has shape {target.shape}, the image {image.size[::-1]}.")
    size = _fit(image.size, OVERSAMPLING * CELL)
    resized = image.resize(size, Image.Resampling.LANCZOS)
    with_names = len(predictions) > 1

    def draw_mask(mask: np.ndarray, color: Color) -> Image.Image:
        fitted = Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        return overlay(resized, np.asarray(fitted, dtype=bool), color)

    cells, map_rows = [Cell("ground truth", draw_mask(target, TARGET_COLOR), TARGET_COLOR)], []
    for i, prediction in enumerate(predictions):
        color = MODEL_COLORS[i % len(MODEL_COLORS)]
        title = prediction.name if with_names else "prediction"
        cells.append(Cell(title, draw_mask(prediction.mask, color), color, f"IoU {prediction.iou:.2f}"))
        if prediction.maps is not None:
            suffix, tag = (f", {prediction.name}", color) if with_names else ("", None)
            heats = [heat_overlay(resized, values, *scale) for values in prediction.maps]
            map_rows.append([Cell(f"stage {stage}{suffix}", heat, tag) for stage, heat in enumerate(heats, 1)])
    return panel(image, cells, sentence, note, map_rows=map_rows, scale=scale)


def panel(
    image: Image.Image,
    cells: Sequence[Cell],
    sentence: str,
    note: str = "",
    *,
    map_rows: Sequence[Sequence[Cell]] = (),
    scale: tuple[float, float] = SCALE,
) -> Image.Image:
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
    large, medium, small = (ImageFont.load_default(size) for size in (SENTENCE_SIZE, TITLE_SIZE, NOTE_SIZE))
    text = [(line, large, "black", SENTENCE_SIZE) for line in _wrap(f"“{sentence}”", large, width - 2 * MARGIN)]
    text += [(line, small, GRAY, NOTE_SIZE) for line in _wrap(note, small, width - 2 * MARGIN)]
    size = _fit(image.size, CELL)
    row_height = TITLE_SIZE + GAP + size[1] + MARGIN
    height = MARGIN + sum(s + GAP for *_, s in text) + GAP + len(rows) * row_height
    canvas = Image.new("RGB", (width, height + (NOTE_SIZE + MARGIN if map_rows else 0) + GAP), "white")
    draw, top = ImageDraw.Draw(canvas), MARGIN
    for line, font, color, line_height in text:
        draw.text((MARGIN, top), line, fill=color, font=font)
        top += line_height + GAP
    top += GAP
    for row in rows:
        for i, cell in enumerate(row):
            left = MARGIN + i * (CELL + MARGIN)
            _draw_title(draw, left, top, cell, medium)
            canvas.paste(cell.image.resize(size, Image.Resampling.LANCZOS), (left, top + TITLE_SIZE + GAP))
        top += row_height
    if map_rows:
        _draw_scale(canvas, width - MARGIN - CELL, top, small, scale)
    return canvas


def contact_sheet(panels: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Return the panels in rows of ``columns`` (default: as many as fit into ``MAX_SHEET_WIDTH``)."""
    if columns is None:
        columns = max(1, min(len(panels), MAX_SHEET_WIDTH // max(item.width for item in panels)))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    lefts = np.cumsum([0] + [max(item.width for item in panels[i::columns]) for i in range(len(rows[0]))]).tolist()
    tops = np.cumsum([0] + [max(item.height for item in row) for row in rows]).tolist()
    canvas = Image.new("RGB", (lefts[-1], tops[-1]), "white")
    draw = ImageDraw.Draw(canvas)
    for row, top in zip(rows, tops, strict=False):
        for item, left in zip(row, lefts, strict=False):
            canvas.paste(item, (left, top))
        if top:
            draw.line((MARGIN, top, canvas.width - MARGIN - 1, top), fill=RULE_COLOR)
    return canvas


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically. UserError: it cannot be written."""
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")


def _fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return ``size`` scaled such that the longer side is ``side``."""
    return tuple(max(1, round(length * side / max(size))) for length in size)


def _draw_title(draw: ImageDraw.ImageDraw, left: int, top: int, cell: Cell, font: Font) -> None:
    """Draw color, title and score in the width of a cell."""
    right = left + CELL
    if cell.color:
        draw.rectangle((left, top + 4, left + TITLE_SIZE - 5, top + TITLE_SIZE - 1), fill=cell.color)
        left += TITLE_SIZE + 1
    score = cell.score and f"  {cell.score}"
    title = _shorten(cell.title, font, right - left - font.getlength(score))
    draw.text((left, top), title, fill="black", font=font)
    draw.text((left + font.getlength(title), top), score, fill=GRAY, font=font)


def _draw_scale(canvas: Image.Image, left: int, top: int, font: Font, scale: tuple[float, float]) -> None:
    """Draw the color scale of the maps with the values at its ends, as wide as a cell."""
    # The minus sign is a hyphen, because PIL's default font has no other.
    low, high = f"apart {scale[0]:+.4g}", f"{scale[1]:+.4g} aligned"
    start, stop = left + round(font.getlength(low)) + GAP, left + CELL - round(font.getlength(high)) - GAP
    draw = ImageDraw.Draw(canvas)
    draw.text((left, top), low, fill=GRAY, font=font)
    draw.text((stop + GAP, top), high, fill=GRAY, font=font)
    bar = Image.new("RGB", (stop - start, NOTE_SIZE), "white")
    canvas.paste(heat_overlay(bar, np.linspace(*SCALE, bar.width)[None]), (start, top))
    draw.rectangle((start, top, stop - 1, top + NOTE_SIZE - 1), outline=RULE_COLOR)


def _wrap(text: str, font: Font, width: float) -> list[str]:
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


def _shorten(text: str, font: Font, width: float) -> str:
    """Shorten a text to ``width`` pixels. The middle is removed, because names of runs often differ at their ends."""
    shortened, length = text, len(text)
    while length and font.getlength(shortened) > width:
        length -= 1
        shortened = f"{text[: length - length // 2]}…{text[len(text) - length // 2 :]}"
    return shortened
