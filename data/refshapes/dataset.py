"""Write the files of a RefShapes dataset: annotations, refs, images and vocabulary."""

import json
import os
import pickle
from itertools import count
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from data.refshapes.drawing import render, stamp_of
from data.refshapes.language import describe, vocabulary
from data.refshapes.objects import SHAPES, Scene, SceneObject, random_stream
from data.refshapes.scenes import generate_scene
from data.refshapes.settings import DEFAULT_IMAGES, IDS_PER_SPLIT, NAME, SPLITS, Settings
from lib.errors import UserError
from lib.files import atomic_folder
from lib.terminal import draws_bars
from refer.annotations import Record

INFO_FILE = "refshapes.json"
FILES = ("images", "instances.json", "refs(unc).p", "vocab.txt", INFO_FILE)


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
    """Generate the dataset and return its folder, <root>/refshapes.

    Nothing is written if a complete dataset with the same settings exists, unless ``force`` is set. A dataset with
    other settings is replaced, as a whole or not at all.

    Raises:
        UserError: a setting is invalid; the folder contains other files or is not writable.
    """
    images = {"train": train_images, "val": val_images, "testA": testA_images, "testB": testB_images}
    settings = Settings(level, seed, images)
    folder = Path(root) / NAME
    if force or not is_complete(folder, settings):
        check_replaceable(folder)
        with atomic_folder(folder) as new:
            check_replaceable(folder)  # again, because atomic_folder may have restored an old folder
            write_files(new, settings)
    return folder


def read_info(folder: Path) -> Record:
    """Return the settings and counts of a RefShapes dataset (refshapes.json), or {} if the folder is not one."""
    try:
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) and info.get("name") == NAME else {}


def is_complete(folder: Path, settings: Settings) -> bool:
    """Return whether the folder contains all files of the dataset with these settings."""
    info = read_info(folder)
    return (
        all(info.get(key) == value for key, value in settings.as_dict().items())
        and all((folder / name).exists() for name in FILES)
        and sum(1 for _ in folder.glob(f"images/{NAME}_*.jpg")) == sum(settings.images.values())
    )


def check_replaceable(folder: Path) -> None:
    """Raise a UserError if the folder exists and contains anything but a RefShapes dataset."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not read_info(folder):
        raise UserError(f"{folder} exists and is not a RefShapes dataset. Move it, or choose another --root.")
    others = {path.name for path in folder.iterdir()} - set(FILES)
    others |= {path.name for path in folder.glob("images/*") if not path.match(f"{NAME}_*.jpg")}
    if others:
        raise UserError(f"{folder} also contains {min(others)}, which is not part of RefShapes. Move it first.")


def write_files(folder: Path, settings: Settings) -> None:
    """Write all files of the dataset into an empty folder."""
    (folder / "images").mkdir()
    instances: Record = {
        "info": {"description": f"RefShapes, level {settings.level}, seed {settings.seed}"},
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(SHAPES, start=1)],
    }
    refs: list[Record] = []
    ref_ids, sent_ids = count(), count()
    split_of_scene: dict[tuple, str] = {}
    indices = [(split, index) for split in SPLITS for index in range(settings.images[split])]
    for split, index in tqdm(indices, desc=NAME, unit="image", disable=not draws_bars()):
        scene = generate_scene(settings.seed, split, index, settings.level)
        assert split_of_scene.setdefault(scene.key(), split) == split, "a scene occurs in two splits"
        pixels, masks = render(scene)
        image = _image_record(scene)
        pixels.save(folder / "images" / image["file_name"], quality=95, subsampling=0)
        annotations = _annotation_records(scene, image["id"], masks)
        instances["images"].append(image)
        instances["annotations"] += annotations
        rng = random_stream(scene.seed, split, index, scene.level, purpose=2)
        for target in scene.targets():
            if sentences := describe(scene, target, rng):
                refs.append(
                    {
                        "ref_id": next(ref_ids),
                        "ann_id": annotations[target]["id"],
                        "image_id": image["id"],
                        "category_id": annotations[target]["category_id"],
                        "file_name": image["file_name"].replace(".jpg", f"_{target}.jpg"),  # as in the published files
                        "split": split,
                        **_sentence_records(sentences, sent_ids),
                    }
                )
    info = {**settings.as_dict(), **_counts(refs)}
    (folder / "instances.json").write_text(json.dumps(instances, separators=(",", ":")), encoding="utf-8")
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    (folder / INFO_FILE).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def _image_record(scene: Scene) -> Record:
    image_id = IDS_PER_SPLIT * SPLITS.index(scene.split) + scene.index + 1
    file_name = f"{NAME}_{image_id:012d}.jpg"
    return {"id": image_id, "file_name": file_name, "width": scene.width, "height": scene.height}


def _annotation_records(scene: Scene, image_id: int, masks: list[np.ndarray]) -> list[Record]:
    ids = [10 * image_id + i for i in range(len(masks))]
    annotations = []
    for annotation_id, obj, mask in zip(ids, scene.objects, masks, strict=True):
        if obj.shape == "circle" or obj.hidden_by:  # has no polygon
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            segmentation = {"size": [scene.height, scene.width], "counts": rle["counts"].decode()}
        else:
            segmentation = [_polygon(obj)]
            rle = coco_mask.frPyObjects(segmentation, scene.height, scene.width)[0]
        annotations.append(
            {
                "id": annotation_id,
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
                    "hidden_by": [ids[i] for i in obj.hidden_by],
                },
            }
        )
    return annotations


def _polygon(obj: SceneObject) -> list[float]:
    corners = stamp_of(obj).corners + np.array([obj.left, obj.top])
    return corners.round(2).ravel().tolist()


def _sentence_records(sentences: list[str], sent_ids: count) -> Record:
    records = [{"sent_id": next(sent_ids), "raw": s, "sent": s, "tokens": s.split()} for s in sentences]
    return {"sent_ids": [record["sent_id"] for record in records], "sentences": records}


def _counts(refs: list[Record]) -> dict[str, dict[str, int]]:
    counts = {"refs": dict.fromkeys(SPLITS, 0), "expressions": dict.fromkeys(SPLITS, 0)}
    for ref in refs:
        counts["refs"][ref["split"]] += 1
        counts["expressions"][ref["split"]] += len(ref["sentences"])
    return counts
