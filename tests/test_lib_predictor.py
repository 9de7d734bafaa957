"""Predictor: the same mask for all kinds of input, unusual images and sentences, results."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from bert.tokenization import fingerprint, load_tokenizer, save_form
from data.transforms import preprocessing
from lib.errors import MissingFileError, UserError
from lib.inference import PreparedModel
from lib.polygons import mask_to_polygons
from lib.predictor import Predictor, Result
from refer.masks import decode_mask
from refer.refer import REFER

FRAME = np.zeros((5, 6), bool)
FRAME[1:4, 1:5] = True
FRAME[2, 2] = False


@pytest.fixture(scope="module")
def checkpoint(refshapes_root, tmp_path_factory):
    """A self-contained checkpoint of random weights, whose masks are neither empty nor full."""
    from conftest import SMALL

    from CrossVLT import build_crossvlt

    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(refshapes_root / "refshapes"))
    model = build_crossvlt("tiny", **{**SMALL, "vocab_size": len(tokenizer)}).eval()
    content = {
        "model": model.state_dict(),
        "model_config": model.config,
        "config": {},
        "vocabulary": fingerprint(tokenizer),
        "tokenizer": save_form(tokenizer),
        "preprocessing": preprocessing(64, 21),
    }
    folder = tmp_path_factory.mktemp("run")
    torch.save(content, folder / "best.pth")
    predictor = Predictor.from_pretrained(folder, device="cpu")
    probability = predictor(Image.effect_noise((64, 64), 80), "a red circle")[0].probability
    shift = np.log(np.median(probability) / (1 - np.median(probability)))
    content["model"]["classifier.conv1_1.bias"][1] -= shift
    torch.save(content, folder / "best.pth")
    return folder / "best.pth"


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor.from_pretrained(checkpoint, device="cpu", batch_size=1)


@pytest.fixture(scope="module")
def pairs(refshapes_root):
    """20 pairs of image file and sentence."""
    refer = REFER(refshapes_root, "refshapes")
    refs = refer.loadRefs(refer.getRefIds())
    return [(refer.get_image_path(ref["image_id"]), ref["sentences"][0]["sent"]) for ref in refs[:20]]


def test_one_model_gives_one_mask(predictor, checkpoint, pairs, run_here, tmp_path):
    expected = [predictor(path, sentence)[0].mask for path, sentence in pairs]
    assert len({mask.tobytes() for mask in expected}) == len(pairs) == 20
    assert all(0 < mask.mean() < 1 for mask in expected)
    found = {"batch": [results[0].mask for _, results in predictor.batch(iter(pairs))]}
    for path, sentence in pairs:
        image = Image.open(path).convert("RGB")
        array = np.array(image)
        for kind, given in (("str", str(path)), ("PIL", image), ("NumPy", array),
                            ("torch", torch.from_numpy(array).permute(2, 0, 1))):  # fmt: skip
            found.setdefault(kind, []).append(predictor(given, [sentence])[0].mask)
        predictor.set_image(path)
        predictor.predict("something else")
        found.setdefault("set_image", []).append(predictor.predict(sentence)[0].mask)
    for path, sentence in pairs[:3]:
        flags = ["--image", path, "--sentence", sentence, "-b", 1, "--device", "cpu"]
        run_here("test.py", "--resume", checkpoint, *flags, "--out", tmp_path / "o.png", check=True)
        found.setdefault("test.py", []).append(np.asarray(Image.open(tmp_path / "o_mask.png")) > 0)
    for kind, masks in found.items():
        for mask, other in zip(masks, expected, strict=kind != "test.py"):
            assert np.array_equal(mask, other), kind


def test_batches_differ_only_by_rounding(predictor, checkpoint, pairs):
    larger = Predictor.from_pretrained(checkpoint, device="cpu", batch_size=4)
    given = [(path, [sentence, "red", "blue"][: 1 + i % 3]) for i, (path, sentence) in enumerate(pairs)]
    found = list(larger.batch(given, progress=False))
    assert [image for image, _ in found] == [image for image, _ in given]
    for (_, results), (image, sentences) in zip(found, given, strict=True):
        assert [result.sentence for result in results] == sentences
        for result, single in zip(results, predictor(image, sentences), strict=True):
            assert np.abs(result.probability - single.probability).max() < 1e-4
    assert list(larger.batch([])) == []


def test_a_broken_image_does_not_end_a_batch(predictor, checkpoint, pairs, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    given, errors = [pairs[0], (tmp_path / "broken.png", "red"), (pairs[1][0], " "), pairs[1]], []
    found = list(predictor.batch(given, on_error=lambda image, error: errors.append((image, str(error)))))
    assert [image for image, _ in found] == [pairs[0][0], pairs[1][0]]
    assert [image for image, _ in errors] == [tmp_path / "broken.png", pairs[1][0]]
    found = []
    with pytest.raises(UserError, match=r"broken\.png"):
        found.extend(Predictor.from_pretrained(checkpoint, device="cpu", batch_size=8).batch(given))
    assert [image for image, _ in found] == [pairs[0][0]]  # what was read before the error is not lost


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_are_an_error(predictor, pairs, monkeypatch, value):
    segment = PreparedModel.segment

    def diverged(*args, **kwargs):
        output = segment(*args, **kwargs)
        output.mask_logits[-1, 1, 0, 0] = value
        return output

    monkeypatch.setattr(PreparedModel, "segment", diverged)
    with pytest.raises(UserError, match="logits are inf or nan"):
        predictor(pairs[0][0], "red")


def test_set_image_encodes_once(predictor, pairs, monkeypatch):
    calls, encode = [], PreparedModel.encode_images
    monkeypatch.setattr(PreparedModel, "encode_images", lambda *args: calls.append(1) or encode(*args))
    predictor.set_image(pairs[0][0])
    for sentence in ("red", "blue", "a circle"):
        assert len(predictor.predict(sentence)) == 1
    assert len(predictor(pairs[0][0], ["red", "blue", "a circle"])) == 3
    assert len(calls) == 2
    assert predictor(pairs[0][0], []) == []


def test_predict_needs_an_image(checkpoint):
    with pytest.raises(RuntimeError, match="Call set_image first"):
        Predictor.from_pretrained(checkpoint, device="cpu").predict("red")


def test_arguments_of_from_pretrained(checkpoint, refshapes_root, tmp_path):
    image = Image.effect_noise((64, 64), 80)
    found = Predictor.from_pretrained(str(checkpoint.parent), "cpu", threshold=1e-9)(image, "red")[0]
    assert found.mask.all()
    content = torch.load(checkpoint, weights_only=True)
    del content["tokenizer"]
    torch.save(content, tmp_path / "older.pth")
    older = Predictor.from_pretrained(tmp_path / "older.pth", "cpu", tokenizer=refshapes_root / "refshapes")
    older.img_size = 64
    assert np.array_equal(older(image, "red")[0].probability, found.probability)
    for arguments, message in (
        ({"amp": "fp8"}, "--amp"),
        ({"device": "tpu"}, "use auto, cpu, cuda"),
        ({"threshold": 2}, "must be between 0"),
        ({"batch_size": 0}, "--batch-size"),
    ):
        with pytest.raises(UserError, match=message):
            Predictor.from_pretrained(checkpoint, **{"device": "cpu", **arguments})
    with pytest.raises(MissingFileError, match=r"best\.pth does not exist"):
        Predictor.from_pretrained(tmp_path)


# 0 1 2 of the left column and 3 4 5 of the right one, shown upright.
UPRIGHT = np.array([[[0, 0, 0], [250, 0, 0]], [[0, 250, 0], [0, 0, 250]], [[250, 250, 0], [0, 250, 250]]], np.uint8)
STORED = {  # EXIF orientation: how the file stores the upright image
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_orientation_is_applied(predictor, tmp_path, orientation):
    image, exif = Image.fromarray(np.ascontiguousarray(STORED[orientation])), Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("png", "tiff", "webp"):
        path = tmp_path / f"image.{suffix}"
        image.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
        for given in (path, Image.open(path)):
            assert np.array_equal(np.asarray(predictor(given, "red")[0].image), UPRIGHT), suffix


def test_modes_are_shown_as_people_see_them(predictor, tmp_path, caplog, crossvlt_log):
    def shown(image, name="image.png", **options):
        image.save(tmp_path / name, **options)
        return np.asarray(predictor(tmp_path / name, "red")[0].image)[0, 0].tolist()

    transparent = Image.new("RGBA", (5, 4), (200, 0, 0, 0))
    assert shown(Image.new("L", (5, 4), 7)) == [7, 7, 7]
    assert shown(Image.new("1", (5, 4), 1)) == [255] * 3
    assert shown(Image.new("LA", (5, 4), (7, 255))) == [7, 7, 7]
    assert shown(Image.new("LA", (5, 4), (7, 0))) == [255] * 3
    assert shown(transparent) == [255] * 3
    assert shown(Image.new("RGBA", (5, 4), (200, 0, 0, 255))) == [200, 0, 0]
    assert shown(Image.new("P", (5, 4), 0), transparency=0) == [255] * 3
    assert shown(Image.new("CMYK", (5, 4), (0, 255, 255, 0)), "image.tiff") == [255, 0, 0]
    assert not caplog.records
    frames = [Image.new("RGB", (5, 4), color) for color in ("red", "blue")]
    for name in ("a.gif", "a.webp"):
        assert np.allclose(shown(frames[0], name, save_all=True, append_images=frames[1:]), [255, 0, 0], atol=2)
        assert f"{name} has several frames: only the first one is used" in caplog.text


@pytest.mark.parametrize("size", [(1, 1), (12000, 80), (1, 300)])
def test_extreme_sizes(predictor, size):
    result = predictor(Image.effect_noise(size, 80), "the red circle")[0]
    assert result.mask.shape == result.probability.shape == size[::-1]
    assert result.overlay().size == size
    assert np.array_equal(decode_mask(result.rle()), result.mask)


def test_arrays_of_other_kinds_are_refused(predictor):
    gray = np.arange(20, dtype=np.uint8).reshape(4, 5)
    assert np.array_equal(np.asarray(predictor(gray, "red")[0].image)[..., 1], gray)
    for array in (
        np.zeros((4, 5, 3)), np.zeros((4, 5, 4), np.uint8), np.zeros((3, 4, 5), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        torch.zeros(3, 4, 5), torch.zeros(4, 5, 3, dtype=torch.uint8), torch.zeros(1, 3, 4, 5, dtype=torch.uint8),
        Image.new("I;16", (4, 5)), Image.new("F", (4, 5)),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"must be uint8|bit image"):
            predictor(array, "red")
    for other in (None, 3, b"image.png", [1]):
        with pytest.raises(TypeError, match="An image must be a path, a PIL image"):
            predictor(other, "red")


def test_damaged_files_are_refused(predictor, tmp_path):
    Image.effect_noise((64, 64), 80).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    for name, content in (("cut.png", whole[:900]), ("empty.jpg", b""), ("text.png", b"a text"), ("a.heic", heic)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"^Cannot decode image .*{name}"):
            predictor(tmp_path / name, "red")
    with pytest.raises(UserError, match="Cannot convert the PIL image to RGB"):
        predictor(Image.open(tmp_path / "cut.png"), "red")
    Image.new("I;16", (4, 5)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png is a 16-bit image .* Convert it to 8 bits per channel"):
        predictor(tmp_path / "deep.png", "red")


@pytest.mark.parametrize("sentence", ["", " \t\n", "\0\x01", "\u200b"])
def test_sentences_without_words_are_refused(predictor, sentence):
    with pytest.raises(ValueError, match=r"contains no words\. Describe the object"):
        predictor(Image.new("RGB", (9, 9)), ["red", sentence])


def test_other_sentences_are_refused(predictor):
    with pytest.raises(ValueError, match="is not valid Unicode"):
        predictor(Image.new("RGB", (9, 9)), "red \ud800")
    with pytest.raises(TypeError, match="A sentence must be a string"):
        predictor(Image.new("RGB", (9, 9)), [3])


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ("the red circle " * 100, "has 302 tokens. The model reads only the first 21, up to"),
        ("red " * 250_000, "has 250002 tokens"),
        ("the red 🐕", "contains words outside the model's vocabulary: '🐕'"),
        ("红色的圆", "contains words outside the model's vocabulary: '红', '色', '的', '圆'"),
    ],
)
def test_warnings_about_sentences(predictor, caplog, crossvlt_log, sentence, message):
    assert len(predictor(Image.new("RGB", (9, 9)), sentence)) == 1
    (record,) = caplog.records
    assert message in record.getMessage()
    assert len(record.getMessage()) < 300


def test_ordinary_sentences_cause_no_warnings(predictor, pairs, caplog, crossvlt_log):
    for path, sentence in pairs[:5]:
        predictor(path, [sentence, sentence.upper(), f" {sentence}\n\x07"])
    assert not caplog.records


def test_results_by_hand():
    probability = np.linspace(0, 1, 30, dtype=np.float32).reshape(5, 6)
    result = Result("x", Image.new("RGB", (6, 5)), FRAME, probability)
    assert result.score == pytest.approx(probability[FRAME].mean())
    assert result.box == (1, 1, 4, 3)
    assert result.polygons() == [[1, 1, 5, 1, 5, 4, 1, 4]]
    assert np.array_equal(decode_mask(json.loads(json.dumps(result.rle()))), FRAME)
    empty = Result("x", Image.new("RGB", (6, 5)), np.zeros((5, 6), bool), probability)
    assert (empty.score, empty.box, empty.polygons()) == (0.0, None, [])
    assert not np.asarray(empty.overlay()).any()


def test_polygons_drawn_by_pycocotools_are_the_mask():
    random = np.random.default_rng(0)
    for _ in range(300):
        H, W = random.integers(1, 12, 2)
        mask = random.random((H, W)) < random.random()
        polygons = mask_to_polygons(mask)
        drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, H, W))) if polygons else 0 * mask
        assert np.array_equal(drawn, ndimage.binary_fill_holes(mask, np.ones((3, 3))))
        assert len(polygons) == ndimage.label(mask)[1]


def examples(page):
    """Return the code of a page that uses the predictor."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return "".join(block for block in blocks if "redictor" in block)


@pytest.mark.parametrize("page", ["README.md", "docs/prediction.md"])
def test_documented_examples(page, checkpoint, pairs, tmp_path, monkeypatch, capsys):
    """They run, and those of README print lines of the documented form."""
    monkeypatch.chdir(tmp_path)
    for path, original in (
        ("checkpoints/demo/best.pth", checkpoint),
        ("refer/data/refshapes/images/refshapes_000001000001.jpg", pairs[0][0]),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        shutil.copy(original, tmp_path / path)
    exec(examples(page), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    if page == "README.md":
        text = (ROOT / page).read_text(encoding="utf-8")
        documented = re.findall(r"^    (the .*: score .*)$", text, re.MULTILINE)
        assert [re.sub(r"\d+", "0", line) for line in lines] == [re.sub(r"\d+", "0", line) for line in documented]
    else:
        assert (tmp_path / "triangle.png").exists()


def test_import_needs_only_packages_of_the_model():
    """Besides those of network, tokenizer and checkpoints: small ones for masks, settings and messages."""
    code = """
import sys, CrossVLT, bert.tokenization, lib.checkpoint
before = set(sys.modules)
import lib.predictor
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    own = {path.stem for path in ROOT.iterdir()}
    packages = {name for name in done.stdout.split() if name not in own and name not in sys.stdlib_module_names}
    small = {"PIL", "pycocotools", "termcolor", "tqdm", "yacs"}
    assert {name for name in packages if not name.startswith("_")} <= small
