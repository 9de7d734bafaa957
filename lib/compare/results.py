"""The results of the compared models: IoUs by seed and expression.

Shapes: S seeds, n expressions.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.compare.plan import Run
from lib.compare.sources import Source
from lib.errors import UserError
from lib.metrics import compute_metrics, iou
from lib.report.analysis import Results, load_results
from lib.report.results import Line, counts_of


class ModelResults(NamedTuple):
    """All seeds of a model on one split. The expressions are the same for all models, in the same order."""

    name: str
    lines: list[list[Line]]  # of each seed
    ious: np.ndarray  # float64 [S, n]

    @property
    def images(self) -> list[int]:
        return [line["image_id"] for line in self.lines[0]]

    def metrics(self) -> list[dict[str, float]]:
        """Return the metrics of each seed in percent."""
        return [compute_metrics(counts_of(lines)) for lines in self.lines]


def pool(results: Mapping[str, Sequence[ModelResults]]) -> list[ModelResults]:
    """Return the results of each model on the expressions of all splits."""
    pooled = []
    for of_model in zip(*results.values(), strict=True):
        lines = [
            [line for part in parts for line in part] for parts in zip(*(of.lines for of in of_model), strict=True)
        ]
        pooled.append(ModelResults(of_model[0].name, lines, np.concatenate([of.ious for of in of_model], axis=1)))
    return pooled


def result_files(
    runs: Sequence[Run], sources: Sequence[Source], folder: Path, suffix: str = ""
) -> dict[str, list[Path]]:
    """Return the result files of each model, in the order of the seeds.

    Args:
        runs: trained models, and checkpoints that were evaluated.
        sources: the files of ``--from``.
        folder: of the comparison.
        suffix: ``-shuffled``: the files with shuffled sentences.
    """
    files: dict[str, list[Path]] = {}
    for run in runs:
        files.setdefault(run.model.name, []).append(run.results(suffix))
    for source in sources:
        if source.suffix == suffix and source.kind != "checkpoint":
            files.setdefault(source.model, []).append(source.results(folder))
    return files


def load_models(files: dict[str, list[Path]], splits: Sequence[str]) -> dict[str, list[ModelResults]]:
    """Read the result files of each model.

    Returns:
        for each split, the results of the models.

    Raises:
        UserError: a file has no or several protocols, or other expressions than the first file.
    """
    loaded = {name: [load_results(str(path)) for path in paths] for name, paths in files.items()}
    first = next(iter(loaded.values()))[0]
    for results in (results for of_model in loaded.values() for results in of_model):
        _check_comparable(results, first)
    return {split: [_of_split(name, of_model, first, split) for name, of_model in loaded.items()] for split in splits}


def _check_comparable(results: Results, first: Results) -> None:
    """Raise a UserError if a file has other settings than the first one."""
    if results.warning:
        raise UserError(f"{results.warning.removesuffix('.')}. Finish its evaluation first.")
    for a, b, what in (
        (list(results.protocols), list(first.protocols), "protocol"),
        (results.header.get("dataset"), first.header.get("dataset"), "dataset"),
        (results.header.get("shuffle_sentences"), first.header.get("shuffle_sentences"), "shuffle_sentences"),
    ):
        if a != b:
            raise UserError(f"{results.path} has {what} {_text(a)}, but {first.path} has {_text(b)}.")


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _of_split(name: str, of_model: Sequence[Results], first: Results, split: str) -> ModelResults:
    """Return the results of a model's seeds on a split. UserError: their expressions are not those of ``first``."""
    expected = _sorted_lines(first, split)
    lines = []
    for results in of_model:
        found = _sorted_lines(results, split)
        if list(map(_key, found)) != list(map(_key, expected)):
            raise UserError(
                f"{results.path} and {first.path} have different expressions of {split} ({len(found)} and "
                f"{len(expected)}). Evaluate both with the same annotations."
            )
        lines.append(found)
    ious = np.array([[iou(line["intersection"], line["union"]) for line in of_seed] for of_seed in lines])
    return ModelResults(name, lines, ious)


def _sorted_lines(results: Results, split: str) -> list[Line]:
    return sorted((line for line in results.lines if line["split"] == split), key=_key)


def _key(line: Line) -> tuple[int, int, int]:
    return line["ref_id"], line["sent_id"], line["image_id"]
