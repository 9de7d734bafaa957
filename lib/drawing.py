"""Drawings of images, texts and rectangles, written as PNG, PDF or SVG. Imports no torch."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from lib.charts import styled_figure
from lib.files import atomic_write
from lib.fonts import Run, load_font

Color = tuple[int, int, int]
PIXELS_PER_INCH = 192  # of PDF and SVG files: 1344 pixels are 7 inches


class Box(NamedTuple):
    """Position and size in pixels."""

    left: int
    top: int
    width: int
    height: int


class PlacedImage(NamedTuple):
    """An image, resized to its box when rendered."""

    box: Box
    image: Image.Image


class Text(NamedTuple):
    """A line of text. Its letters stand on the line ``top + size``."""

    left: float
    top: int
    text: str
    size: int  # of the letters, in pixels
    color: Color


class Rectangle(NamedTuple):
    """A filled rectangle, or its outline."""

    box: Box
    color: Color
    filled: bool = True


@dataclass
class Drawing:
    """Items at positions in pixels, on a white ground. Later items cover earlier ones.

    Args:
        width, height: in pixels.
    """

    width: int
    height: int
    items: list[PlacedImage | Text | Rectangle] = field(default_factory=list)

    def place(self, other: "Drawing", left: int, top: int) -> None:
        """Add the items of another drawing, moved by ``left`` and ``top``."""
        for item in other.items:
            if isinstance(item, Text):
                self.items.append(item._replace(left=item.left + left, top=item.top + top))
            else:
                box = item.box._replace(left=item.box.left + left, top=item.box.top + top)
                self.items.append(item._replace(box=box))

    def render(self) -> Image.Image:
        """Return the drawing as an RGB image."""
        canvas = Image.new("RGB", (self.width, self.height), "white")
        draw = ImageDraw.Draw(canvas)
        for item in self.items:
            if isinstance(item, Text):
                for run in load_font(item.size).runs(item.text):
                    position = (item.left + run.left, item.top + item.size)
                    draw.text(position, run.text, fill=item.color, font=run.font, anchor="ls")
                continue
            left, top, width, height = item.box
            if isinstance(item, PlacedImage):
                canvas.paste(item.image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
            else:
                corners = (left, top, left + width - 1, top + height - 1)
                draw.rectangle(corners, fill=item.color if item.filled else None, outline=item.color)
        return canvas

    def save(self, path: Path, file_format: str = "png", *, pixel_ratio: int = 2) -> None:
        """Write the drawing atomically.

        Args:
            path: the file.
            file_format: one of ``lib.charts.FORMATS``. In PDF and SVG, texts are outlines, and images stay images.
            pixel_ratio: largest resolution of the images in PDF and SVG, in multiples of that in PNG.

        Raises:
            UserError: the file cannot be written, or PDF or SVG was chosen and matplotlib is not installed.
        """
        if file_format == "png":
            save_image(self.render(), path)
            return
        with styled_figure(self.width / PIXELS_PER_INCH, self.height / PIXELS_PER_INCH) as figure:
            from matplotlib import rc_context

            figure.set_layout_engine("none")
            for item in self.items:
                self._add_to_figure(figure, item, pixel_ratio)
            date = {"pdf": "CreationDate", "svg": "Date"}[file_format]  # left out: equal drawings are equal files
            with atomic_write(path) as temporary, rc_context({"svg.hashsalt": "crossvlt"}):
                figure.savefig(temporary, format=file_format, metadata={date: None})

    def _add_to_figure(self, figure: "Figure", item: PlacedImage | Text | Rectangle, pixel_ratio: int) -> None:  # noqa: F821
        from matplotlib.patches import PathPatch
        from matplotlib.patches import Rectangle as RectanglePatch
        from matplotlib.transforms import Affine2D

        # From pixels, counted downwards, to inches, counted upwards.
        to_inches = Affine2D().scale(1, -1).translate(0, self.height).scale(1 / PIXELS_PER_INCH)
        transform = to_inches + figure.dpi_scale_trans
        if isinstance(item, PlacedImage):
            left, top, width, height = item.box
            image = item.image.copy()
            image.thumbnail((pixel_ratio * width, pixel_ratio * height), Image.Resampling.LANCZOS)
            part = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
            axes = figure.add_axes(part)
            axes.imshow(np.asarray(image), aspect="auto", interpolation="none")
            axes.set_axis_off()
            return
        color = [value / 255 for value in item.color]
        if isinstance(item, Text):
            for run in load_font(item.size).runs(item.text):
                move = Affine2D().translate(item.left + run.left, item.top + item.size)
                outline = _outline(run, item.size).transformed(move)
                figure.add_artist(PathPatch(outline, facecolor=color, linewidth=0, transform=transform))
        else:
            left, top, width, height = item.box
            face = color if item.filled else "none"
            patch = RectanglePatch((left, top), width, height, facecolor=face, edgecolor=color, linewidth=0.5)
            patch.set_transform(transform)
            figure.add_artist(patch)


def _outline(run: Run, size: int) -> "matplotlib.path.Path":  # noqa: F821
    """Return the outline of a text's run in pixels, downwards from the base line.

    It is drawn instead of the text, because embedding a font takes seconds per font and file.
    """
    from matplotlib import font_manager
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import text_to_path

    file: Any = run.face.path
    if file and run.face.index and hasattr(font_manager, "FontPath"):  # since matplotlib 3.11; else the first face
        file = font_manager.FontPath(file, run.face.index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter is missing: lib.fonts has logged it
        vertices, codes = text_to_path.get_text_path(font_manager.FontProperties(fname=file), run.text)
    scale = size / text_to_path.FONT_SCALE
    return Outline(np.reshape(vertices, (-1, 2)) * (scale, -scale), codes)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically. UserError: it cannot be written."""
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")
