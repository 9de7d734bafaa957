"""Models that lib.compare does not train: ``--from`` with checkpoints, result files, or files of predicted masks.

The name of a file is the name of its model: ``ours.jsonl``, or ``ours-seed0.jsonl`` and ``ours-seed1.jsonl`` for two
seeds of one model; ``ours-shuffled.jsonl`` has predictions for shuffled sentences. Three kinds of files are accepted:

- a checkpoint that test.py can evaluate;
- a result file of ``test.py --predictions``, with its settings file beside it;
- predicted masks of any other program, one line of JSON per expression of every split that is compared:

      {"sent_id": 5, "mask": {"size": [480, 480], "counts": "…"}}

  ``mask`` is a COCO RLE (pycocotools.mask.encode, ``counts`` decoded to text). Under the protocol ``paper``, masks are
  square, at the size at which the model predicts; under ``original``, they have the size of the image. Further fields
  are ignored. The masks are compared with the annotations' target masks, and the result file is written into the folder
  of the comparison.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib.compare.plan import Comparison, Model, Run
from lib.errors import UserError
from lib.files import Kind, kind_of, protect, write_text
from lib.protocols import PROTOCOLS
from lib.report.names import settings_path

NAME = re.compile(r"(?P<model>.+?)(-seed(?P<seed>\d+))?(?P<suffix>-shuffled)?")


class Source(NamedTuple):
    """A file of ``--from``."""

    path: Path
    model: str
    seed: int
    suffix: str  # "-shuffled" or ""
    kind: str  # checkpoint, results or masks

    @property
    def name(self) -> str:
        return f"{self.model}-seed{self.seed}{self.suffix}"

    def results(self, folder: Path) -> Path:
        """Return its result file, which is in the folder of the comparison unless it was given."""
        return self.path if self.kind == "results" else folder / "results" / f"{self.name}.jsonl"


def read_sources(paths: Sequence[str], trained: Sequence[str]) -> list[Source]:
    """Return what the files are, sorted by model in the given order, and by seed.

    Args:
        paths: the files.
        trained: names of the models that the comparison trains, which the files must not repeat.

    Raises:
        UserError: a file is of no accepted kind, or two files have the same name.
    """
    sources: dict[str, Source] = {}
    for path in map(Path, paths):
        protect(path)
        match = NAME.fullmatch(path.stem)
        source = Source(path, match["model"], int(match["seed"] or 0), match["suffix"] or "", _kind(path))
        if source.name in sources or source.model in trained:
            other = sources[source.name].path if source.name in sources else "a model of the comparison"
            raise UserError(f"--from {path}: its name {source.model} is also that of {other}. Rename the file.")
        sources[source.name] = source
    order = list(dict.fromkeys(source.model for source in sources.values()))
    return sorted(sources.values(), key=lambda source: (order.index(source.model), source.seed))


def _kind(path: Path) -> str:
    """Return checkpoint, results or masks. UserError: the file is neither."""
    kind = kind_of(path)
    if kind is Kind.BINARY:
        return "checkpoint"
    line = {}
    if kind is Kind.JSON_LINES:
        with open(path, encoding="utf-8") as file:
            line = _parse(file.readline())
    if "intersection" in line:
        return "results"
    if "sent_id" in line:
        return "masks"
    raise UserError(
        f"--from {path}: neither a checkpoint, nor a result file of test.py --predictions, nor lines such as "
        '{"sent_id": 5, "mask": {"size": [480, 480], "counts": "…"}}.'
    )


def _parse(text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    return line if isinstance(line, dict) else {}


def comparison_of(sources: Sequence[Source]) -> Comparison:
    """Return the comparison of result files without a YAML file: with the splits and the protocol of the first one.

    Raises:
        UserError: a file is no result file, or the first one has several protocols.
    """
    from lib.report.results import read_results

    other = next((source for source in sources if source.kind != "results"), None)
    if other:
        raise UserError(f"--from {other.path} must be evaluated. Also give a YAML file that names the dataset (DATA).")
    header, _ = read_results(sources[0].path)
    if len(header["protocols"]) != 1:
        raise UserError(f"{sources[0].path} has several protocols. Evaluate with a single --protocol.")
    return Comparison((), "", tuple(header["splits"]), header["protocols"][0]["name"], None)


def runs_of(sources: Sequence[Source], comparison: Comparison, folder: Path) -> list[Run]:
    """Return the runs that evaluate the checkpoints among the files."""
    checkpoints = [source for source in sources if source.kind == "checkpoint"]
    return [
        Run(Model(source.model, "", comparison.data), source.seed, folder, comparison, given=source.path)
        for source in checkpoints
    ]


def evaluate_masks_of(sources: Sequence[Source], comparison: Comparison, folder: Path) -> None:
    """Write the result files of the files of predicted masks. UserError: they do not fit the annotations."""
    from refer.refer import REFER

    with_masks = [source for source in sources if source.kind == "masks"]
    if with_masks:
        data = comparison.data.DATA
        refer = REFER(data.ROOT, data.NAME, data.SPLIT_BY)
        for source in with_masks:
            write_results(source, source.results(folder), refer, comparison.splits, comparison.protocol)


def read_masks(path: Path) -> dict[int, Any]:
    """Return the RLE of each sent_id of a file of predicted masks. UserError: a line is invalid or repeated."""
    masks: dict[int, Any] = {}
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            line = _parse(text)
            if type(line.get("sent_id")) is not int or not isinstance(line.get("mask"), dict):
                raise UserError(f"{path}, line {number} must have an integer sent_id and a mask (RLE).")
            if line["sent_id"] in masks:
                raise UserError(f"{path}, line {number}: sent_id {line['sent_id']} occurs twice.")
            masks[line["sent_id"]] = line["mask"]
    return masks


def write_results(source: Source, out: Path, refer: "REFER", splits: Sequence[str], protocol: str) -> None:  # noqa: F821
    """Compare predicted masks with the target masks and write a result file, as test.py does.

    Args:
        source: a file of predicted masks.
        out: the result file.
        refer: the annotations.
        splits: the splits, whose expressions must all have a mask.
        protocol: name of the protocol.

    Raises:
        UserError: an expression has no mask, or a mask is corrupt or of the wrong size.
    """
    from lib.report.analysis import Results, evaluate_masks
    from lib.report.results import FORMAT, checksum

    masks, settings = read_masks(source.path), PROTOCOLS[protocol].settings()
    lines = []
    for split in splits:
        refs = refer.loadRefs(refer.getRefIds(split=split))
        expressions = [(ref, sentence) for ref in refs for sentence in ref["sentences"]]
        missing = [sentence["sent_id"] for _, sentence in expressions if sentence["sent_id"] not in masks]
        if missing:
            raise UserError(
                f"{source.path} has no mask for {len(missing)} of {len(expressions)} expressions of {split}, such as "
                f"sent_id {missing[0]}. Every expression needs one; it may be empty."
            )
        for index, (ref, sentence) in enumerate(expressions):
            ids = {"image_id": ref["image_id"], "ref_id": ref["ref_id"], "ann_id": ref["ann_id"]}
            line = {"dataset": refer.dataset, "split_by": refer.splitBy, "split": split, "protocol": protocol}
            line |= {
                "index": index,
                **ids,
                "sent_id": sentence["sent_id"],
                "sentence": sentence.get("raw", sentence["sent"]),
            }
            lines.append(line | {"mask": masks[sentence["sent_id"]]})
    counts = {split: sum(line["split"] == split for line in lines) for split in splits}
    # The target masks are not yet those of any gt_mask, so that evaluate_masks computes all lines.
    unevaluated = {protocol: settings | {"gt_mask": ""}}
    header = {"dataset": refer.dataset, "split_by": refer.splitBy}
    results = evaluate_masks(
        Results(str(source.path), header, counts, unevaluated, lines), settings["gt_mask"], lambda *_: refer
    )
    order = list(splits)
    lines = sorted(results.lines, key=lambda line: (order.index(line["split"]), line["index"]))
    write_text(out, "".join(f"{json.dumps(line | {'crc32': checksum(line)}, ensure_ascii=False)}\n" for line in lines))
    header |= {"format": FORMAT, "complete": True, "checkpoint": str(source.path), "splits": counts}
    header |= {"protocols": [settings], "shuffle_sentences": bool(source.suffix), "precision": "unknown"}
    write_text(settings_path(out), json.dumps(header, indent=1, ensure_ascii=False) + "\n")
