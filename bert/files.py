"""Where BERT's files are: a path, ./pretrained, the local Hugging Face cache, and last the hub itself."""

import re
import threading
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from lib.errors import MissingFileError

PRETRAINED = Path("pretrained")
PUBLISHED = "bert-base-uncased"  # whose files may lie in ./pretrained itself
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
HUB_TIMEOUT = 8.0  # seconds to find out whether the hub answers; a download that has begun may take its time


def find_bert_file(name: str, filenames: tuple[str, ...], *, flag: str) -> Path:
    """Find one of ``filenames`` (the first that exists) of the BERT that ``name`` means.

    Args:
        name: the file itself, a folder holding it, or a hub name such as bert-base-uncased; for the last,
            ./pretrained/<name>/, ./pretrained/ (bert-base-uncased only) and the local cache come before the hub.
        filenames: what the file may be called.
        flag: the flag that ``name`` came from, for the message.

    Raises:
        MissingFileError: it is nowhere; the message says what to put where.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        found = _first_of(path, filenames)
        if found is None:
            raise MissingFileError(f"{flag} {name}: that folder holds no {' or '.join(filenames)}")
        return found
    looks_like_a_path = name.startswith((".", "/", "~")) or path.suffix in {".txt", ".bin", ".pth", ".safetensors"}
    if looks_like_a_path or not HUB_NAME.fullmatch(name):
        raise MissingFileError(f"{flag} {name}: no such file or folder")
    folders = [PRETRAINED / name] + ([PRETRAINED] if name == PUBLISHED else [])
    for folder in folders:
        found = _first_of(folder, filenames)
        if found is not None:
            return found
    for filename in filenames:
        cached = try_to_load_from_cache(name, filename)
        if isinstance(cached, str):
            return Path(cached)
    fetched = _fetch(name, filenames)
    if fetched is None:
        raise MissingFileError(
            f"{flag} {name}: not in ./{PRETRAINED} nor in the local cache, and the hub can't be reached or doesn't "
            f"have it; put {' or '.join(filenames)} from https://huggingface.co/{name} into {folders[-1]}/"
            + (" (`python -m refer.prepare --weights bert` does)" if name == PUBLISHED else "")
            + ", or name a file or folder"
        )
    return fetched


def _first_of(folder: Path, filenames: tuple[str, ...]) -> Path | None:
    return next((folder / filename for filename in filenames if (folder / filename).is_file()), None)


def _fetch(name: str, filenames: tuple[str, ...]) -> Path | None:
    """Download from the hub if it answers in time (its client's own retries would take minutes)."""
    answered: list[str] = []

    def ask() -> None:
        for filename in filenames:
            try:
                get_hf_file_metadata(hf_hub_url(name, filename), timeout=HUB_TIMEOUT)
            except Exception:
                continue
            answered.append(filename)
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    if not answered:
        return None
    try:
        return Path(hf_hub_download(name, answered[0]))
    except Exception as error:
        raise MissingFileError(f"downloading {answered[0]} of {name} broke off: {error}") from error
