"""Brings the weights that training begins with, and BERT's vocabulary, into pretrained/."""

import shlex
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from lib.errors import UserError
from lib.files import translate_write_errors
from lib.variants import BERT_VOCAB_SIZE
from refer.prepare.annotations import DOWNLOADS
from refer.prepare.download import Patience, is_refused_name, obtain, remove_if_empty
from refer.prepare.hashes import Hashes, keep_replaced
from refer.prepare.responses import OtherFileError, RefusedError
from refer.sources import BERT_VOCABULARY, BERT_WEIGHTS, SWIN_FILES, weight_addresses
from utils import LOGGER

WEIGHTS = (*(f"swin_{size}" for size in SWIN_FILES), "bert", "bert_vocabulary")
EMBED_DIMS = {"tiny": 96, "small": 96, "base": 128, "large": 192}
WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
STARTS = {  # first bytes, by the end of the name; torch.save writes a zip or, long ago, a pickle
    ".pth": (b"PK\x03\x04", b"\x80\x02"),
    ".bin": (b"PK\x03\x04", b"\x80\x02"),
    ".txt": (b"[PAD]",),
}


def files_of(weights: str, folder: Path, given: Sequence[Path] = ()) -> list[str]:
    """The files that one of WEIGHTS means; of those that will do, one that is in the folder or in a place that the user
    has named, else the one to download."""
    if weights == "bert_vocabulary":
        return [BERT_VOCABULARY]
    if weights != "bert":
        return [SWIN_FILES[weights.removeprefix("swin_")]]
    there = [name for name in BERT_WEIGHTS if Path(folder, name).is_file()]
    there += [name for name in BERT_WEIGHTS if any(_source(place, name).is_file() for place in given)]
    return [BERT_VOCABULARY, (there or BERT_WEIGHTS)[0]]


def weights_fault(path: Path) -> str:
    """What is wrong with a file of weights, or the vocabulary; empty if nothing is."""
    try:
        if not path.is_file():
            return "is missing"
        if path.suffix == ".txt":
            return _vocabulary_fault(path)
        shapes = _shapes(path)
    except Exception as error:  # torch.load and safetensors raise many kinds for a damaged file
        told = " ".join(str(error).split("\n")[0].split())[:100]
        return f"is cut short, damaged or no file of weights ({type(error).__name__}: {told})"
    size = next((size for size, name in SWIN_FILES.items() if name == path.name), None)
    if size is None:
        found = [shape for name, shape in shapes.items() if name.endswith(WORD_EMBEDDINGS)]
        return (
            "" if [one[0] for one in found] == [BERT_VOCAB_SIZE] else f"has no {WORD_EMBEDDINGS} of BERT's vocabulary"
        )
    if shapes.get("patch_embed.proj.weight") != (EMBED_DIMS[size], 3, 4, 4):
        return f"has no patch_embed.proj.weight of Swin {size}"
    return ""


def prepare_weights(
    names: Sequence[str],
    folder: Path,
    *,
    given: Sequence[Path] = (),
    download: bool = True,
    mirrors: Sequence[str] = (),
    patience: Patience | None = None,
) -> list[Path]:
    """Bring the files of these WEIGHTS into a folder; those that are there and right are kept.

    given: files, or folders of files, to look in first.

    Raises: UserError: a file can't be had, or is not the one recorded earlier.
    """
    hashes, paths = Hashes(folder), []
    for name in dict.fromkeys(file for one in names for file in files_of(one, folder, given)):
        path = Path(folder, name)
        fault = _fault(path, name, hashes)
        if fault:
            if path.exists():
                LOGGER.warning(f"{path} {fault}: getting it again")
            _bring(path, hashes, given, mirrors if download else None, patience)
        else:
            LOGGER.info(f"{path} is there already")
        hashes.record({name: path})
        paths.append(path)
    return paths


def weights_problems(names: Sequence[str], folder: Path) -> list[str]:
    """What is wrong with the files of these WEIGHTS in a folder; nothing is written."""
    hashes, found = Hashes(folder), []
    for one in names:
        for name in files_of(one, folder):
            if fault := _fault(Path(folder, name), name, hashes):
                command = f"python -m refer.prepare --weights {one} --pretrained {shlex.quote(str(folder))}"
                found.append(f"{Path(folder, name)} {fault}. To get it again: `{command}`")
    return found


def _bring(
    path: Path, hashes: Hashes, given: Sequence[Path], mirrors: Sequence[str] | None, patience: Patience | None
) -> None:
    """Get one file from a place the user has named, else from the internet. mirrors: None where that isn't wanted."""
    aside = path.parent / DOWNLOADS / path.name

    def accept(file: Path) -> None:
        if fault := weights_fault(file):
            raise RefusedError(fault)
        if told := hashes.difference(path.name, file):
            raise OtherFileError(told)
        with translate_write_errors(path):
            if path.exists():
                keep_replaced(path)
            file.replace(path)

    reasons = []
    try:
        for place in given:
            source = _source(place, path.name)
            if not source.is_file():
                continue
            with translate_write_errors(aside):
                aside.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, aside)
            try:
                return accept(aside)
            except RefusedError as refused:
                reasons.append(f"; {source} {refused}")
                aside.unlink()
        if mirrors is None:
            raise UserError(f"{path.name} is not in what --from names{''.join(reasons)}; --download downloads it")
        addresses = [f"{mirror}/{path.name}" for mirror in mirrors] + weight_addresses(path.name)
        obtain(addresses, aside, accept, starts=STARTS.get(path.suffix, ()), patience=patience)
    finally:
        remove_if_empty(aside.parent)


def _source(place: Path, name: str) -> Path:
    """Where a file of this name would be in a place that the user has named, a folder or a file."""
    # What an earlier download gave and was kept is meant for this file, too.
    is_meant = place.name == name or is_refused_name(place.name, Path(name))
    return place if is_meant and place.is_file() else place / name


def _fault(path: Path, name: str, hashes: Hashes) -> str:
    return weights_fault(path) or hashes.difference(name, path)


def _vocabulary_fault(path: Path) -> str:
    tokens = path.read_text(encoding="utf-8").rstrip("\n").split("\n")  # as bert.tokenization reads it
    if len(tokens) != BERT_VOCAB_SIZE:
        return f"has {len(tokens)} lines, the vocabulary of bert-base-uncased {BERT_VOCAB_SIZE}"
    return "" if tokens[0] == "[PAD]" else "is no BERT vocabulary: [PAD] isn't first"


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors in a file; of a safetensors file only the header is read, which says its length."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    import torch

    # Files of the kind that is no zip can't be mapped into memory.
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    weights = loaded.get("model", loaded)
    return {name: tuple(one.shape) for name, one in weights.items() if isinstance(one, torch.Tensor)}
