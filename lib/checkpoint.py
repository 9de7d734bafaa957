"""Checkpoint files: reading every form users have, strict loading, initialising from ImageNet and BERT, safe saving.

python -m lib.checkpoint FILE        what a checkpoint holds, needing no other file
"""

import argparse
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resize_rel_pos_bias_table_simple
from torch import nn

from lib.cli import run_command
from lib.errors import MissingFileError, UserError
from lib.files import atomic_write
from lib.variants import SWIN_VARIANTS

StateDict = dict[str, torch.Tensor]

PREFIX = "module."
# The only keys that a file may lack or have beyond the model: index buffers, which are rebuilt, and the temperatures,
# which released inference files leave out.
ALLOWED_DIFFERENCES = re.compile(r"(.*\.relative_position_index|temp)")
# What a file must hold, besides the weights, for a run to go on from it.
RESUMABLE = (
    "model_config", "config", "vocabulary", "optimizer", "scheduler", "scaler", "ema", "random", "share",
    "epoch", "epoch_step", "step", "best_oIoU", "metrics", "meters", "skipped",
)  # fmt: skip
SHOWN_KEYS = 4


@dataclass
class Checkpoint:
    """A checkpoint file's content, whatever its form (spec: checkpoint files users have).

    ``form`` is ``inference`` (a bare state dict), ``released training`` ({"model", "epoch", "args", "best_oIoU"}) or
    ``training`` (this project's own). ``extra`` holds everything that is not the state dict.
    """

    path: Path
    form: str
    state_dict: StateDict  # without the prefix
    prefixed: bool  # every key began with ``module.``
    extra: dict[str, Any]

    @property
    def model_config(self) -> dict[str, Any]:
        """Keywords for build_crossvlt: as saved, else read off the shapes."""
        if "model_config" in self.extra:
            saved = self.extra["model_config"]
            if not isinstance(saved, dict) or not {"swin_type", "window_size", "vocab_size"} <= set(saved):
                raise UserError(f"{self.path}: its model_config is not one of a CrossVLT")
            return saved
        try:
            return infer_model_config(self.state_dict)
        except (KeyError, IndexError, ValueError, StopIteration) as error:
            raise UserError(
                f"{self.path} doesn't hold the weights of a CrossVLT: its keys or shapes don't fit"
            ) from error

    @property
    def is_resumable(self) -> bool:
        """Whether training can go on from it where it was."""
        return set(RESUMABLE) <= set(self.extra)

    def check_prefix(self, wanted: bool) -> None:
        """Raise a UserError where ``--ddp_trained_weights`` promised a prefix that isn't there."""
        if wanted and not self.prefixed:
            raise UserError(f"--ddp_trained_weights: the keys of {self.path} don't begin with {PREFIX}; drop that flag")


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file safely: tensors, plain values and argparse.Namespace, no other class.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is torn, foreign, or wants a class to be loaded.
    """
    content = _read_tensors(Path(path))
    form, state_dict, extra = "inference", content, {}
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        extra = {key: value for key, value in content.items() if key != "model"}
        state_dict = content["model"]
        form = "training" if "model_config" in extra else "released training"
    if (
        not isinstance(state_dict, dict)
        or not state_dict
        or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state_dict.items())
    ):
        raise UserError(f"{path} is not a checkpoint of a CrossVLT: no state dict of tensors in it")
    if form == "training" and zipfile.is_zipfile(path):
        _check_sums(Path(path))
    prefixed = all(key.startswith(PREFIX) for key in state_dict)
    return Checkpoint(Path(path), form, strip_prefix(state_dict), prefixed, extra)


def _read_tensors(path: Path) -> Any:
    if not path.is_file():
        raise MissingFileError(f"no checkpoint file {path}" + (" (it is a folder)" if path.is_dir() else ""))
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused in our own words
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path} is torn or not a safetensors file: {error}") from error
    except Exception as error:  # torch.load has no common class for what a torn or foreign file can cause
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe:
            raise UserError(
                f"{path} refused: it wants to load the class {unsafe[1]}, and loading that could run foreign code"
            ) from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        # Not to be followed: PyTorch's advice to load it with weights_only=False, which runs what is in the file.
        reason = "" if "weights_only" in first else f": {first}"
        raise UserError(f"{path} is torn or not a PyTorch file{reason}") from error


def _check_sums(path: Path) -> None:
    """torch.load doesn't look at the check sums that torch.save writes: a flipped bit would become a weight."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # whatever a flipped bit in the archive's own tables can cause
        raise UserError(f"{path} is damaged: {error}") from error
    if bad is not None:
        raise UserError(f"{path} is damaged: the check sum of {bad} in it is wrong")


def strip_prefix(state_dict: StateDict) -> StateDict:
    """Take ``module.`` off where every key has it (files saved from DistributedDataParallel)."""
    if not all(key.startswith(PREFIX) for key in state_dict):
        return dict(state_dict)
    return {key.removeprefix(PREFIX): value for key, value in state_dict.items()}


def infer_model_config(state_dict: StateDict) -> dict[str, Any]:
    """Keywords for build_crossvlt read off the shapes of a state dict without prefix.

    Text heads are not visible in any shape; they are taken to be 64 wide, as BERT's are.
    """
    embed_dim = state_dict["backbone.0.patch_embed.proj.weight"].shape[0]
    tables = {
        tuple(map(int, match.groups())): value
        for key, value in state_dict.items()
        if (match := re.fullmatch(r"backbone\.(\d)\.layers\.blocks\.(\d+)\.attn\.relative_position_bias_table", key))
    }
    stages = sorted({stage for stage, _ in tables})
    depths = [sum(stage == wanted for stage, _ in tables) for wanted in stages]
    num_heads = [tables[stage, 0].shape[1] for stage in stages]
    window_size = (round(tables[0, 0].shape[0] ** 0.5) + 1) // 2
    vocab_size, text_dim = state_dict["lang_stage1.embeddings.word_embeddings.weight"].shape
    layers = {key.split(".")[3] for key in state_dict if key.startswith("lang_stage1.encoder.layer.")}
    vision_to_language = "lang_stage2.crossattention.self.key.weight" in state_dict
    language_to_vision = "backbone.0.layers.attn1.l_q.weight" in state_dict
    fusion = {(True, True): "cross", (False, True): "vision", (False, False): "late"}[
        vision_to_language, language_to_vision
    ]
    candidates = [name for name, variant in SWIN_VARIANTS.items() if variant["embed_dim"] == embed_dim] or ["base"]
    return {
        "swin_type": candidates[-1] if depths[2] == 18 else candidates[0],
        "window_size": window_size,
        "fusion": fusion,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": num_heads,
        "text_dim": text_dim,
        "text_layers": len(layers),
        "text_heads": max(1, text_dim // 64),
        "vocab_size": vocab_size,
        "align_dim": state_dict["backbone.0.layers.proj.weight"].shape[0],
    }


def load_weights(model: nn.Module, path: str | Path | Checkpoint) -> Checkpoint:
    """Load a checkpoint of any form into an unwrapped model; gives back what else the file holds.

    Raises:
        UserError: a key outside ``ALLOWED_DIFFERENCES`` is missing, unexpected or of another shape; it names keys.
    """
    checkpoint = path if isinstance(path, Checkpoint) else read_checkpoint(path)
    load_strictly(model, checkpoint.state_dict, str(checkpoint.path))
    return checkpoint


def rebuild(checkpoint: Checkpoint, build: Callable[..., nn.Module]) -> nn.Module:
    """The network that a checkpoint holds, with its weights.

    Args:
        checkpoint: of any form.
        build: build_crossvlt.

    Raises:
        UserError: its model_config can't be built, or its weights don't fit.
    """
    try:
        model = build(**checkpoint.model_config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.path}: its model_config can't be built: {error}") from error
    load_weights(model, checkpoint)
    return model


def load_strictly(model: nn.Module, state_dict: StateDict, source: str) -> None:
    """Load a state dict; only keys matching ``ALLOWED_DIFFERENCES`` may differ."""
    ours = model.state_dict()
    allowed = {key for key in {*ours, *state_dict} if ALLOWED_DIFFERENCES.fullmatch(key)}
    told = _differences(
        {key: ours[key] for key in ours if key not in allowed or key in state_dict},
        {key: value for key, value in state_dict.items() if key not in allowed or key in ours},
    )
    if told:
        raise UserError(f"{source} doesn't fit the model: {told}")
    model.load_state_dict({key: state_dict[key] for key in ours if key in state_dict}, strict=False)


def _differences(wanted: StateDict, found: StateDict) -> str:
    """How two state dicts differ in keys and shapes, in one line; empty where they don't."""
    problems = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "of another shape": [
            f"{key} {tuple(found[key].shape)} for {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in found and found[key].shape != value.shape
        ],
    }
    return "; ".join(f"{len(keys)} {problem} ({_some(keys)})" for problem, keys in problems.items() if keys)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN_KEYS]) + (f", and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else "")


def swin_to_crossvlt(state_dict: StateDict) -> StateDict:
    """Keys of an official ImageNet Swin → ``backbone.…``; the classifier, the last norm and the buffers are dropped."""
    renamed = {}
    for key, value in state_dict.items():
        if key.startswith(("head.", "norm.")) or key.endswith(("attn_mask", "relative_position_index")):
            continue
        key = re.sub(r"^patch_embed\.", "backbone.0.patch_embed.", key)
        renamed[re.sub(r"^layers\.(\d+)\.", r"backbone.\1.layers.", key)] = value
    return renamed


def bert_to_crossvlt(state_dict: StateDict, num_layers: int) -> StateDict:
    """Keys of a BERT file, old or new → ``lang_stage1.…``: embeddings and the first layers, the rest dropped."""
    renamed = {}
    for key, value in state_dict.items():
        key = key.removeprefix("bert.")
        key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key))
        layer = re.match(r"encoder\.layer\.(\d+)\.", key)
        if (
            (layer and int(layer[1]) >= num_layers)
            or key.startswith(("cls.", "pooler."))
            or key.endswith("position_ids")
        ):
            continue
        renamed[f"lang_stage1.{key}"] = value
    return renamed


def load_pretrained(model: nn.Module, swin: str | Path | None = None, bert: str | Path | None = None) -> None:
    """Initialise from an ImageNet Swin file and a BERT file (spec: initialisation); either may be None.

    Position-bias tables of another window are resized (bicubic).

    Raises:
        MissingFileError: a file isn't there.
        UserError: a file is torn, of another kind or of another size; it names the file and keys.
    """
    expected = {
        "Swin": re.compile(r"backbone\.(\d\.layers\.(blocks|downsample)|0\.patch_embed)\..*"),
        "BERT": re.compile(r"lang_stage1\.(embeddings|encoder\.layer)\..*"),
    }
    for kind, path in (("Swin", swin), ("BERT", bert)):
        if path is None:
            continue
        content = _read_tensors(Path(path))
        content = content.get("model", content) if kind == "Swin" and isinstance(content, dict) else content
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise UserError(f"{path} is not a {kind} file: no state dict of tensors in it")
        content = strip_prefix(content)
        ours = model.state_dict()
        if kind == "Swin":
            new = {key: _resized_table(key, value, ours) for key, value in swin_to_crossvlt(content).items()}
        else:
            new = bert_to_crossvlt(content, len(model.lang_stage1.encoder.layer))
        told = _differences({key: value for key, value in ours.items() if expected[kind].fullmatch(key)}, new)
        if told:
            raise UserError(f"{path} is not the {kind} file for this model: {told}")
        model.load_state_dict(new, strict=False)


def _resized_table(key: str, value: torch.Tensor, ours: StateDict) -> torch.Tensor:
    """A bias table [(2w−1)², heads] of another window, brought to ours."""
    if not key.endswith("relative_position_bias_table") or key not in ours or value.ndim != 2:
        return value
    window = (round(ours[key].shape[0] ** 0.5) + 1) // 2
    shape = (ours[key].shape[0], value.shape[1])
    return resize_rel_pos_bias_table_simple(value, new_window_size=(window, window), new_bias_shape=shape)


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint to a temporary file beside ``path`` and rename it, so that it is whole or not there."""
    with atomic_write(path) as aside:
        try:
            torch.save(content, aside)
        except RuntimeError as error:  # PyTorch's writer reports a full disk so, and doesn't say that it is full
            if "CUDA" in str(error):
                raise
            free = shutil.disk_usage(aside.parent).free / 2**20
            raise UserError(f"can't write {path}: is the disk full? ({free:.0f} MiB free)") from error


def describe(checkpoint: Checkpoint) -> str:
    """What a checkpoint holds, in lines."""
    config = checkpoint.model_config
    parameters = sum(
        v.numel() for key, v in checkpoint.state_dict.items() if v.is_floating_point() and "running_" not in key
    )
    temp = checkpoint.state_dict.get("temp")
    best = checkpoint.extra.get("best_oIoU")
    lines = [
        ("file", str(checkpoint.path)),
        ("form", checkpoint.form + (", keys prefixed with module." if checkpoint.prefixed else "")),
        ("Swin type", config["swin_type"]),
        ("window", config["window_size"]),
        ("fusion", config.get("fusion", "cross")),
        ("parameters", f"{parameters / 1e6:.1f} M in {len(checkpoint.state_dict)} entries"),
        ("temp", "none" if temp is None else " ".join(f"{t:.4f}" for t in temp.tolist())),
        ("epoch", _told_position(checkpoint.extra)),
        ("best oIoU", "not said" if best is None else f"{float(best):.2f}"),
        (
            "optimizer",
            "yes: training can be resumed" if checkpoint.is_resumable else "no: for evaluation or --init_from",
        ),
    ]
    return "\n".join(f"{name:<10} {value}" for name, value in lines)


def _told_position(extra: dict[str, Any]) -> str:
    """``12``, ``12 and 40 steps (step 3040)``, or that the file doesn't say."""
    if "epoch" not in extra:
        return "not said"
    inside = f" and {extra['epoch_step']} steps" if extra.get("epoch_step") else ""
    return f"{extra['epoch']}{inside}" + (f" (step {extra['step']})" if "step" in extra else "")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lib.checkpoint", description="Print what a checkpoint holds.", allow_abbrev=False
    )
    parser.add_argument("file", metavar="FILE", help="a released, training or this project's checkpoint")
    return parser


def main() -> None:
    print(describe(read_checkpoint(get_parser().parse_args(sys.argv[1:]).file)))


if __name__ == "__main__":
    run_command(main)
