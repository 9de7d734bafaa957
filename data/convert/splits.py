"""Assign the images of a sentence file without a ``split`` column to train, val and test."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lib.errors import UserError
from utils import derive_seed

TRIED_SEEDS = 200


@dataclass(frozen=True)
class SplitShares:
    """Expected fractions of the images in val and test; the other images are in train.

    Raises:
        UserError: the fractions are invalid.
    """

    val: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.val < 1 and 0 <= self.test < 1 and self.val + self.test < 1):
            raise UserError(
                f"--val-share {self.val} and --test-share {self.test}: must be from 0 to 1, and their sum below 1."
            )

    def expected(self) -> dict[str, float]:
        """Return the fraction of each split; splits with fraction 0 are left out."""
        shares = {"val": self.val, "test": self.test, "train": 1 - self.val - self.test}
        return {split: share for split, share in shares.items() if share > 0}


def assign_splits(file_names: Iterable[str], shares: SplitShares) -> dict[str, str]:
    """Return the split of each image.

    The split depends only on the file name and the seed, so that images added later do not move other images.

    Raises:
        UserError: a split would be empty. The message suggests another seed.
    """
    names = sorted(set(file_names))
    splits = {name: _split_of(name, shares, shares.seed) for name in names}
    empty = shares.expected().keys() - set(splits.values())
    if empty:
        problem = f"--seed {shares.seed} assigns none of the {len(names)} images to {' or '.join(sorted(empty))}."
        raise UserError(f"{problem} {_suggestion(names, shares)}")
    return splits


def _split_of(file_name: str, shares: SplitShares, seed: int) -> str:
    # This text is part of the hash. If it changed, images would move to other splits.
    position = derive_seed("split of a picture", seed, file_name) / 2**63
    if position < shares.val:
        return "val"
    return "test" if position < shares.val + shares.test else "train"


def _suggestion(names: list[str], shares: SplitShares) -> str:
    """Suggest the seed whose splits come closest to the expected sizes."""
    expected = shares.expected()
    counts = {seed: Counter(_split_of(name, shares, seed) for name in names) for seed in range(TRIED_SEEDS)}
    suitable = [seed for seed in counts if counts[seed].keys() == expected.keys()]
    if not suitable:
        return "Add a column split, or change --val-share and --test-share."

    def deviation(seed: int) -> float:
        return sum(abs(counts[seed][split] - share * len(names)) for split, share in expected.items())

    best = min(suitable, key=deviation)
    sizes = ", ".join(f"{counts[best][split]} {split}" for split in ("train", "val", "test") if split in expected)
    return f"Use --seed {best} ({sizes}), or add a column split."
