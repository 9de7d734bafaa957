"""Settings of a RefShapes dataset. This module imports neither NumPy nor Pillow, so that `--help` is fast."""

from dataclasses import asdict, dataclass, field
from typing import Any

from lib.errors import UserError

NAME = "refshapes"
VERSION = 1  # increase this number if the generated images, sentences or files change
LEVELS = ("basic", "full")
SPLITS = ("train", "val", "testA", "testB")
DEFAULT_IMAGES = {"train": 6000, "val": 320, "testA": 150, "testB": 150}
IDS_PER_SPLIT = 1_000_000  # image ids of split i start at i times this number, independent of the sizes of other splits


@dataclass(frozen=True)
class Settings:
    """All settings that determine the content of the dataset.

    Raises:
        UserError: a value is out of range.
    """

    level: str = "basic"
    seed: int = 0
    images: dict[str, int] = field(default_factory=lambda: dict(DEFAULT_IMAGES))  # per split

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise UserError(f"--level {self.level}: choose {' or '.join(LEVELS)}.")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: must be 0 or more.")
        for split, count in self.images.items():
            if not 0 <= count < IDS_PER_SPLIT:
                raise UserError(f"--{split}-images {count}: must be from 0 to {IDS_PER_SPLIT - 1}.")
        if not any(self.images.values()):
            raise UserError("Nothing to write: the number of images is 0 for all splits.")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as they are stored in refshapes.json."""
        return {"name": NAME, "version": VERSION, **asdict(self)}
