"""lib.drawing and lib.fonts: letters of any script, and drawings as PNG, PDF and SVG."""

import importlib.util
import re
import zlib

import numpy as np
import pytest
from PIL import Image

import lib.charts
import lib.fonts
from lib.charts import check_format
from lib.drawing import Box, Drawing, PlacedImage, Rectangle, Text
from lib.errors import UserError
from lib.fonts import Face, TextFont, installed_faces

BLACK = (0, 0, 0)
SCRIPTS = {
    "manimgx_fonts": ["café", "собака", "Ωμέγα", "الكلب", "הכלב", "कुत्ता", "สุนัข", "ძაღლი", "🐶", "−½"],
    "noto_cjk_sans_otc": ["左边的狗", "犬は左側", "왼쪽의"],
    "matplotlib": ["café", "собака", "Ωμέγα", "−½"],
}


@pytest.mark.parametrize(("package", "text"), [(name, text) for name, texts in SCRIPTS.items() for text in texts])
def test_every_script_has_a_font(package, text, caplog, crossvlt_log):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    lib.fonts._warn_missing.cache_clear()
    runs = TextFont(24).runs(text)
    assert [run.text for run in runs] == [text]  # also with the vowel signs, which belong to the letters
    missing = bytes(runs[0].font.getmask("\U0010ffff"))
    assert all(bytes(runs[0].font.getmask(character)) != missing for character in text)
    assert not caplog.records


def test_signs_between_letters_stay_in_their_run_and_letters_return_to_the_first_font():
    if not all(importlib.util.find_spec(name) for name in ("manimgx_fonts", "noto_cjk_sans_otc")):
        pytest.skip("needs the font packages")
    font = TextFont(20)
    assert [run.text for run in font.runs("the dog, 左边的 狗 2 dogs")] == ["the dog, ", "左边的 狗 2 ", "dogs"]
    assert [run.text for run in font.runs("الكلب على")] == [
        "الكلب على"
    ]  # otherwise its words would be in the wrong order
    assert [run.left for run in font.runs("the dog, 左边的")] == [0, font.getlength("the dog, ")]
    assert font.getlength("") == 0


def test_without_packages_pillows_font_is_used_and_missing_letters_are_logged_once(monkeypatch, caplog, crossvlt_log):
    monkeypatch.setattr(lib.fonts, "FONT_FILES", (("no_such_package", "*"),))
    for cached in (installed_faces, lib.fonts._warn_missing):
        cached.cache_clear()
    try:
        assert installed_faces() == (Face(None),)
        for text in ("the dog", "狗", "犬"):
            assert [run.text for run in TextFont(20).runs(text)] == [text]
        (record,) = caplog.records
        assert "pip install -r requirements-extra.txt" in record.getMessage()
    finally:
        installed_faces.cache_clear()


@pytest.fixture
def drawing():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = (255, 0, 0)
    part = Drawing(100, 60, [Text(5, 2, "dog", 24, BLACK), PlacedImage(Box(50, 0, 30, 20), Image.fromarray(pixels))])
    whole = Drawing(200, 100, [Rectangle(Box(0, 90, 200, 10), (0, 0, 255)), Rectangle(Box(1, 1, 20, 9), BLACK, False)])
    whole.place(part, 100, 30)
    return whole


def test_items_are_drawn_at_their_positions(drawing):
    pixels = np.asarray(drawing.render()).astype(int)
    assert pixels.shape == (100, 200, 3)
    assert (pixels[90:] == (0, 0, 255)).all()
    assert (pixels[30:50, 150:161] == (255, 0, 0)).all()
    assert (pixels[30:50, 169:180] == 0).all()
    assert (pixels[1, 1:21] == 0).all()
    assert (pixels[2:9, 2:20] == 255).all()  # only the outline
    letters = np.add(np.argwhere(pixels[20:89, 100:150].min(-1) < 128), (20, 100))
    assert 30 < letters[:, 0].min() < 42
    assert 30 + 2 + 24 <= letters[:, 0].max() + 1 <= 64  # d and o stand on the base line, g goes below it
    assert 104 <= letters[:, 1].min() <= 108


def test_pdf_and_svg_have_the_size_and_the_items(drawing, tmp_path):
    pytest.importorskip("matplotlib")
    for file_format in ("pdf", "svg"):
        path = tmp_path / f"a.{file_format}"
        drawing.save(path, file_format)
        content = path.read_bytes()
        drawing.save(path, file_format)
        assert path.read_bytes() == content
    svg = (tmp_path / "a.svg").read_text()
    assert 'width="75pt" height="37.5pt"' in svg  # 192 pixels per inch
    assert svg.count("<image") == 1
    assert "<text" not in svg
    pdf = (tmp_path / "a.pdf").read_bytes()
    assert re.search(rb"/MediaBox \[ 0 0 75 37\.5 \]", pdf)
    assert b"/Subtype /Image" in pdf
    assert b"/Width 60" in pdf  # 30 pixels in PNG, and twice the resolution
    page = next(zlib.decompress(part) for part in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL))
    assert page.count(b" c\n") > 10  # the letters' curves
    drawing.save(tmp_path / "a.pdf", "pdf", pixel_ratio=1)
    assert b"/Width 30" in (tmp_path / "a.pdf").read_bytes()


def test_pdf_without_matplotlib_is_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(lib.charts.importlib.util, "find_spec", lambda name: None)
    check_format("png")
    for file_format in ("pdf", "svg"):
        with pytest.raises(UserError, match=f"Writing {file_format} files needs matplotlib"):
            check_format(file_format)
