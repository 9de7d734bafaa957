"""The plan of a comparison: its models, its runs, and the commands that train and evaluate them. Imports no torch.

A comparison is a YAML file:

    MODELS:                         # name: configuration file of train.py, relative to this file
      crossvlt: refshapes/crossvlt.yaml
      late: refshapes/late.yaml
    REFERENCE: crossvlt             # the model that the others are compared with (default: the first one)
    SPLITS: [val, testA, testB]     # to evaluate (default: val)
    PROTOCOL: paper                 # see docs/protocols.md
    DATA: ../refcoco.yaml           # only without MODELS: a configuration file that names the dataset

Each model is trained with the seeds 0, 1, …: ordinary runs of train.py, which are named <model>-seed<seed>. Further
models, which are not trained, are described in lib/compare/sources.py.
"""

import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from yacs.config import CfgNode

from lib.cli import did_you_mean
from lib.config import flatten, get_parser, load_config, read_yaml
from lib.errors import MissingFileError, UserError
from lib.files import file_sha256
from lib.protocols import PROTOCOLS
from lib.report.names import PARTIAL, settings_path

PROJECT = Path(__file__).resolve().parents[2]
KEYS = {"MODELS": {}, "REFERENCE": "", "SPLITS": ["val"], "PROTOCOL": "paper", "DATA": ""}  # with their defaults
SAME_DATA = ("DATA.NAME", "DATA.SPLIT_BY", "DATA.SPLIT", "DATA.ROOT", "DATA.IMG_SIZE")
FILES_OF_RUN = ("MODEL_ID", "OUTPUT_DIR", "LOG_DIR")
FILLED_IN = ("PRETRAINED.TOKENIZER", "TRAIN.GLOBAL_BATCH", "TRAIN.ACCUM_STEPS")  # by train.py, if they are empty
EVALUATIONS = {"": (), "-shuffled": ("--shuffle_sentences",)}  # suffix of the result file: flags of test.py


class Model(NamedTuple):
    """A configuration to train."""

    name: str
    path: str  # of the configuration file
    cfg: CfgNode


class Comparison(NamedTuple):
    """The content of a comparison's YAML file, checked."""

    models: tuple[Model, ...]
    reference: str  # empty: the first model
    splits: tuple[str, ...]
    protocol: str
    data: CfgNode | None  # the configuration that names the dataset; None: known from result files only


class Step(NamedTuple):
    """A command of a run."""

    title: str
    command: list[str]
    result: Path | None  # the result file that it writes


class Run(NamedTuple):
    """A model trained with a seed, and its files in the folder of the comparison."""

    model: Model
    seed: int
    folder: Path
    comparison: Comparison
    given: Path | None = None  # a checkpoint that was trained elsewhere

    @property
    def name(self) -> str:
        return f"{self.model.name}-seed{self.seed}"

    @property
    def checkpoint(self) -> Path:
        return self.given or self.folder / "checkpoints" / self.name / "best.pth"

    @property
    def logs(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def output(self) -> Path:
        """The file with everything that the run's commands print."""
        return self.folder / "output" / f"{self.name}.txt"

    @property
    def locks(self) -> list[Path]:
        """The locks that the run's commands hold."""
        files = [self.results(suffix) for suffix in EVALUATIONS]
        return [self.checkpoint.parent / ".lock", *(file.with_name(f".{file.name}.lock") for file in files)]

    def results(self, suffix: str = "") -> Path:
        return self.folder / "results" / f"{self.name}{suffix}.jsonl"

    def steps(self) -> list[Step]:
        """Return the commands that train and evaluate the run, in this order."""
        steps, config, cfg = [], ["--cfg", self.model.path], self.model.cfg
        if self.given:
            config = ["--dataset", cfg.DATA.NAME, "--splitBy", cfg.DATA.SPLIT_BY, "--refer_data_root", cfg.DATA.ROOT]
            config += ["--device", cfg.DEVICE, "--workers", str(cfg.WORKERS)]
        else:
            train = [*config, "--seed", str(self.seed), "--model_id", self.name, "--auto_resume"]
            train += ["--output-dir", str(self.folder / "checkpoints"), "--log_dir", str(self.folder / "runs")]
            steps.append(Step("training", _command("train.py", train), None))
        for suffix, flags in EVALUATIONS.items():
            test = [*config, "--resume", str(self.checkpoint), "--split", ",".join(self.comparison.splits)]
            test += ["--protocol", self.comparison.protocol, "--predictions", str(self.results(suffix)), *flags]
            title = "evaluation with shuffled sentences" if suffix else "evaluation"
            steps.append(Step(title, _command("test.py", test), self.results(suffix)))
        return steps

    def remaining_steps(self) -> list[Step]:
        """Return the steps that are not done. A run is trained again, or further, if its configuration has changed."""
        *training, _, _ = steps = self.steps()
        missing = [step for step in steps if step.result and not self._is_current(step.result)]
        return [*training, *missing] if missing or not (self.given or self._has_same_config()) else []

    def _has_same_config(self) -> bool:
        """Return whether the run was trained with the configuration that it has now."""
        try:
            saved = flatten(read_yaml(self.logs / "config.yaml", ""))
        except (UserError, AttributeError):  # none, or it is damaged
            return False
        expected = flatten(self.model.cfg) | {"SEED": self.seed}
        return all(
            saved.get(key, value) == value
            for key, value in expected.items()
            if key not in FILES_OF_RUN and (value or key not in FILLED_IN)
        )

    def _is_current(self, path: Path | None) -> bool:
        """Return whether a result file is complete, of the run's present checkpoint, and has the planned settings."""
        return self._is_of_checkpoint(_read_settings(path)) and _read_settings(path).get("complete") is True

    def _is_of_checkpoint(self, settings: dict[str, Any]) -> bool:
        names = [protocol.get("name") for protocol in settings.get("protocols", ())]
        return (
            self.checkpoint.is_file()
            and settings.get("checkpoint_sha256") == file_sha256(self.checkpoint)
            and list(settings.get("splits", ())) == list(self.comparison.splits)
            and names == [self.comparison.protocol]
        )

    def remove_outdated(self, step: Step) -> None:
        """Remove the results of an earlier checkpoint, or of other splits, from the file that a step will write."""
        if step.result is None:
            return
        for path in (step.result, Path(f"{step.result}{PARTIAL}")):
            settings = _read_settings(path)
            if settings and not self._is_of_checkpoint(settings):
                path.unlink(missing_ok=True)
                if path == step.result:
                    settings_path(path).unlink(missing_ok=True)


def _command(script: str, arguments: list[str]) -> list[str]:
    return [sys.executable, os.path.relpath(PROJECT / script), *arguments]


def _read_settings(path: Path | None) -> dict[str, Any]:
    """Return the settings of a complete or partial result file, {} if there are none."""
    try:
        source = path if path.suffix == PARTIAL else settings_path(path)
        with open(source, encoding="utf-8") as file:
            settings = json.loads(file.readline() if path.suffix == PARTIAL else file.read())
    except (OSError, ValueError, AttributeError):
        return {}
    return settings if isinstance(settings, dict) else {}


def read_comparison(path: str) -> Comparison:
    """Read and check the YAML file of a comparison and the configuration of each model.

    Raises:
        MissingFileError, UserError: a file is missing or invalid, a key is unknown, or the models are not trained and
            evaluated on the same data.
    """
    tree = read_yaml(path, path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a comparison: it contains no keys. See lib/compare/plan.py.")
    values = {key: tree.pop(key, default) for key, default in KEYS.items()}
    if tree:
        key = str(next(iter(tree)))
        raise UserError(f"{path}: unknown key {key}.{did_you_mean(key, list(KEYS))} Its keys are {', '.join(KEYS)}.")
    for key, value in values.items():
        if type(value) is not type(KEYS[key]):
            raise UserError(f"{path}: {key} must be a {type(KEYS[key]).__name__}, not {value!r}.")
    if bool(values["MODELS"]) == bool(values["DATA"]):
        raise UserError(f"{path}: set either MODELS, or DATA for a comparison that trains no models.")
    for name, file in values["MODELS"].items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name) or not isinstance(file, str):
            raise UserError(f"{path}: MODELS: {name}: {file} must be a name without spaces and a configuration file.")
    folder = Path(path).parent
    models = [_load_model(f"MODELS: {name}", name, str(folder / file)) for name, file in values["MODELS"].items()]
    data = models[0].cfg if models else _load_model("DATA", "", str(folder / values["DATA"])).cfg
    if values["PROTOCOL"] not in PROTOCOLS:
        raise UserError(f"{path}: PROTOCOL {values['PROTOCOL']}: choose from {', '.join(PROTOCOLS)}.")
    _check_same_data(models)
    splits = tuple(map(str, values["SPLITS"]))
    return Comparison(tuple(models), values["REFERENCE"], splits, values["PROTOCOL"], data)


def choose_reference(comparison: Comparison, names: Sequence[str], flag: str = "") -> str:
    """Return the name of the reference: that of the flag, of the comparison's file, or the first one of ``names``.

    Raises:
        UserError: there is no model of that name.
    """
    reference = flag or comparison.reference or names[0]
    if reference not in names:
        source, hint = "--reference" if flag else "REFERENCE", did_you_mean(reference, names)
        raise UserError(f"{source} {reference} is none of the models {', '.join(names)}.{hint}")
    return reference


def _load_model(key: str, name: str, path: str) -> Model:
    """Read a model's configuration as train.py does. MissingFileError, UserError: there is none, or it is invalid."""
    if not Path(path).is_file():
        raise MissingFileError(f"{key}: there is no configuration file {path}.")
    train_parser = get_parser("train", "", lambda _: None)
    cfg, _ = load_config(train_parser.parse_args(["--cfg", path]))
    return Model(name, path, cfg)


def _check_same_data(models: Sequence[Model]) -> None:
    for first, model in itertools.pairwise(models):
        for key in SAME_DATA:
            a, b = (flatten(of.cfg)[key] for of in (first, model))
            if a != b:
                raise UserError(
                    f"{model.path}: {key} is {b}, but {a} in {first.path}. Compare models on the same data."
                )


def plan_runs(comparison: Comparison, folder: Path, num_seeds: int) -> list[Run]:
    """Return a run for each seed and model. The first seed of all models comes first."""
    return [Run(model, seed, folder, comparison) for seed in range(num_seeds) for model in comparison.models]


def command_lines(runs: Sequence[Run], threads: int) -> Iterator[str]:
    """Yield the commands of the runs for a shell, one line per run."""
    for run in runs:
        commands = [["python", *step.command[1:]] for step in run.steps()]
        yield " && ".join(f"OMP_NUM_THREADS={threads} {shlex.join(command)}" for command in commands)
