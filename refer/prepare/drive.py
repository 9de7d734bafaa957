"""Download files of a public Google Drive folder with gdown, an optional package."""

import functools
import sys
from pathlib import Path
from typing import Any

from lib.files import translate_write_errors
from refer.prepare.files import RejectedError

DRIVE = "https://drive.google.com/drive/folders/"


def download_from_drive(url: str, target: Path, *, stall: float, tries: int) -> None:
    """Download a file of a Google Drive folder, resuming an earlier download.

    Args:
        url: address of the folder, a slash and the name of the file. The file may be in a subfolder.
        target: where to write the file. gdown keeps a partial download beside it.
        stall: seconds without data after which a connection is closed.
        tries: consecutive failures after which the download is given up.

    Raises:
        RejectedError: gdown is not installed, or Google Drive does not provide the file.
        UserError: the disk is full or not writable.
    """
    try:
        import gdown
    except ImportError as error:
        raise RejectedError("needs gdown. Run: pip install -r requirements-extra.txt") from error

    folder, _, name = url.rpartition("/")
    request = {"quiet": not sys.stderr.isatty(), "use_cookies": False, "timeout": stall}
    with translate_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            files = _list_folder(folder.removeprefix(DRIVE), stall)
            if name not in files:
                raise RejectedError(f"the folder has no {name}, but {', '.join(files) or 'no file'}")
            gdown.download(id=files[name], output=str(target), resume=True, retries=tries - 1, **request)
        except Exception as error:  # gdown parses web pages, which can raise any error when Google changes them
            if isinstance(error, OSError) and type(error).__module__ == "builtins":
                raise  # such as a full disk; the errors of the network are subclasses defined by requests
            if isinstance(error, RejectedError):
                raise
            raise RejectedError(" ".join(str(error).split())[:300] or type(error).__name__) from error


@functools.cache
def _list_folder(folder_id: str, stall: float) -> dict[str, str]:
    """Return {file name: id} of the files in a Google Drive folder and its subfolders."""
    import gdown

    listing: list[Any] = gdown.download_folder(
        id=folder_id, output=".", skip_download=True, quiet=True, use_cookies=False, timeout=stall
    )
    return {Path(file.path).name: file.id for file in listing}
