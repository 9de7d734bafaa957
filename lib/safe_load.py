"""Load files of PyTorch and safetensors without executing code from them."""

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lib.errors import MissingFileError, UserError
from lib.files import protect


def load_safely(path: Path, allowed: list[type], hint: str = "") -> Any:
    """Load a file of PyTorch or safetensors without executing code from it.

    Args:
        path: of the file.
        allowed: classes whose objects it may contain besides tensors and plain values.
        hint: where to get it, for the message that it does not exist.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is corrupt, or contains another class or tensors without values.
    """
    content = _load(path, allowed, hint)
    _check_tensors(content, path)
    return content


def _load(path: Path, allowed: list[type], hint: str) -> Any:
    if path.is_dir():
        raise MissingFileError(f"{path} is a folder, not a checkpoint file.")
    if not path.is_file():
        raise MissingFileError(f"Checkpoint file {path} does not exist. {hint}")
    protect(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about files of other programs, which are rejected below
            # Mapped files share their memory among the processes of a machine. Old files are not archives.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except SafetensorError as error:
        raise UserError(f"{path} is corrupt or not a safetensors file: {error}.") from error
    except Exception as error:  # torch.load raises many classes for corrupt or other files
        unsafe_class = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe_class:
            raise UserError(
                f"{path} is rejected: it contains an object of class {unsafe_class[1]}, which could execute any code "
                "when it is loaded."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
        if "weights_only" in str(error):  # PyTorch suggests disabling it, which would execute code from the file
            reason = "unknown format"
        raise UserError(f"{path} is corrupt or not a PyTorch file: {reason}.") from error


def _check_tensors(content: Any, path: Path) -> None:
    """Raise a UserError unless all tensors in (nested) lists and dicts are dense and have values."""
    remaining, visited = [("", content)], set()
    while remaining:
        name, item = remaining.pop()
        if isinstance(item, torch.Tensor):
            if item.layout != torch.strided or item.device.type != "cpu" or item.is_quantized:
                kind = "quantized" if item.is_quantized else str(item.layout).removeprefix("torch.")
                kind = "without values" if item.device.type == "meta" else kind
                raise UserError(f"{path} is rejected: its entry {name} is a tensor of an unsupported kind ({kind}).")
        elif isinstance(item, dict | list | tuple) and id(item) not in visited:
            visited.add(id(item))
            entries = item.items() if isinstance(item, dict) else enumerate(item)
            remaining += [(f"{name}.{key}".lstrip("."), value) for key, value in entries]


def verify_checksums(path: Path) -> None:
    """Verify the checksums written by torch.save. torch.load ignores them and would load a corrupt weight."""
    try:
        with zipfile.ZipFile(path) as archive:
            corrupt = archive.testzip()
    except Exception as error:  # corruption in the archive's index can cause any error
        raise UserError(f"{path} is corrupt: {error}.") from error
    if corrupt is not None:
        raise UserError(f"{path} is corrupt: wrong checksum of its entry {corrupt}.")
