"""Summary of an evaluation: a table per protocol for the terminal, and the list of objects of ``--json``."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from data.dataset_refer_bert import ReferDataset
from lib.baselines import baseline_metrics
from lib.collector import EvaluationResult
from lib.files import write_text
from lib.metrics import METRIC_NAMES
from lib.protocols import Protocol
from lib.report.intervals import intervals
from lib.tables import to_text

TableRow = tuple[str, dict[str, float], int]  # name, metrics in percent, number of expressions


class Summary:
    """Metrics of the evaluated splits under each protocol.

    Args:
        protocols: the protocols of the evaluation.
        settings: the settings of the evaluation, which ``--json`` includes.
        with_baselines: whether to add predictions that ignore the sentence (:mod:`lib.baselines`).
    """

    def __init__(self, protocols: list[Protocol], settings: dict[str, Any], *, with_baselines: bool = False) -> None:
        self.protocols, self.settings, self.with_baselines = protocols, settings, with_baselines
        self.rows: dict[str, list[TableRow]] = defaultdict(list)  # by protocol
        self.entries: list[dict[str, Any]] = []

    def add(self, dataset: ReferDataset, results: dict[str, EvaluationResult]) -> None:
        """Add a split with its results by protocol."""
        for protocol in self.protocols:
            result = results[protocol.name]
            baselines = baseline_metrics(dataset, protocol) if self.with_baselines else {}
            shown = {dataset.split: result.metrics} | {f"  {name}": metrics for name, metrics in baselines.items()}
            self.rows[protocol.name] += [(name, metrics, len(dataset)) for name, metrics in shown.items()]
            images = [dataset.expressions[index].image_id for index in result.indices]
            entry = {
                "dataset": self.settings["dataset"],
                "split_by": self.settings["split_by"],
                "split": dataset.split,
                "protocol": protocol.name,
                "num_expressions": len(dataset),
                "metrics": result.metrics,
                "interval_95": intervals(images, result.counts),
                "settings": {**self.settings, "protocol": protocol.settings()},
            }
            self.entries.append(entry | ({"baselines": baselines} if baselines else {}))

    def write_json(self, path: str | Path) -> None:
        """Write the results of all splits added so far. UserError: the file cannot be written."""
        write_text(path, json.dumps(self.entries, indent=1) + "\n")

    def text(self) -> str:
        """Return a table for each protocol, below a line that states what was evaluated."""
        s = self.settings
        evaluated = f"{s['dataset']} ({s['split_by']}), {s['checkpoint']}, {s['img_size']} px, {s['precision']}"
        shuffled = ", sentences shuffled within each split" if s["shuffle_sentences"] else ""
        return "\n".join(
            f"\n{evaluated}, {name} protocol{shuffled}\n{metrics_table(rows)}" for name, rows in self.rows.items()
        )


def metrics_table(rows: list[TableRow]) -> str:
    """Return named metrics as a table for a terminal, in percent."""
    cells = [["split", *METRIC_NAMES, "expressions"]]
    for name, metrics, count in rows:
        cells.append([name, *(f"{metrics[metric]:.2f}" for metric in METRIC_NAMES), str(count)])
    return to_text(cells)
