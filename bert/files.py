"""Find BERT's files by path, in ./pretrained, in the local Hugging Face cache or on the Hugging Face Hub."""

import re
import threading
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from lib.errors import MissingFileError
from lib.variants import BERT

PRETRAINED = Path("pretrained")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
FILE_SUFFIXES = {".txt", ".bin", ".pth", ".safetensors"}
HUB_TIMEOUT = 8.0  # seconds to wait for the hub's answer; the download itself may take longer


def resolve_bert_file(name: str, filenames: tuple[str, ...], *, flag: str) -> Path:
    """Return the path of a BERT file, downloading it if necessary.

    Args:
        name: the file, a folder that contains it, or a name on the Hugging Face Hub such as bert-base-uncased. A hub
            name is looked up in ./pretrained/<name>/, in ./pretrained/ (bert-base-uncased only), in the local cache
            and on the hub.
        filenames: names that the file may have, in order of preference.
        flag: the flag that ``name`` was passed to, for error messages.

    Raises:
        MissingFileError: the file does not exist in any of these places.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        found = _first_file([path], filenames)
        if found is None:
            raise MissingFileError(f"{flag} {name}: the folder contains no {' or '.join(filenames)}.")
        return found
    is_path = name.startswith((".", "/", "~")) or path.suffix in FILE_SUFFIXES
    if is_path or not HUB_NAME.fullmatch(name):
        raise MissingFileError(f"{flag} {name}: no such file or folder.")
    folders = [PRETRAINED / name, PRETRAINED] if name == BERT else [PRETRAINED / name]
    found = _first_file(folders, filenames) or _cached_file(name, filenames) or _download(name, filenames)
    if found is None:
        command = "Run `python -m refer.prepare --weights bert`, or download" if name == BERT else "Download"
        raise MissingFileError(
            f"{flag} {name}: found neither in ./{PRETRAINED} nor in the local cache, and the Hugging Face Hub does not "
            f"answer or does not have it. {command} {' or '.join(filenames)} from https://huggingface.co/{name} into "
            f"{folders[-1]}/, or pass a file or folder."
        )
    return found


def find_beside(path: Path, name: str, filename: str) -> Path | None:
    """Return another file of the model that ``path`` belongs to, or None if it does not exist.

    Args:
        path: a file that :func:`resolve_bert_file` has found.
        name: what it was found by. If it is a model on the Hub, the file is looked for there. For bert-base-uncased,
            whose sizes are known, the result is None.
        filename: name of the file.
    """
    if name == BERT:
        return None
    beside = path.with_name(filename)
    if beside.is_file():
        return beside
    if Path(name).exists() or PRETRAINED in path.parents:
        return None
    return _cached_file(name, (filename,)) or _download(name, (filename,))


def _first_file(folders: list[Path], filenames: tuple[str, ...]) -> Path | None:
    candidates = [folder / filename for folder in folders for filename in filenames]
    return next((path for path in candidates if path.is_file()), None)


def _cached_file(name: str, filenames: tuple[str, ...]) -> Path | None:
    cached = [try_to_load_from_cache(name, filename) for filename in filenames]
    return next((Path(path) for path in cached if isinstance(path, str)), None)


def _download(name: str, filenames: tuple[str, ...]) -> Path | None:
    """Download the first of these files that exists on the hub. Return None if none does or the hub does not answer.

    The hub is queried in a thread, because its client would retry for minutes.
    """
    available: list[str] = []

    def find_available() -> None:
        for filename in filenames:
            try:
                get_hf_file_metadata(hf_hub_url(name, filename), timeout=HUB_TIMEOUT)
            except Exception:
                continue
            available.append(filename)
            return

    thread = threading.Thread(target=find_available, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    if not available:
        return None
    try:
        return Path(hf_hub_download(name, available[0]))
    except Exception as error:
        raise MissingFileError(f"Cannot download {available[0]} of {name}: {error}") from error
