"""Makes refs of the rows of a sentence file: who is referred to, by which sentences, in which split."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data.convert.sentences import Row, words
from lib.errors import UserError
from lib.variants import MAX_TOKENS
from refer.annotations import Record
from utils import derive_seed

TRIED_SEEDS = 200


class Refs(NamedTuple):
    """What a refs(<splitBy>).p holds, and where it comes from."""

    refs: list[Record]
    places: list[str]  # of each ref, the first row about it
    warnings: list[str]


def splits_of(
    rows: Sequence[Row], names: Sequence[str], *, val_share: float, test_share: float, seed: int
) -> list[str]:
    """Each row's split: its own, or where the file has none, one drawn for its picture.

    A picture's split depends on its name and the seed alone, so pictures that are added later don't move others.

    Args:
        rows: all of a file.
        names: the file names of their pictures.
        val_share, test_share: expected shares of the pictures; 0: no such split.
        seed: another one, other splits.

    Raises:
        UserError: a split would be empty; it names a seed by which none is.
    """
    if rows[0].split:
        return [row.split for row in rows]
    shares = {"val": val_share, "test": test_share, "train": 1 - val_share - test_share}
    different, wanted = sorted(set(names)), {split for split, share in shares.items() if share > 0}
    drawn = {name: _draw(name, shares, seed) for name in different}
    lacking = wanted - set(drawn.values())
    if lacking:
        told = f"of {len(different)} pictures none falls into {' or '.join(sorted(lacking))} by --seed {seed}"
        tried = [Counter(_draw(name, shares, other) for name in different) for other in range(TRIED_SEEDS)]
        better = [other for other, counts in enumerate(tried) if counts.keys() == wanted]
        if not better:
            raise UserError(f"{told}: add a column split, or set --val-share and --test-share")

        def distance(other: int) -> float:
            return sum(abs(tried[other][split] - share * len(different)) for split, share in shares.items())

        best = min(better, key=distance)
        numbers = ", ".join(f"{tried[best][split]} {split}" for split in ("train", "val", "test") if split in wanted)
        raise UserError(f"{told}; --seed {best} gives {numbers}, or add a column split")
    return [drawn[name] for name in names]


def _draw(name: str, shares: dict[str, float], seed: int) -> str:
    place = derive_seed("split of a picture", seed, name) / 2**63
    if place < shares["val"]:
        return "val"
    return "test" if place < shares["val"] + shares["test"] else "train"


def group(
    rows: Sequence[Row],
    keys: Sequence[tuple[int, int]],
    splits: Sequence[str],
    instances: dict,
    first_names: Mapping[str, str],
) -> Refs:
    """One ref for each object, with all its sentences, in the order of the file.

    Args:
        rows, keys, splits: of each sentence its row, the ids of its image and annotation, and its split.
        instances: the content of the instances.json.
        first_names: of each picture's file name the first one of the same content.

    Raises:
        UserError: an object is in two splits.
    """
    images = {image["id"]: image for image in instances["images"]}
    categories = {annotation["id"]: annotation["category_id"] for annotation in instances["annotations"]}
    of_key: dict[tuple[int, int], Record] = {}
    places: list[str] = []
    repeated = sent_id = 0
    for row, key, split in zip(rows, keys, splits, strict=True):
        if key not in of_key:
            name = Path(images[key[0]]["file_name"])
            of_key[key] = {
                "ref_id": len(of_key),
                "ann_id": key[1],
                "image_id": key[0],
                "category_id": categories[key[1]],
                "file_name": f"{name.stem}_{key[1]}{name.suffix}",  # with a suffix, as in the published files
                "split": split,
                "sent_ids": [],
                "sentences": [],
            }
            places.append(row.where)
        ref = of_key[key]
        if ref["split"] != split:
            raise UserError(
                f"{row.where}: split {split}, but the same object is in {ref['split']} ({places[ref['ref_id']]})"
            )
        if any(sentence["raw"] == row.sentence for sentence in ref["sentences"]):
            repeated += 1
            continue
        tokens = words(row.sentence)
        ref["sent_ids"].append(sent_id)
        ref["sentences"].append({
            "sent_id": sent_id, "raw": row.sentence, "sent": " ".join(tokens), "tokens": tokens,
        })  # fmt: skip
        sent_id += 1
    refs = list(of_key.values())
    warnings = [f"{repeated} rows repeat a sentence about the same object and count once"] if repeated else []
    return Refs(refs, places, warnings + _doubts(refs, images, first_names))


def _doubts(refs: list[Record], images: dict[int, Record], first_names: Mapping[str, str]) -> list[str]:
    """What is allowed but makes numbers mean less."""
    splits, objects, told = defaultdict(dict), Counter(), []
    for ref in refs:
        name = images[ref["image_id"]]["file_name"]
        splits[first_names[name]].setdefault(ref["split"], name)  # a picture may have several ids, and names
        # Compared as the model reads them, but for punctuation.
        objects.update({(ref["image_id"], sentence["sent"]) for sentence in ref["sentences"]})
    shared = [name for name, several in splits.items() if len(several) > 1]
    leaks = [name for name in shared if "train" in splits[name]]
    for those, opening, means in (
        (leaks, "LEAK: ", ": a model is judged on pictures that it was trained on"),
        ([name for name in shared if name not in leaks], "", ", none of them in train"),
    ):
        if those:
            several = splits[those[0]]
            by_name = len(set(several.values())) > 1
            one = [f"{split} as {name}" if by_name else split for split, name in several.items()]
            subject = f"the content of {those[0]}" if by_name else those[0]
            told.append(
                f"{opening}{len(those)} pictures are in several splits, {subject} in {' and '.join(one)} for one{means}"
            )
    unclear = [key for key, count in objects.items() if count > 1]
    long = [sentence for ref in refs for sentence in ref["sentences"] if len(sentence["tokens"]) > MAX_TOKENS - 2]
    if long:
        told.append(
            f"{len(long)} sentences have more than {MAX_TOKENS - 2} words, “{long[0]['raw'][:40]}…” for one: their "
            "ends are not read, unless --max_tokens is raised"
        )
    for split, means in (("train", "nothing to train on"), ("val", "train.py needs --split to validate on another")):
        if all(ref["split"] != split for ref in refs):
            told.append(f"no split {split}: {means}")
    if unclear:
        told.append(
            f"{len(unclear)} sentences are about several objects of one picture, “{unclear[0][1]}” in "
            f"{images[unclear[0][0]]['file_name']} for one: nothing tells which is meant"
        )
    return told
