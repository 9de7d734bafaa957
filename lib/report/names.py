"""Names of the files of an evaluation. Imports no torch."""

from pathlib import Path

PARTIAL = ".partial"


def settings_path(path: str | Path) -> Path:
    """Return the path of a result file's settings."""
    return Path(f"{path}.settings.json")
