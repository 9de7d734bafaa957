"""Pictures fit for a paper: overlays of masks and alignment maps, a panel of one expression, a sheet of panels.

Letters: H×W the picture; h×w a mask or an alignment map, of any size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Okabe and Ito's colours, which colour-blind readers tell apart: green is the truth everywhere, each model has another.
TRUTH_COLOR = (0, 158, 115)
MODEL_COLORS = ((213, 94, 0), (86, 180, 233), (240, 228, 66), (204, 121, 167), (0, 114, 178), (230, 159, 0))
PREDICTION_COLOR = MODEL_COLORS[0]
GREY, RULE = (110, 110, 110), (215, 215, 215)
TINT = 100  # of 255: the object's own colours must stay recognisable
# Every second of ColorBrewer's RdBu, evenly spaced over a map's scale: lightness says how far from its middle.
HEAT_COLORS = ((33, 102, 172), (146, 197, 222), (255, 255, 255), (244, 165, 130), (178, 24, 43))
HEAT = 0.65  # how much of a map's picture is its colour; the rest is the picture, grey and lightened
CONTRAST = 0.7  # what the grey keeps of it: black must not be taken for a dark colour
SCALE = (-1.0, 1.0)  # a cosine's

# In pixels. Four cells printed as wide as a page's text (7 inches) make these letters 6 to 9 points high.
CELL, CELLS_PER_ROW = 320, 4
MARGIN, GAP = 12, 8
SENTENCE_SIZE, TITLE_SIZE, NOTE_SIZE = 24, 19, 16
SHEET_WIDTH = 2200
OVERSAMPLING = 2  # masks are drawn so much larger than shown: smooth outlines


class Column(NamedTuple):
    """A picture of a panel and what stands above it; ``color``, in front of the title, is its mask's or its model's."""

    title: str
    picture: Image.Image
    color: Color | None = None
    score: str = ""


class Prediction(NamedTuple):
    """What a model says of an expression."""

    name: str  # of the model
    mask: np.ndarray  # bool [h, w]
    iou: float  # 0–1
    maps: Sequence[np.ndarray] | None = None  # the stages' alignment maps, finest first, float [h, w] each


def overlay(image: Image.Image, mask: np.ndarray, color: Color = PREDICTION_COLOR) -> Image.Image:
    """The picture with a mask (bool [H, W], the picture's size) tinted and outlined."""
    if mask.shape != image.size[::-1]:
        raise ValueError(f"a mask of {mask.shape} doesn't fit a picture of {image.size[::-1]}")
    area = Image.fromarray(mask.astype(np.uint8) * 255)
    tinted = Image.composite(Image.new("RGB", image.size, color), image, area.point(lambda v: v * TINT // 255))
    half = max(1, round(max(image.size) / 150))
    side = 2 * half + 1  # inside is where a square of this side holds nothing but object, and no edge of the picture
    sums = np.pad(mask, ((half + 1, half), (half + 1, half))).astype(np.int64).cumsum(0).cumsum(1)
    inside = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side] == side**2
    outline = Image.fromarray((mask & ~inside).astype(np.uint8) * 255)
    tinted.paste(color, mask=outline)
    return tinted


def heat_overlay(image: Image.Image, values: np.ndarray, low: float = -1.0, high: float = 1.0) -> Image.Image:
    """A map over the greyed picture: blue at ``low``, red at ``high``, white halfway.

    Args:
        image: RGB, any size.
        values: float [h, w]; brought to the picture's size (bilinear).
        low, high: the ends of the colours' scale, the same for maps to be compared; values beyond it are clipped.

    Raises:
        ValueError: ``low`` isn't below ``high``.
    """
    if not low < high:
        raise ValueError(f"a scale must end above where it begins, not go from {low} to {high}")
    resized = Image.fromarray(values.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    channels, stops = zip(*HEAT_COLORS, strict=True), np.linspace(low, high, len(HEAT_COLORS))
    color = np.stack([np.interp(np.asarray(resized), stops, channel) for channel in channels], axis=-1)
    grey = 255 - CONTRAST * (255 - np.asarray(image.convert("L"), dtype=np.float32)[..., None])
    blended = HEAT * color + (1 - HEAT) * grey
    # What a diverged model has computed stays black.
    return Image.fromarray(np.rint(np.nan_to_num(blended)).astype(np.uint8))


def expression_panel(
    image: Image.Image,
    truth: np.ndarray,
    predictions: Sequence[Prediction],
    sentence: str,
    note: str = "",
    scale: tuple[float, float] = SCALE,
) -> Image.Image:
    """Picture, truth and predictions under the sentence; below, a row of alignment maps for each model that has them.

    Args:
        image: RGB, any size.
        truth: bool [H, W] of the picture's size.
        predictions: of one model, or of several, which are then named; masks are resized by nearest neighbour.
        sentence: the expression.
        note: small and grey, where it comes from.
        scale: of the maps' colours, see :func:`heat_overlay`; the same in all panels to be compared.

    Raises:
        ValueError: the truth has another size than the picture.
    """
    if truth.shape != image.size[::-1]:
        raise ValueError(f"a truth of {truth.shape} doesn't fit a picture of {image.size[::-1]}")
    size = _fitted(image.size, OVERSAMPLING * CELL)
    drawn, several = image.resize(size, Image.Resampling.LANCZOS), len(predictions) > 1

    def masked(mask: np.ndarray, color: Color) -> Image.Image:
        resized = Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        return overlay(drawn, np.asarray(resized, dtype=bool), color)

    columns, rows = [Column("truth", masked(truth, TRUTH_COLOR), TRUTH_COLOR)], []
    for i, one in enumerate(predictions):
        color = MODEL_COLORS[i % len(MODEL_COLORS)]
        title = one.name if several else "prediction"
        columns.append(Column(title, masked(one.mask, color), color, f"IoU {one.iou:.2f}"))
        if one.maps is not None:
            suffix, tag = (f", {one.name}", color) if several else ("", None)
            heats = [heat_overlay(drawn, values, *scale) for values in one.maps]
            rows.append([Column(f"stage {stage}{suffix}", heat, tag) for stage, heat in enumerate(heats, 1)])
    return panel(image, columns, sentence, note, maps=rows, scale=scale)


def panel(
    image: Image.Image,
    columns: Sequence[Column],
    sentence: str,
    note: str = "",
    *,
    maps: Sequence[Sequence[Column]] = (),
    scale: tuple[float, float] = SCALE,
) -> Image.Image:
    """The picture and other columns side by side, in rows of four, under the sentence; rows of maps and their scale.

    Args:
        image: RGB, any size; all pictures are brought to its shape.
        columns: right of it.
        sentence, note: wrapped where they are long.
        maps: a row each, below.
        scale: what the ends of the maps' colours mean.
    """
    cells = [Column("image", image), *columns]
    rows = [cells[i : i + CELLS_PER_ROW] for i in range(0, len(cells), CELLS_PER_ROW)] + list(maps)
    width = max(map(len, rows)) * (CELL + MARGIN) + MARGIN
    large, medium, small = (ImageFont.load_default(size) for size in (SENTENCE_SIZE, TITLE_SIZE, NOTE_SIZE))
    text = [(line, large, "black", SENTENCE_SIZE) for line in _wrapped(f"“{sentence}”", large, width - 2 * MARGIN)]
    text += [(line, small, GREY, NOTE_SIZE) for line in _wrapped(note, small, width - 2 * MARGIN)]
    size = _fitted(image.size, CELL)
    row_height = TITLE_SIZE + GAP + size[1] + MARGIN
    height = MARGIN + sum(s + GAP for *_, s in text) + GAP + len(rows) * row_height
    canvas = Image.new("RGB", (width, height + (NOTE_SIZE + MARGIN if maps else 0) + GAP), "white")
    draw, top = ImageDraw.Draw(canvas), MARGIN
    for line, font, color, line_height in text:
        draw.text((MARGIN, top), line, fill=color, font=font)
        top += line_height + GAP
    top += GAP
    for row in rows:
        for i, column in enumerate(row):
            left = MARGIN + i * (CELL + MARGIN)
            _draw_title(draw, left, top, column, medium)
            shown = column.picture.resize(size, Image.Resampling.LANCZOS)
            canvas.paste(shown, (left, top + TITLE_SIZE + GAP))
        top += row_height
    if maps:
        _draw_scale(canvas, width - MARGIN - CELL, top, small, scale)
    return canvas


def _fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size of a picture whose longer side has become ``side``."""
    return tuple(max(1, round(length * side / max(size))) for length in size)


def _draw_title(draw: ImageDraw.ImageDraw, left: int, top: int, column: Column, font: Font) -> None:
    """Colour, title and score, no wider than a cell."""
    right = left + CELL
    if column.color:
        draw.rectangle((left, top + 4, left + TITLE_SIZE - 5, top + TITLE_SIZE - 1), fill=column.color)
        left += TITLE_SIZE + 1
    score = column.score and f"  {column.score}"
    title = _shortened(column.title, font, right - left - font.getlength(score))
    draw.text((left, top), title, fill="black", font=font)
    draw.text((left + font.getlength(title), top), score, fill=GREY, font=font)


def _draw_scale(canvas: Image.Image, left: int, top: int, font: Font, scale: tuple[float, float]) -> None:
    """A bar of the maps' colours between what its ends mean, one cell wide."""
    # PIL's own font has no minus sign, so this is the hyphen.
    begin, end = f"apart {scale[0]:+.4g}", f"{scale[1]:+.4g} aligned"
    start, stop = left + round(font.getlength(begin)) + GAP, left + CELL - round(font.getlength(end)) - GAP
    draw = ImageDraw.Draw(canvas)
    draw.text((left, top), begin, fill=GREY, font=font)
    draw.text((stop + GAP, top), end, fill=GREY, font=font)
    bar = Image.new("RGB", (stop - start, NOTE_SIZE), "white")
    canvas.paste(heat_overlay(bar, np.linspace(*SCALE, bar.width)[None]), (start, top))
    draw.rectangle((start, top, stop - 1, top + NOTE_SIZE - 1), outline=RULE)


def _wrapped(text: str, font: Font, width: float) -> list[str]:
    """Lines no wider than ``width`` pixels; a longer word is broken."""
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


def _shortened(text: str, font: Font, width: float) -> str:
    """The text, without its middle where it would be wider than ``width`` pixels: runs' names differ at their ends."""
    shown, kept = text, len(text)
    while kept and font.getlength(shown) > width:
        kept -= 1
        shown = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
    return shown


def sheet(panels: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Panels in rows of ``columns``, left and top aligned; by default as many as keep the sheet readable on a page."""
    if columns is None:
        columns = max(1, min(len(panels), SHEET_WIDTH // max(one.width for one in panels)))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    lefts = np.cumsum([0] + [max(one.width for one in panels[i::columns]) for i in range(len(rows[0]))]).tolist()
    tops = np.cumsum([0] + [max(one.height for one in row) for row in rows]).tolist()
    canvas = Image.new("RGB", (lefts[-1], tops[-1]), "white")
    draw = ImageDraw.Draw(canvas)
    for row, top in zip(rows, tops, strict=False):
        for one, left in zip(row, lefts, strict=False):
            canvas.paste(one, (left, top))
        if top:
            draw.line((MARGIN, top, canvas.width - MARGIN - 1, top), fill=RULE)
    return canvas
