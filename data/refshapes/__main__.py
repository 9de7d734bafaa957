"""RefShapes, a small generated dataset for referring segmentation, in the REFER layout. Made in seconds:

    python -m data.refshapes                          # ./refer/data/refshapes, level basic
    python -m data.refshapes --level full --seed 1    # relations and overlaps; replaces the set above
    python -m data.refshapes --root /tmp/data --train-images 200 --val-images 40

Level basic names colour, shape, size and place of objects that lie apart; level full adds relations between objects,
some of which overlap. Every expression is true of exactly one object. In testA another object of the picture has the
target's shape; testB asks for pairs of colour and shape that no other split shows. The same settings always give the
same bytes.

    <root>/refshapes/images/refshapes_<id>.jpg   the pictures
    <root>/refshapes/instances.json              COCO; every annotation also has the "attributes" of its object
    <root>/refshapes/refs(unc).p                 who is referred to, and how
    <root>/refshapes/vocab.txt                   a WordPiece vocabulary of the words used
    <root>/refshapes/refshapes.json              the settings and the counts

Legend: H, W height and width of a picture in pixels.
"""

import json
import os
import pickle
import signal
import string
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from data.refshapes.language import Description, candidates
from data.refshapes.objects import (
    COLORS,
    LEVELS,
    MOST,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    draw,
    random_stream,
    stamp,
    whole_mask,
)
from data.refshapes.scenes import generate_scene
from data.staging import made_aside
from lib.cli import run_command
from lib.errors import UserError
from lib.files import translate_write_errors

__all__ = ["Expression", "Scene", "describe", "generate_scene", "get_parser", "main", "render", "write_refshapes"]

NAME = "refshapes"
VERSION = 1  # of what is generated: raise it with any change of the pictures, the sentences or the files
INFO_FILE = "refshapes.json"
FILES = ("images", "instances.json", "refs(unc).p", "vocab.txt", INFO_FILE)
DEFAULT_IMAGES = {"train": 6000, "val": 320, "testA": 150, "testB": 150}
IDS_PER_SPLIT = 1_000_000  # picture ids of a split start at a multiple, so that no split moves another one's
# How often a kind of expression is chosen where the scene offers it.
KIND_WEIGHTS = {
    "basic": {"color": 9, "shape": 3, "color+shape": 14, "size": 5, "biggest": 1, "place": 1.5, "leftmost": 0.4},
    "full": {"color": 4, "shape": 4, "color+shape": 5, "size": 5, "biggest": 1.5, "place": 3, "leftmost": 1.5,
             "relation": 7, "overlap": 10},
}  # fmt: skip
REDUNDANT = 0.5  # factor for a kind that here says more than it needs to ("the small red circle" of one red circle)


# The ways to say a property.
WORDS: dict[str, tuple[str, ...]] = {
    "large": ("large", "big"),
    "biggest": ("biggest", "largest"),
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    **{corner: (f"in the {corner}",) for corner in PLACES if " " in corner},
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "below": ("below", "under"),
}
ANY_SHAPE = {"basic": ("shape", "one"), "full": ("shape", "one", "object")}


@dataclass(frozen=True)
class Expression:
    """A sentence and what kind of expression it is, one of KIND_WEIGHTS."""

    text: str
    kind: str


def describe(scene: Scene, target: int, rng: np.random.Generator, count: int | None = None) -> list[Expression]:
    """Up to `count` different expressions (by default 1 to 3, drawn), each of another kind and true of the target only;
    none where the scene offers no clear one."""
    weights = KIND_WEIGHTS[scene.level]
    count = draw(rng, {1: 0.6, 2: 0.3, 3: 0.1}) if count is None else count
    found: dict[str, tuple[list[Description], list[Description]]] = {kind: ([], []) for kind in weights}
    for description, redundant in candidates(scene, target):
        found[description.kind()][redundant].append(description)
    chances = {
        kind: weights[kind] * (1 if needed else REDUNDANT)
        for kind, (needed, redundant) in found.items()
        if needed or redundant
    }
    expressions: list[Expression] = []
    while chances and len(expressions) < count:
        kind = draw(rng, chances)
        del chances[kind]
        choices = found[kind][0] or found[kind][1]
        expressions.append(Expression(say(choices[rng.integers(len(choices))], rng, scene.level), kind))
    return expressions


def say(description: Description, rng: np.random.Generator, level: str) -> str:
    """The description in words, one of several ways."""

    def one(ways: tuple[str, ...]) -> str:
        return ways[rng.integers(len(ways))]

    words = ["the"] if rng.random() < 0.5 else []
    words += [one(WORDS.get(word, (word,))) for word in (description.most, description.size) if word]
    words += [description.color] if description.color else []
    words.append(description.shape or one(ANY_SHAPE[level]))
    words += [one(WORDS.get(word, (word,))) for word in (description.place, description.relation) if word]
    words += ["the " + say(description.landmark, rng, level).removeprefix("the ")] if description.landmark else []
    return " ".join(words)


def render(scene: Scene) -> tuple[Image.Image, list[np.ndarray]]:
    """The RGB picture, and what is visible of every object in it: (H, W) bool each, in the scene's order."""
    rng = random_stream(scene.seed, scene.split, scene.index, scene.level, purpose=1)
    grey, red, green, blue, along_x, along_y = scene.background
    columns = np.linspace(-along_x, along_x, scene.width, dtype=np.float32)
    rows = np.linspace(-along_y, along_y, scene.height, dtype=np.float32)
    slope = rows[:, None] + columns
    canvas = np.stack([slope + (grey + tint) for tint in (red, green, blue)], axis=2)
    picture = Image.fromarray(canvas.astype(np.uint8))
    for obj in sorted(scene.objects, key=lambda o: not o.hidden_by):  # what is partly hidden first
        picture.paste(obj.rgb, (obj.left, obj.top), stamp(obj)[1].cover)
    noise = rng.integers(-5, 6, size=canvas.shape, dtype=np.int8)
    picture = Image.fromarray((np.asarray(picture, np.int16) + noise).clip(0, 255).astype(np.uint8))
    whole = [whole_mask(obj, (scene.height, scene.width)) for obj in scene.objects]
    masks = list(whole)
    for i, obj in enumerate(scene.objects):
        for j in obj.hidden_by:
            masks[i] = masks[i] & ~whole[j]
    return picture, masks


# ------------------------------------------------------------------------------------------------- the files


def _segmentation(scene: Scene, index: int, mask: np.ndarray) -> tuple[list[list[float]] | dict[str, Any], Any]:
    """The annotation's segmentation and its RLE: a polygon, or the RLE itself for what is round or partly hidden."""
    obj = scene.objects[index]
    if obj.shape == "circle" or obj.hidden_by:
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        return {"size": [scene.height, scene.width], "counts": rle["counts"].decode()}, rle
    corners = stamp(obj)[1].corners + np.array([obj.left, obj.top])
    polygon = [corners.round(2).ravel().tolist()]
    return polygon, coco_mask.frPyObjects(polygon, scene.height, scene.width)[0]


def _annotations(scene: Scene, image_id: int, masks: list[np.ndarray]) -> list[dict[str, Any]]:
    ids = [10 * image_id + i for i in range(len(masks))]
    annotations = []
    for i, (obj, mask) in enumerate(zip(scene.objects, masks, strict=True)):
        segmentation, rle = _segmentation(scene, i, mask)
        annotations.append({
            "id": ids[i],
            "image_id": image_id,
            "category_id": SHAPES.index(obj.shape) + 1,
            "bbox": coco_mask.toBbox(rle).tolist(),
            "area": int(coco_mask.area(rle)),
            "iscrowd": 0,
            "segmentation": segmentation,
            "attributes": {
                "shape": obj.shape,
                "color": obj.color,
                "size": obj.size,
                "cx": round(obj.cx, 2),
                "cy": round(obj.cy, 2),
                "visible": round(obj.visible, 4),
                "hidden_by": [ids[j] for j in obj.hidden_by],
            },
        })  # fmt: skip
    return annotations


def _write_pictures(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write all pictures; returns the content of instances.json and of the refs file."""
    instances: dict[str, Any] = {
        "info": {"description": f"RefShapes, level {settings['level']}, seed {settings['seed']}"},
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(SHAPES, start=1)],
    }
    refs: list[dict[str, Any]] = []
    sent_ids = iter(range(sys.maxsize))
    shown: dict[tuple, str] = {}
    numbers = [(split, i) for split in SPLITS for i in range(settings["images"][split])]
    for split, i in tqdm(numbers, desc=NAME, unit="image", disable=None):
        scene = generate_scene(settings["seed"], split, i, settings["level"])
        assert shown.setdefault(scene.key(), split) == split, "a scene occurs in two splits"
        picture, masks = render(scene)
        image_id = IDS_PER_SPLIT * SPLITS.index(split) + i + 1
        name = f"{NAME}_{image_id:012d}"
        picture.save(folder / "images" / f"{name}.jpg", quality=95, subsampling=0)
        image = {"id": image_id, "file_name": f"{name}.jpg", "width": scene.width, "height": scene.height}
        instances["images"].append(image)
        instances["annotations"] += (annotations := _annotations(scene, image_id, masks))
        rng = random_stream(scene.seed, split, i, scene.level, purpose=2)
        for target in scene.targets():
            texts = [expression.text for expression in describe(scene, target, rng)]
            sentences = [{"sent_id": next(sent_ids), "raw": t, "sent": t, "tokens": t.split()} for t in texts]
            if sentences:
                refs.append({
                    "ref_id": len(refs),
                    "ann_id": annotations[target]["id"],
                    "image_id": image_id,
                    "category_id": annotations[target]["category_id"],
                    "file_name": f"{name}_{target}.jpg",  # with a suffix, as in the REFER files
                    "split": split,
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    "sentences": sentences,
                })  # fmt: skip
    return instances, refs


def vocabulary() -> list[str]:
    """The WordPiece vocabulary: special tokens, the words of both levels, single characters for all other words."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    names = ("the", *COLORS, *SHAPES, *SIZES, *MOST, *PLACES, *RELATIONS)
    phrases = [phrase for name in names for phrase in WORDS.get(name, (name,))]
    words = sorted({word for phrase in (*phrases, *ANY_SHAPE["full"]) for word in phrase.split()})
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *characters, *(f"##{c}" for c in characters)]


def _counts(refs: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    counts = {"refs": dict.fromkeys(SPLITS, 0), "expressions": dict.fromkeys(SPLITS, 0)}
    for ref in refs:
        counts["refs"][ref["split"]] += 1
        counts["expressions"][ref["split"]] += len(ref["sentences"])
    return counts


def _fill(folder: Path, settings: dict[str, Any]) -> None:
    """Write the whole set into this empty folder."""
    (folder / "images").mkdir()
    instances, refs = _write_pictures(folder, settings)
    counts = _counts(refs)
    assert settings["images"]["val"] < DEFAULT_IMAGES["val"] or counts["expressions"]["val"] >= 1000
    (folder / "instances.json").write_text(json.dumps(instances, separators=(",", ":")), encoding="utf-8")
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    (folder / INFO_FILE).write_text(json.dumps({**settings, **counts}, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the folder


def _settings(level: str, seed: int, images: dict[str, int]) -> dict[str, Any]:
    """What the set depends on, checked; the first entries of refshapes.json."""
    if level not in LEVELS:
        raise UserError(f"unknown level {level!r}: choose {' or '.join(LEVELS)}")
    if seed < 0:
        raise UserError(f"the seed must be 0 or more, got {seed}")
    for split, count in images.items():
        if not 0 <= count < IDS_PER_SPLIT:
            raise UserError(f"the number of {split} images must be from 0 to {IDS_PER_SPLIT - 1}, got {count}")
    if not any(images.values()):
        raise UserError("there is nothing to write: ask for at least one image in one split")
    return {"name": NAME, "version": VERSION, "level": level, "seed": seed, "images": images}


def read_info(folder: Path) -> dict[str, Any] | None:
    """The settings and counts of a RefShapes set (refshapes.json); None if the folder is not one."""
    try:
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) and info.get("name") == NAME else None


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    info = read_info(folder) or {}
    if any(info.get(key) != value for key, value in settings.items()):
        return False
    if not all((folder / name).exists() for name in FILES):
        return False
    return sum(1 for _ in folder.glob(f"images/{NAME}_*.jpg")) == sum(settings["images"].values())


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace anything but a RefShapes set with nothing else in it."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or read_info(folder) is None:
        raise UserError(f"{folder} is in the way and is not a RefShapes set: move it, or choose another root")
    strangers = {path.name for path in folder.iterdir()} - set(FILES)
    strangers |= {path.name for path in folder.glob("images/*") if not path.match(f"{NAME}_*.jpg")}
    if strangers:
        raise UserError(f"{folder} also holds {min(strangers)}, which is not RefShapes': move it first")


def write_refshapes(
    root: str | Path,
    *,
    level: str = "basic",
    seed: int = 0,
    train_images: int = DEFAULT_IMAGES["train"],
    val_images: int = DEFAULT_IMAGES["val"],
    testA_images: int = DEFAULT_IMAGES["testA"],
    testB_images: int = DEFAULT_IMAGES["testB"],
    force: bool = False,
) -> Path:
    """Make the dataset, and return its folder <root>/refshapes. A finished set of the same settings is left as it is
    unless `force`; one of other settings is replaced. The folder appears only when all of it is written."""
    images = {"train": train_images, "val": val_images, "testA": testA_images, "testB": testB_images}
    settings = _settings(level, seed, images)
    folder = Path(root) / NAME
    if not force and _is_finished(folder, settings):
        return folder
    _check_replaceable(folder)
    with translate_write_errors(folder), made_aside(folder) as new:
        _check_replaceable(folder)  # one that a killed process had put away is back now
        _fill(new, settings)
    return folder


def get_parser() -> "Parser":  # noqa: F821
    """The flags of `python -m data.refshapes`."""
    from lib.cli import Parser

    parser = Parser(prog="python -m data.refshapes", description=__doc__)
    parser.add_argument("--root", type=Path, default="./refer/data", help="folder of the datasets (%(default)s)")
    parser.add_argument("--level", default="basic", metavar="{basic,full}", help="of the language (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another set (%(default)s)")
    for split, count in DEFAULT_IMAGES.items():
        parser.add_argument(f"--{split}-images", type=int, default=count, metavar="N", help="(%(default)s)")
    parser.add_argument("--force", action="store_true", help="make it anew even if it is already there")
    return parser


def main() -> None:
    flags = vars(get_parser().parse_args())
    images = {split: flags[f"{split}_images"] for split in SPLITS}
    settings = _settings(flags["level"], flags["seed"], images)
    there = not flags["force"] and _is_finished(flags["root"] / NAME, settings)
    folder = write_refshapes(**flags)
    info = read_info(folder) or {}
    if there:
        print(f"{folder} already holds the set of level {info['level']}, seed {info['seed']}: nothing to do")
    counts = "; ".join(
        f"{s} {info['images'][s]} images, {info['refs'][s]} refs, {info['expressions'][s]} expressions" for s in SPLITS
    )
    print(f"{counts}; in {folder}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up then, too
    run_command(main)
