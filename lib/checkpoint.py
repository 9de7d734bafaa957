"""Checkpoint files: read all supported forms, load them into a model, save.

python -m lib.checkpoint FILE        print what a checkpoint contains
"""

# ruff: noqa: E402  (the command parses its arguments before the heavy imports)
import sys

from lib.cli import Parser, run_command
from lib.variants import RELEASED_HINT


def get_parser() -> Parser:
    parser = Parser(prog="python -m lib.checkpoint", description="Print what a checkpoint contains.")
    file_help = "checkpoint of this project, or released with the paper"
    parser.add_input("file", must_exist=True, hint=RELEASED_HINT, metavar="FILE", help=file_help)
    return parser


if __name__ == "__main__":  # --help and mistakes are answered before the imports below, which take seconds
    parsed = []
    run_command(lambda: parsed.append(get_parser().parse_args()))
    if not parsed:  # --help
        sys.exit()

import argparse
import re
import reprlib
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.files import atomic_write
from lib.models import NETWORKS, Network, name_of, network_of, recognize, titles
from lib.safe_load import load_safely, verify_checksums
from lib.state_dict import (
    PREFIX,
    StateDict,
    adapt_to_model,
    describe_unusable_weights,
    has_prefix,
    join_bert,
    load_strictly,
    repair_keys,
)
from lib.variants import MODELS

# Entries that a file must have besides the weights, so that a run can resume from it.
RESUMABLE = (
    "model_config",  # arguments of the network's build function
    "config",  # all settings of the run
    "vocabulary",  # fingerprint of the tokenizer's vocabulary
    "optimizer",
    "scheduler",
    "scaler",  # of the fp16 loss
    "ema",  # moving average of the weights, or None
    "random",  # random states of all processes
    "share",  # number of processes, batch size and accumulation steps
    "epoch",  # finished epochs
    "epoch_step",  # finished steps of the current epoch
    "step",  # finished steps of the run
    "best_oIoU",
    "metrics",  # of the last validation
    "meters",  # means since the last log line
    "skipped",  # number of steps that fp16 skipped
)
PRETRAINED_HINT = "`python -m refer.prepare --weights swin_base bert` downloads pretrained files."


@dataclass
class Checkpoint:
    """Content of a checkpoint file of any form."""

    path: Path
    form: str  # inference (a bare state dict), released training, or training (written by this project)
    state_dict: StateDict  # with repaired keys
    prefixed: bool  # whether the file's keys begin with "module."
    extra: dict[str, Any]  # all other entries of the file

    @property
    def model_name(self) -> str:
        """The name of the network (``--model``): saved in the file, or recognized by its keys.

        Raises:
            UserError: the file does not contain a network of this project.
        """
        recognized = recognize(self.state_dict)
        if recognized is None:
            raise UserError(f"{self.path} is not a checkpoint of {titles()}: its keys or shapes do not fit any model.")
        saved = self.extra.get("model_name", recognized)
        if saved not in list(NETWORKS) or NETWORKS[saved] is not NETWORKS[recognized]:
            raise UserError(
                f"{self.path} is corrupt: its model_name is {reprlib.repr(saved)}, but its weights are those of "
                f"{MODELS[recognized].title}."
            )
        return saved

    @property
    def network(self) -> Network:
        """The entry of the network in lib.models."""
        return NETWORKS[self.model_name]

    @property
    def model_config(self) -> dict[str, Any]:
        """The arguments of the network's build function: saved in the file, or inferred from the shapes.

        Raises:
            UserError: the file does not contain a network of this project.
        """
        network, title = self.network, MODELS[self.model_name].title
        try:
            inferred = network.infer_config(self.state_dict, self.published_options)
        except (KeyError, IndexError, ValueError, StopIteration) as error:
            raise UserError(
                f"{self.path} is not a checkpoint of {title}: its keys or shapes do not fit any model."
            ) from error
        if "model_config" not in self.extra:
            return inferred
        saved = self.extra["model_config"]
        if not isinstance(saved, dict) or not {"swin_type", "window_size", "vocab_size"} <= set(saved):
            raise UserError(f"{self.path} is not a checkpoint of {title}: its model_config has other keys.")
        for name in network.inferred:
            size = list(saved[name]) if isinstance(saved.get(name), tuple) else saved.get(name)
            if size is not None and repr(size) != repr(inferred[name]):
                raise UserError(
                    f"{self.path} is corrupt: its model_config has {name} {reprlib.repr(size)}, but its weights have "
                    f"{inferred[name]}."
                )
        return saved

    @property
    def published_options(self) -> dict[str, Any]:
        """The options of the published training that a released file contains."""
        options = self.extra.get("args")
        return vars(options) if isinstance(options, argparse.Namespace) else {}

    @property
    def is_resumable(self) -> bool:
        """Whether the file contains everything that a run needs to resume."""
        return set(RESUMABLE) <= set(self.extra)

    def check_network(self, name: str, *, hint: str) -> None:
        """Raise a UserError that ends with ``hint`` unless the file contains the network ``name``."""
        if self.network is not NETWORKS[name]:
            raise UserError(
                f"{self.path} is a checkpoint of {MODELS[self.model_name].title}, not of {MODELS[name].title}. {hint}"
            )

    def check_maps(self) -> None:
        """Raise a UserError if ``--vis_maps`` was given, but the network has no alignment maps."""
        if not self.network.alignment_only:
            title = MODELS[self.model_name].title
            raise UserError(
                f"--vis_maps: {self.path} is a checkpoint of {title}, which has no alignment maps. Drop the flag."
            )

    def check_prefix(self, expected: bool) -> None:
        """Raise a UserError if ``--ddp_trained_weights`` (``expected``) was given, but the keys have no prefix."""
        if expected and not self.prefixed:
            raise UserError(
                f"--ddp_trained_weights: the keys of {self.path} do not begin with '{PREFIX}'. Drop the flag."
            )


def read_checkpoint(path: str | Path, hint: str = RELEASED_HINT) -> Checkpoint:
    """Read a checkpoint or pretrained file without executing code from it.

    Only tensors, plain values and argparse.Namespace are loaded.

    Raises:
        MissingFileError: the file does not exist; the message ends with ``hint``.
        UserError: the file is corrupt, contains another class or tensors without values, or has no state dict.
    """
    path = Path(path)
    content = load_safely(path, [argparse.Namespace], hint)
    form, parts, extra = "inference", [content], {}
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        form = "training" if "model_config" in content else "released training"
        extra = {key: value for key, value in content.items() if key not in ("model", "bert_model")}
        parts = [content[key] for key in ("model", "bert_model") if key in content]
    for part in parts:
        if not isinstance(part, dict) or not part or not all(map(_is_entry, part.items())):
            raise UserError(f"{path} contains no state dict of tensors.")
    if form == "training" and zipfile.is_zipfile(path):
        verify_checksums(path)
    state_dict, *bert = (repair_keys(part, ()) for part in parts)
    if bert:  # the earlier of the two forms in which LAVT was released
        state_dict, extra["model_name"] = join_bert(state_dict, *bert), "lavt"
    return Checkpoint(path, form, state_dict, has_prefix(parts[0]), extra)


def _is_entry(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def load_weights(model: nn.Module, path: str | Path | Checkpoint) -> Checkpoint:
    """Load a checkpoint of any form into a model and return the checkpoint.

    Args:
        model: a network of lib.models, not wrapped.
        path: the file, or a checkpoint that was already read.

    Raises:
        MissingFileError, UserError: see :func:`read_checkpoint`. UserError also if keys or shapes do not fit the model.
    """
    checkpoint = path if isinstance(path, Checkpoint) else read_checkpoint(path)
    if recognize(checkpoint.state_dict):
        checkpoint.check_network(name_of(model), hint="Build that network, or pass another file.")
    load_strictly(model, checkpoint.state_dict, str(checkpoint.path))
    return checkpoint


def rebuild(checkpoint: Checkpoint, build: Callable[..., nn.Module] | None = None) -> nn.Module:
    """Build the model of a checkpoint and load its weights.

    Args:
        checkpoint: a checkpoint of any form.
        build: the build function. None: that of the checkpoint's network.

    Raises:
        UserError: the build function rejects the checkpoint's model_config, or the weights do not fit.
    """
    config, build = checkpoint.model_config, build or checkpoint.network.build
    try:
        model = build(**config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.path}: cannot build a model from its model_config: {error}") from error
    load_weights(model, checkpoint)
    return model


def load_pretrained(model: nn.Module, swin: str | Path | None = None, bert: str | Path | None = None) -> None:
    """Initialize a model from an ImageNet Swin file and a BERT file; each may be None.

    Relative position biases for another window size are resized (bicubic interpolation).

    Raises:
        MissingFileError, UserError: see :func:`read_checkpoint`. UserError also if a file does not fit the model.
    """
    network = network_of(model)
    for kind, path, part in (("Swin", swin, network.swin_part), ("BERT", bert, network.bert_part)):
        if path is not None:
            state_dict = repair_keys(read_checkpoint(path, PRETRAINED_HINT).state_dict, network.pretrained_names)
            state_dict = adapt_to_model(state_dict, model)
            load_strictly(model, state_dict, f"{kind} file {path}", part)


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Raises:
        UserError: the disk is full, or the folder is not writable.
    """
    with atomic_write(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            if not re.search("inline_container|PytorchStreamWriter|iostream", str(error)):
                raise
            # PyTorch's writer does not say that the disk is full.
            free = shutil.disk_usage(temporary.parent).free / 2**20
            raise UserError(f"Cannot write {path}. Is the disk full? {free:.0f} MiB are free.") from error


def describe(checkpoint: Checkpoint) -> str:
    """Return a summary of a checkpoint's content as lines of text."""
    config, extra = checkpoint.model_config, checkpoint.extra
    parameters = sum(
        value.numel()
        for key, value in checkpoint.state_dict.items()
        if value.is_floating_point() and "running_" not in key
    )
    temperatures = checkpoint.state_dict["temp"].tolist() if "temp" in checkpoint.state_dict else []
    epoch = "unknown"
    if "epoch" in extra:
        epoch = str(extra["epoch"])
        epoch += f" and {extra['epoch_step']} steps" if extra.get("epoch_step") else ""
        epoch += f" (step {extra['step']})" if "step" in extra else ""
    fusion = "late" if checkpoint.model_name == "vlt" else "cross"  # unless model_config has another one
    lines = {
        "file": checkpoint.path,
        "model": MODELS[checkpoint.model_name].title,
        "form": checkpoint.form + (f", keys prefixed with {PREFIX}" if checkpoint.prefixed else ""),
        "Swin type": config["swin_type"],
        "window": config["window_size"],
        "fusion": f"{config['mha']} heads" if "mha" in config else config.get("fusion", fusion),
        "parameters": f"{parameters / 1e6:.1f} M in {len(checkpoint.state_dict)} entries",
        "weights": describe_unusable_weights(checkpoint.state_dict) or "finite",
        "temp": " ".join(f"{temperature:.4f}" for temperature in temperatures) or "none",
        "epoch": epoch,
        "best oIoU": "unknown" if extra.get("best_oIoU") is None else f"{float(extra['best_oIoU']):.2f}",
        "input": _describe_input(extra),
        "optimizer": "yes: --resume continues the run" if checkpoint.is_resumable else "no: use it with --init_from",
    }
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())


def _describe_input(extra: dict[str, Any]) -> str:
    """Return image size and vocabulary, if the file contains them."""
    preprocessing, vocabulary = extra.get("preprocessing"), extra.get("vocabulary")
    if not isinstance(preprocessing, dict):
        return "vocabulary and image size are not in the file"
    size, tokens = preprocessing.get("img_size"), preprocessing.get("max_tokens")
    return f"{size}×{size} pixels, at most {tokens} tokens; vocabulary in the file: {vocabulary}"


def main() -> None:
    args = get_parser().parse_args()
    print(describe(read_checkpoint(args.file)))


if __name__ == "__main__":
    run_command(main)
