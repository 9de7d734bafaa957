"""Create the refs of a dataset: the sentences and the split of each object."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.convert.annotations import Objects
from data.convert.sentences import Row, words
from lib.errors import UserError
from lib.files import duplicate_files
from lib.variants import MAX_TOKENS
from refer.annotations import Record

MAX_WORDS = MAX_TOKENS - 2  # [CLS] and [SEP] are tokens too


def build_refs(
    rows: Sequence[Row], objects: Objects, split_of_image: Mapping[str, str]
) -> tuple[list[Record], list[str]]:
    """Return the refs in file order, and warnings.

    Args:
        rows: rows of the sentence file.
        objects: objects of the rows.
        split_of_image: splits of images by file name, for rows without a split.

    Raises:
        UserError: an object is in two splits.
    """
    annotations = {annotation["id"]: annotation for annotation in objects.instances["annotations"]}
    file_names = {image["id"]: image["file_name"] for image in objects.instances["images"]}
    refs: dict[int, Record] = {}  # by annotation
    first_row: dict[int, Row] = {}
    num_sentences = 0
    for row, annotation_id in zip(rows, objects.annotation_ids, strict=True):
        annotation = annotations[annotation_id]
        file_name = file_names[annotation["image_id"]]
        split = row.split or split_of_image[file_name]
        if annotation_id not in refs:
            first_row[annotation_id] = row
            refs[annotation_id] = {
                "ref_id": len(refs),
                "ann_id": annotation_id,
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "file_name": f"{Path(file_name).stem}_{annotation_id}{Path(file_name).suffix}",  # as published
                "split": split,
                "sent_ids": [],
                "sentences": [],
            }
        ref = refs[annotation_id]
        if ref["split"] != split:
            other = f"{ref['split']} ({first_row[annotation_id].location})"
            raise UserError(f"{row.location}: the object is in split {split} here, but in {other} before.")
        if all(sentence["raw"] != row.sentence for sentence in ref["sentences"]):
            tokens = words(row.sentence)
            sentence = {"sent_id": num_sentences, "raw": row.sentence, "sent": " ".join(tokens), "tokens": tokens}
            ref["sentences"].append(sentence)
            ref["sent_ids"].append(num_sentences)
            num_sentences += 1
    repeated = len(rows) - num_sentences
    warnings = [f"repeated sentences of the same object: {repeated}. Each is used once."] if repeated else []
    return list(refs.values()), warnings


def find_problems(refs: Sequence[Record], objects: Objects, image_folder: Path) -> list[str]:
    """Return warnings about properties that are allowed but make training or evaluation less meaningful."""
    file_names = {image["id"]: image["file_name"] for image in objects.instances["images"]}
    warnings = _shared_image_warnings(refs, file_names, image_folder)
    sentences = [sentence for ref in refs for sentence in ref["sentences"]]
    long = [sentence["raw"] for sentence in sentences if len(sentence["tokens"]) > MAX_WORDS]
    if long:
        warnings.append(
            f"sentences with more than {MAX_WORDS} words: {len(long)}, for example “{long[0][:40]}…”. The "
            "other words are ignored unless you raise --max_tokens."
        )
    splits = {ref["split"] for ref in refs}
    if "train" not in splits:
        warnings.append("no split train: the dataset can only be used for evaluation.")
    if "val" not in splits:
        warnings.append("no split val: train.py needs --split to validate on another one.")
    # Sentences of an image are compared without punctuation and upper case.
    objects_of_sentence = Counter(
        pair for ref in refs for pair in {(ref["image_id"], sentence["sent"]) for sentence in ref["sentences"]}
    )
    ambiguous = [pair for pair, count in objects_of_sentence.items() if count > 1]
    if ambiguous:
        image_id, sentence = ambiguous[0]
        warnings.append(
            f"ambiguous sentences, which refer to several objects of one image: {len(ambiguous)}, for example "
            f"“{sentence}” in {file_names[image_id]}."
        )
    return warnings


def _shared_image_warnings(refs: Sequence[Record], file_names: Mapping[int, str], image_folder: Path) -> list[str]:
    """Return warnings about images that occur in several splits, possibly as copies with other names."""
    original = {name: name for name in file_names.values()}
    for copies in duplicate_files(image_folder / name for name in original):
        names = [str(path.relative_to(image_folder)) for path in copies]
        original |= dict.fromkeys(names, names[0])
    files_by_split: dict[str, dict[str, str]] = defaultdict(dict)  # original: {split: file name there}
    for ref in refs:
        name = file_names[ref["image_id"]]
        files_by_split[original[name]].setdefault(ref["split"], name)
    shared = [files for files in files_by_split.values() if len(files) > 1]
    leaks = [files for files in shared if "train" in files]
    others = [files for files in shared if "train" not in files]
    warnings = []
    if leaks:
        warnings.append(
            f"LEAK: images in train and in another split: {len(leaks)}, for example {_example(leaks[0])}. The model "
            "would be evaluated on images that it was trained on."
        )
    if others:
        warnings.append(f"images in several evaluation splits: {len(others)}, for example {_example(others[0])}.")
    return warnings


def _example(file_by_split: Mapping[str, str]) -> str:
    if len(set(file_by_split.values())) == 1:
        return f"{next(iter(file_by_split.values()))} in {' and '.join(file_by_split)}"
    return " and ".join(f"{name} in {split}" for split, name in file_by_split.items()) + " (identical files)"
