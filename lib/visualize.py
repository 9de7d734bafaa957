"""Pictures a person can read: overlays of masks and alignment maps, a panel of one expression, a sheet of panels."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# Told apart by colour-blind readers too (Okabe and Ito's bluish green and vermilion).
TRUTH_COLOR = (0, 158, 115)
PREDICTION_COLOR = (213, 94, 0)
APART_COLOR, ALIGNED_COLOR = (33, 102, 172), (178, 24, 43)  # the ends of the maps' scale; its middle is transparent
GREY = (110, 110, 110)
TINT = 70  # of 255: the object's own colours must stay recognisable
MOST_HEAT = 0.85  # of a map's colour over the picture, at the ends of its scale
CELL_WIDTH, CELL_HEIGHT = 380, 220  # a picture in a panel fits into these, in pixels
LEAST_WIDTH = 84  # of a cell: its title needs room
MARGIN = 10
TEXT_SIZE, SMALL_SIZE = 17, 13
SHEET_WIDTH = 2100  # pixels: two panels side by side where they fit into it


class Prediction(NamedTuple):
    """What a model says of an expression."""

    name: str  # of the model
    mask: np.ndarray  # bool [h, w], of any size
    iou: float
    maps: Sequence[np.ndarray] | None = None  # alignment maps, float [h, w] each


class _Cell(NamedTuple):
    title: str
    color: tuple[int, int, int]
    picture: Image.Image
    score: str = ""


def overlay(image: Image.Image, mask: np.ndarray, color: tuple[int, int, int] = PREDICTION_COLOR) -> Image.Image:
    """The picture with a mask (bool [H, W], the picture's size) tinted and outlined."""
    if mask.shape != image.size[::-1]:
        raise ValueError(f"a mask of {mask.shape} doesn't fit a picture of {image.size[::-1]}")
    area = Image.fromarray(mask.astype(np.uint8) * 255)
    tinted = Image.composite(Image.new("RGB", image.size, color), image, area.point(lambda v: v * TINT // 255))
    thickness = 2 * max(1, round(max(image.size) / 300)) + 1
    # A frame of background makes the outline run along the picture's edge too.
    framed = Image.new("L", (image.width + 2 * thickness, image.height + 2 * thickness))
    framed.paste(area, (thickness, thickness))
    inner = framed.filter(ImageFilter.MinFilter(thickness)).crop(
        (thickness, thickness, thickness + image.width, thickness + image.height)
    )
    outline = Image.fromarray((np.asarray(area) > np.asarray(inner)).astype(np.uint8) * 255)
    tinted.paste(color, mask=outline)
    return tinted


def heat_overlay(image: Image.Image, values: np.ndarray, low: float = -1.0, high: float = 1.0) -> Image.Image:
    """The picture in grey under a map: blue at ``low``, red at ``high``, transparent in the middle.

    Args:
        image: RGB.
        values: float [h, w] of any size; brought to the picture's (bilinear). Beyond the scale they are clipped.
        low, high: the ends of the scale. Where they are equal nothing is coloured.
    """
    resized = Image.fromarray(values.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    middle, half = (low + high) / 2, (high - low) / 2
    position = ((np.asarray(resized) - middle) / half).clip(-1, 1) if half > 0 else np.zeros(image.size[::-1])
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32)
    color = np.where(position[..., None] < 0, APART_COLOR, ALIGNED_COLOR)
    strength = MOST_HEAT * np.abs(position)[..., None]
    return Image.fromarray(np.rint(grey * (1 - strength) + color * strength).astype(np.uint8))


def expression_panel(
    image: Image.Image, truth: np.ndarray, predictions: Sequence[Prediction], sentence: str, note: str = ""
) -> Image.Image:
    """Picture, truth and predictions side by side under the sentence; the alignment maps of each model below.

    Args:
        image: RGB, any size.
        truth: bool [H, W] of the picture's size.
        predictions: of one model or several. Masks of another size are resized by nearest neighbour; the maps of all
            of them are drawn on one scale, from their lowest value to their highest.
        sentence: the expression.
        note: small and grey, where it comes from.
    """
    several = len(predictions) > 1
    values = [values for one in predictions for values in one.maps or ()]
    scale = (min(v.min() for v in values), max(v.max() for v in values)) if values else None
    rows = [[_Cell("image", GREY, image), _Cell("truth", TRUTH_COLOR, overlay(image, truth, TRUTH_COLOR))]]
    for one in predictions:
        mask = Image.fromarray(one.mask).resize(image.size, Image.Resampling.NEAREST)
        drawn = overlay(image, np.array(mask, dtype=bool))
        rows[0].append(_Cell(one.name if several else "prediction", PREDICTION_COLOR, drawn, f"IoU {one.iou:.2f}"))
    for one in predictions:
        if one.maps is not None:
            of = f"{one.name}, " if several else ""
            rows.append(
                [_Cell(f"{of}stage {i}", GREY, heat_overlay(image, own, *scale)) for i, own in enumerate(one.maps, 1)]
            )
    return _panel(rows, sentence, note, scale)


def _panel(rows: list[list[_Cell]], sentence: str, note: str, scale: tuple[float, float] | None) -> Image.Image:
    """Rows of cells under the text; ``scale``: what the maps' colours mean, if there are any."""
    image = rows[0][0].picture
    zoom = min(CELL_WIDTH / image.width, CELL_HEIGHT / image.height)
    size = max(1, round(image.width * zoom)), max(1, round(image.height * zoom))
    cell_width = max(LEAST_WIDTH, size[0])
    width = max(map(len, rows)) * (cell_width + MARGIN) + MARGIN
    font, small = ImageFont.load_default(TEXT_SIZE), ImageFont.load_default(SMALL_SIZE)
    text_lines, note_lines = (
        _wrapped(f"“{sentence}”", font, width - 2 * MARGIN),
        _wrapped(note, small, width - 2 * MARGIN),
    )
    heading = len(text_lines) * (TEXT_SIZE + 5) + len(note_lines) * (SMALL_SIZE + 5)
    row_height = SMALL_SIZE + 7 + size[1] + MARGIN
    height = MARGIN + heading + len(rows) * row_height + (2 * SMALL_SIZE if scale else 0)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    top = MARGIN
    for lines, used, step, color in ((text_lines, font, TEXT_SIZE, "black"), (note_lines, small, SMALL_SIZE, GREY)):
        for line in lines:
            draw.text((MARGIN, top), line, fill=color, font=used)
            top += step + 5
    for row in rows:
        for i, cell in enumerate(row):
            left = MARGIN + i * (cell_width + MARGIN)
            room = cell_width - (small.getlength(f" {cell.score}") if cell.score else 0)
            draw.text((left, top), _shortened(cell.title, small, room), fill=cell.color, font=small)
            draw.text((left + cell_width, top), cell.score, fill=cell.color, font=small, anchor="ra")
            canvas.paste(cell.picture.resize(size, Image.Resampling.LANCZOS), (left, top + SMALL_SIZE + 7))
        top += row_height
    if scale:
        _draw_scale(draw, small, top, *scale)
    return canvas


def _draw_scale(draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont, top: int, low: float, high: float) -> None:
    """The maps' colours over a middle grey, with what they mean."""
    begins, steps = f"{low:.2f} ", 120
    left = MARGIN + font.getlength(begins)
    draw.text((MARGIN, top), begins, fill=GREY, font=font)
    bar = heat_overlay(Image.new("RGB", (steps, 1), (200, 200, 200)), np.linspace(-1, 1, steps)[None])
    for x in range(steps):
        draw.line((left + x, top + 2, left + x, top + SMALL_SIZE), fill=bar.getpixel((x, 0)))
    draw.text((left + steps, top), f" {high:.2f}  cosine / temperature", fill=GREY, font=font)


def _wrapped(text: str, font: ImageFont.ImageFont, width: float) -> list[str]:
    """Lines that are no wider than ``width`` pixels; a longer word is broken."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def _shortened(text: str, font: ImageFont.ImageFont, width: float) -> str:
    """The text, or its beginning and its end where it is wider than ``width`` pixels."""
    kept = len(text)
    shown = text
    while kept > 2 and font.getlength(shown) > width:
        kept -= 1
        shown = text[: kept - kept // 2] + "…" + text[len(text) - kept // 2 :]
    return shown


def sheet(panels: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Panels in rows of ``columns``, by default as many as fit into a page (at most two)."""
    width = max(panel.width for panel in panels)
    columns = columns or max(1, min(2, len(panels), SHEET_WIDTH // width))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(len(rows[0]))]
    heights = [max(picture.height for picture in row) for row in rows]
    gap = 2 * MARGIN
    canvas = Image.new("RGB", (sum(widths) + gap * (columns - 1), sum(heights) + gap * (len(rows) - 1)), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for row, height in zip(rows, heights, strict=True):
        for i, picture in enumerate(row):
            canvas.paste(picture, (sum(widths[:i]) + gap * i, top))
        top += height + gap
        draw.line((MARGIN, top - MARGIN, canvas.width - MARGIN, top - MARGIN), fill=(220, 220, 220))
    return canvas
