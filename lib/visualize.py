"""Pictures a person can read: an overlay, a panel (picture, truth, prediction, sentence), a sheet of panels."""

import textwrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from lib.evaluation import EvaluationResult
from lib.metrics import iou

TRUTH_COLOR = (40, 190, 90)
PREDICTION_COLOR = (240, 70, 60)
TINT = 70  # of 255: the object's own colours must stay recognisable
PANEL_HEIGHT = 220  # pixels of a picture inside a panel
MARGIN = 8
TEXT_SIZE = 16


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


def panel(image: Image.Image, truth: np.ndarray, prediction: np.ndarray, sentence: str, note: str = "") -> Image.Image:
    """Picture, truth and prediction side by side, under the sentence and, in grey, a note.

    Args:
        image: RGB, any size.
        truth, prediction: bool [H, W] of the picture's size.
        sentence: the expression.
        note: where it comes from and how well it went.
    """
    pictures = [image, overlay(image, truth, TRUTH_COLOR), overlay(image, prediction)]
    width = max(60, round(image.width * PANEL_HEIGHT / image.height))
    font, small = ImageFont.load_default(TEXT_SIZE), ImageFont.load_default(TEXT_SIZE - 4)
    full_width = 3 * width + 4 * MARGIN
    lines = textwrap.wrap(f"“{sentence}”", width=max(20, int(full_width / (0.52 * TEXT_SIZE)))) or ["“”"]
    top = MARGIN + (len(lines) + 2) * (TEXT_SIZE + 4)
    canvas = Image.new("RGB", (full_width, top + PANEL_HEIGHT + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + i * (TEXT_SIZE + 4)), line, fill="black", font=font)
    draw.text((MARGIN, MARGIN + len(lines) * (TEXT_SIZE + 4)), note, fill=(120, 120, 120), font=small)
    titles = (("image", "black"), ("truth", TRUTH_COLOR), ("prediction", PREDICTION_COLOR))
    for i, (picture, (title, color)) in enumerate(zip(pictures, titles, strict=True)):
        left = MARGIN + i * (width + MARGIN)
        draw.text((left, top - TEXT_SIZE), title, fill=color, font=small)
        canvas.paste(picture.resize((width, PANEL_HEIGHT), Image.Resampling.BICUBIC), (left, top))
    return canvas


def result_panel(dataset: Any, result: EvaluationResult, index: int) -> Image.Image:
    """The panel of an expression whose predicted mask an evaluation has kept.

    Args:
        dataset: a ReferDataset.
        result: of evaluating it.
        index: among ``result.masks``.
    """
    expression, counts, image = dataset.expressions[index], result.expressions[index], dataset.picture(index)
    predicted = Image.fromarray(result.masks[index]).resize(image.size, Image.Resampling.NEAREST)
    score = iou(counts.intersection, counts.union)
    note = f"{dataset.split}  ref {expression.ref_id}  sentence {expression.sent_id}  IoU {score:.2f}"
    truth = dataset.full_size_mask(index).astype(bool)
    return panel(image, truth, np.array(predicted, dtype=bool), expression.sentence, note)


def sheet(panels: list[Image.Image], columns: int = 2) -> Image.Image:
    """Panels in rows of ``columns``."""
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(len(rows[0]))]
    heights = [max(picture.height for picture in row) for row in rows]
    canvas = Image.new("RGB", (sum(widths), sum(heights)), "white")
    for j, row in enumerate(rows):
        for i, picture in enumerate(row):
            canvas.paste(picture, (sum(widths[:i]), sum(heights[:j])))
    return canvas
