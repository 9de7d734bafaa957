"""The fonts of figures: text in any script, drawn with the installed font packages. Imports no torch.

A text is drawn in runs: parts whose letters are all in one font. Without the packages of requirements-extra.txt, only
Pillow's own font is left, which has the letters of English.
"""

import functools
import importlib.util
import logging
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from PIL import ImageFont

LOG = logging.getLogger("crossvlt")
# Packages and patterns of their font files, the preferred ones first. Letters of the first file look alike.
FONT_FILES = (
    ("manimgx_fonts", "NotoSans[[]wght].ttf"),
    ("manimgx_fonts", "NotoSans[A-Z]*.ttf"),
    ("noto_cjk_sans_otc", "*.ttc"),
    ("manimgx_fonts", "NotoEmoji*.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf"),
)
# Number of the simplified Chinese face in a collection. Japanese, Korean and other letters are in each face.
CHINESE = 2
REGULAR = 400  # weight
NONCHARACTER = "\U0010ffff"  # in no font


class Face(NamedTuple):
    """A font file. ``path`` is None for Pillow's own font, which is no file."""

    path: Path | None
    index: int = 0  # in a collection

    def load(self, size: int) -> ImageFont.FreeTypeFont:
        """Return the font with letters of ``size`` pixels."""
        if self.path is None:
            return ImageFont.load_default(size)
        font = ImageFont.truetype(self.path, size, self.index)
        with suppress(OSError):  # the file has a single weight
            font.set_variation_by_axes([REGULAR])
        return font


class Run(NamedTuple):
    """A part of a text, drawn with one font."""

    text: str
    face: Face
    left: float  # from the beginning of the text, in pixels
    font: ImageFont.FreeTypeFont


@functools.cache
def installed_faces() -> tuple[Face, ...]:
    """Return the installed fonts, the preferred ones first."""
    faces = []
    for package, pattern in FONT_FILES:
        spec = importlib.util.find_spec(package)  # does not import the package
        for folder in (spec and spec.submodule_search_locations) or ():
            paths = sorted(Path(folder).glob(pattern))
            faces += [Face(path, CHINESE if path.suffix == ".ttc" else 0) for path in paths]
    return (*faces, Face(None))


class TextFont:
    """All installed fonts in one size.

    Args:
        size: height of the letters in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._load = functools.cache(lambda face: face.load(size))
        self._covers = functools.cache(self._compute_covers)

    def _compute_covers(self, face: Face, character: str) -> bool:
        """Return whether a font has a character: whether it draws something else than its sign for missing ones."""
        font = self._load(face)
        missing, drawn = (font.getmask(text) for text in (NONCHARACTER, character))
        return missing.size != drawn.size or bytes(missing) != bytes(drawn)

    def _face_of(self, character: str, previous: Face | None) -> Face:
        """Return the font of a character. Signs between letters, such as spaces, continue the previous run."""
        if previous is not None and not character.isalpha() and self._covers(previous, character):
            return previous
        faces = installed_faces()
        found = next((face for face in faces if self._covers(face, character)), None)
        if found is None and character.isalpha():
            _warn_missing()
        return found or faces[0]

    def runs(self, text: str) -> list[Run]:
        """Return the runs of a text from left to right."""
        parts: list[tuple[str, Face]] = []
        for character in text:
            face = self._face_of(character, parts[-1][1] if parts else None)
            if parts and parts[-1][1] == face:
                parts[-1] = (parts[-1][0] + character, face)
            else:
                parts.append((character, face))
        runs, left = [], 0.0
        for part, face in parts:
            font = self._load(face)
            runs.append(Run(part, face, left, font))
            left += font.getlength(part)
        return runs

    def getlength(self, text: str) -> float:
        """Return the width of a text in pixels."""
        runs = self.runs(text)
        return runs[-1].left + runs[-1].font.getlength(runs[-1].text) if runs else 0.0


@functools.cache
def load_font(size: int) -> TextFont:
    """Return the fonts in one size, which are loaded once."""
    return TextFont(size)


@functools.cache
def _warn_missing() -> None:
    LOG.warning("Some letters are in no installed font. For all scripts, run: pip install -r requirements-extra.txt")
