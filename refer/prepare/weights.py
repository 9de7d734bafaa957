"""Verify and install pretrained weights, BERT's vocabulary and the released weights of CrossVLT."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

from lib.cli import LOGGER
from lib.errors import UserError
from lib.files import translate_write_errors
from lib.variants import BERT, BERT_VOCAB_SIZE, RELEASED_FILES, RELEASED_URL, SWIN_VARIANTS
from refer.datasets import BERT_VOCABULARY, BERT_WEIGHTS, README_BERT, weights_url
from refer.prepare.download import Options, install_from_sources
from refer.prepare.files import DOWNLOADS, Hashes, RejectedError, link_or_copy, locked_hashes, replace_keeping

WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"


def find_weight_faults(
    names: Sequence[str], folder: Path, hashes: Hashes, local: Sequence[Path] = ()
) -> dict[str, str]:
    """Return {file name: what is wrong; empty if valid} for all files of these ``refer.datasets.WEIGHTS``.

    BERT's weights are published as two files, of which one is enough. A file in ``folder`` or among the user's files
    (``local``) is preferred.
    """
    files = []
    for name in names:
        if name == "crossvlt":
            files += RELEASED_FILES.values()
            continue
        if name.startswith("swin_"):
            files.append(SWIN_VARIANTS[name.removeprefix("swin_")]["pretrained"])
            continue
        files.append(BERT_VOCABULARY)
        if name == "bert":
            existing = [file for place in (folder, *local) for file in BERT_WEIGHTS if _find(place, file).is_file()]
            files.append((existing or BERT_WEIGHTS)[0])
    return {file: weights_fault(folder / file, file) or hashes.difference(file, folder / file) for file in files}


def prepare_weights(names: Sequence[str], folder: Path, options: Options) -> list[Path]:
    """Install the files of these ``refer.datasets.WEIGHTS``, unless valid ones exist, and return their paths.

    Raises:
        UserError: no source has a valid file.
    """
    if "bert" in names:
        LOGGER.info(
            f"BERT: {BERT}, the default of --ck_bert. The README of the authors' repository links {README_BERT}, which "
            "has the same sizes, but was trained differently. See pretrained/README.md."
        )
    with locked_hashes(folder) as hashes:
        faults = find_weight_faults(names, folder, hashes, options.local)
        for file, fault in faults.items():
            path = folder / file
            if not fault:
                LOGGER.info(f"{path} is already installed.")
                hashes.record({file: path})
                continue
            LOGGER.info(f"{path} {fault}. Installing it.")
            install_from_sources(
                lambda source, path=path: install_weights(source, path, hashes),
                local=[source for place in options.local if (source := _find(place, file)).is_file()],
                urls=[weights_url(file)],
                target=folder / DOWNLOADS / file,
                hashes=hashes,
                options=options,
                by_hand=_by_hand(file),
            )
    return [folder / file for file in faults]


def install_weights(source: Path, path: Path, hashes: Hashes) -> None:
    """Verify a file and link or copy it to ``path``. RejectedError: it is not the published file of that name."""
    if fault := weights_fault(source, path.name) or hashes.difference(path.name, source):
        raise RejectedError(fault)
    temporary = path.with_name(f".{path.name}.part")
    with translate_write_errors(path):
        link_or_copy(source, temporary)
    replace_keeping(temporary, path)
    hashes.record({path.name: path})


def _by_hand(file: str) -> str:
    """Return the instructions for downloading a file with a browser."""
    if file in RELEASED_FILES.values():
        return (
            f"Open {RELEASED_URL} in a browser, click ⋮ and Download beside {', '.join(RELEASED_FILES.values())}, and "
            "pass the folder of the downloaded files with --from"
        )
    return f"Download it by hand from {weights_url(file)} and pass it with --from"


def _find(path: Path, name: str) -> Path:
    """Return the path of the file ``name`` if ``path`` is a folder that may contain it, or the file itself."""
    return path if path.name == name and path.is_file() else path / name


def weights_fault(path: Path, name: str) -> str:
    """Return what is wrong with a weights or vocabulary file that is published as ``name``; empty if it is valid."""
    if not path.is_file():
        return "is missing"
    if name in RELEASED_FILES.values():
        return _crossvlt_fault(path)
    try:
        if name == BERT_VOCABULARY:
            tokens = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
            is_valid = len(tokens) == BERT_VOCAB_SIZE and tokens[0] == "[PAD]"
            return "" if is_valid else "is not the vocabulary of bert-base-uncased"
        shapes = _read_shapes(path, name)
    except Exception as error:  # torch.load and safetensors raise many types for a corrupt file
        details = " ".join(str(error).split("\n")[0].split())[:100]
        return f"is truncated, corrupt or not a weights file ({type(error).__name__}: {details})"
    for size, variant in SWIN_VARIANTS.items():
        if name == variant["pretrained"]:
            is_valid = shapes.get("patch_embed.proj.weight") == (variant["embed_dim"], 3, 4, 4)
            return "" if is_valid else f"has no patch_embed.proj.weight of Swin {size}"
    vocab_sizes = [shape[0] for key, shape in shapes.items() if key.endswith(WORD_EMBEDDINGS)]
    return "" if vocab_sizes == [BERT_VOCAB_SIZE] else f"has no {WORD_EMBEDDINGS} with {BERT_VOCAB_SIZE} rows"


def _crossvlt_fault(path: Path) -> str:
    """Return why a file cannot be loaded as a CrossVLT; empty if it can."""
    from lib.checkpoint import read_checkpoint, rebuild

    try:
        checkpoint = read_checkpoint(path)
        checkpoint.check_network("crossvlt", hint="")
        rebuild(checkpoint)
    except UserError as error:
        return str(error).removeprefix(str(path)).strip(" :.")
    return ""


def _read_shapes(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of the tensors in a file. For a safetensors file, only the header is read."""
    if name.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    import torch

    # Only zip files can be mapped into memory, not the pickles of older PyTorch versions.
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    weights = loaded.get("model", loaded)
    return {key: tuple(tensor.shape) for key, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
