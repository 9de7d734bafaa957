"""Load a checkpoint with everything that evaluation and prediction need, and start an evaluation."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertTokenizer
from yacs.config import CfgNode

from bert.tokenization import check_vocabulary, fingerprint, load_tokenizer, restore_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.pack.source import open_source
from data.transforms import check_preprocessing
from lib import config
from lib.checkpoint import Checkpoint, read_checkpoint, rebuild
from lib.engine.signals import StopSignals
from lib.errors import StoppedError, UserError
from lib.evaluation import EvalSetup
from lib.files import file_sha256
from lib.inference import prepare, warn_if_slower
from lib.protocols import SWITCHES, Protocol, choose_protocols
from lib.variants import BERT, BERT_VOCAB_SIZE, MODELS
from refer.refer import REFER
from utils import float32_precision, init_distributed, on_main, set_up_logging

# Settings taken from the checkpoint unless a flag or a YAML file sets them.
KEYS_AS_TRAINED = ("DATA.IMG_SIZE", "DATA.MAX_TOKENS", "PRETRAINED.TOKENIZER")
MODEL_FLAGS = (("MODEL.SWIN_TYPE", "swin_type", "--swin_type"), ("MODEL.WINDOW_SIZE", "window_size", "--window12"))

_sha256 = functools.cache(file_sha256)  # --table needs the same digests for several splits


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint with its configuration, tokenizer and the protocols to evaluate it under."""

    checkpoint: Checkpoint
    cfg: CfgNode
    tokenizer: BertTokenizer
    protocols: list[Protocol]

    def build_model(self, device: torch.device) -> nn.Module:
        """Return the model on a device, prepared for inference in the configured precision."""
        warn_if_slower(self.cfg.TRAIN.AMP, device)
        return prepare(rebuild(self.checkpoint).to(device).eval(), amp=self.cfg.TRAIN.AMP)

    def open_splits(
        self, refer: REFER, splits: Iterable[str], *, shuffle_sentences: bool = False
    ) -> dict[str, ReferDataset]:
        """Return the datasets of splits, preprocessed for the model, from packed files if there are any.

        Raises:
            UserError: an image file is missing, or a packed file cannot be used.
        """
        datasets = {
            split: ReferDataset(
                refer,
                split,
                self.tokenizer,
                img_size=self.cfg.DATA.IMG_SIZE,
                max_tokens=self.cfg.DATA.MAX_TOKENS,
                shuffle_seed=self.cfg.SEED if shuffle_sentences else None,
                source=open_source(self.cfg.DATA.PACKED, refer, split, self.cfg.DATA.IMG_SIZE),
            )
            for split in splits
        }
        for dataset in datasets.values():
            dataset.check_images()
        return datasets

    def settings(
        self, datasets: dict[str, ReferDataset], device: torch.device, *, shuffle_sentences: bool = False
    ) -> dict[str, Any]:
        """Return the description of the evaluation written into result files. All processes must call it."""
        cfg, model_config = self.cfg, self.checkpoint.model_config
        annotation_files = next(iter(datasets.values())).annotation_files
        return {
            "checkpoint": str(self.checkpoint.path),
            "checkpoint_sha256": on_main(lambda: _sha256(self.checkpoint.path)),
            "model": self.checkpoint.model_name,
            "swin_type": model_config["swin_type"],
            "window_size": model_config["window_size"],
            "img_size": cfg.DATA.IMG_SIZE,
            "batch_size": cfg.BATCH_SIZE,
            "dataset": cfg.DATA.NAME,
            "split_by": cfg.DATA.SPLIT_BY,
            "splits": {split: len(dataset) for split, dataset in datasets.items()},
            "shuffle_sentences": shuffle_sentences,
            "shuffle_seed": cfg.SEED if shuffle_sentences else None,
            "protocols": [protocol.settings() for protocol in self.protocols],
            "vocabulary": fingerprint(self.tokenizer),
            "annotations_sha256": on_main(lambda: {path.name: _sha256(path) for path in annotation_files}),
            "precision": float32_precision(device) if cfg.TRAIN.AMP == "off" else cfg.TRAIN.AMP,
        }


def load_for_evaluation(args: Any, path: str | Path) -> LoadedCheckpoint:
    """Read a checkpoint and combine its configuration with the flags.

    Args:
        args: the parsed flags of test.py.
        path: the checkpoint file.

    Raises:
        MissingFileError, UserError: the file cannot be read, or a flag conflicts with it.
    """
    checkpoint = read_checkpoint(path)
    saved = checkpoint.extra.get("config", {})
    base = {key: saved[key] for key in KEYS_AS_TRAINED if key in saved} | {config.NAME_KEY: checkpoint.model_name}
    if "preprocessing" in checkpoint.extra:
        preprocessing = checkpoint.extra["preprocessing"]
        check_preprocessing(preprocessing, checkpoint.path)
        base |= {"DATA.IMG_SIZE": preprocessing["img_size"], "DATA.MAX_TOKENS": preprocessing["max_tokens"]}
    cfg, given = config.load_config(args, base)
    checkpoint.check_network(cfg.MODEL.NAME, hint=f"Pass --model {checkpoint.model_name}, or another checkpoint.")
    checkpoint.check_prefix(cfg.PRETRAINED.DDP_TRAINED)
    for key, name, flag in MODEL_FLAGS:
        expected, trained = config.lookup(cfg, key), checkpoint.model_config[name]
        if key in given and expected and expected != trained:
            raise UserError(f"{path} was trained with {name} {trained}, not {expected}. Drop {flag}.")
    switches = {
        name: config.lookup(cfg, switch.config_key) if switch.config_key else getattr(args, name)
        for name, switch in SWITCHES.items()
    }
    protocols = choose_protocols(args.protocol or MODELS[checkpoint.model_name].protocol, **switches)
    tokenizer = _find_tokenizer(checkpoint, cfg, is_given="PRETRAINED.TOKENIZER" in given)
    return LoadedCheckpoint(checkpoint, cfg, tokenizer, protocols)


def _find_tokenizer(checkpoint: Checkpoint, cfg: CfgNode, *, is_given: bool) -> BertTokenizer:
    """Return the configured tokenizer if it is set by the user, else the one that the checkpoint contains.

    Files of older versions contain only the name or path of their vocabulary.

    Raises:
        UserError: there is no such vocabulary, or it is not the one of the training.
    """
    extra, vocab_size = checkpoint.extra, checkpoint.model_config["vocab_size"]
    if "tokenizer" in extra and not is_given:
        tokenizer = restore_tokenizer(extra["tokenizer"], checkpoint.path, extra.get("vocabulary"))
    else:
        vocabulary = Path(cfg.PRETRAINED.TOKENIZER)
        if not is_given and vocabulary.suffix == ".txt" and not vocabulary.exists():  # saved on another machine
            cfg.PRETRAINED.TOKENIZER = ""  # check_vocabulary verifies the default
            if config.tokenizer_name(cfg, vocab_size) == BERT and vocab_size != BERT_VOCAB_SIZE:
                raise UserError(
                    f"{checkpoint.path} was trained with the vocabulary {vocabulary} ({vocab_size} entries), which "
                    "does not exist here. Pass --bert_tokenizer with a copy of that file."
                )
        tokenizer = load_tokenizer(config.tokenizer_name(cfg, vocab_size))
    check_vocabulary(tokenizer, vocab_size, extra.get("vocabulary"))
    return tokenizer


@contextmanager
def start_evaluation(cfg: CfgNode, *, keeps_results: bool = False) -> Iterator[EvalSetup]:
    """Initialize distributed evaluation, and let signals stop it between two batches.

    Args:
        cfg: device, precision, batch size and workers.
        keeps_results: whether results are written to a file from which an interrupted evaluation continues. If not, a
            signal ends the command like Ctrl-C.
    """
    dist = init_distributed(cfg.DEVICE, tf32=cfg.TRAIN.TF32)
    set_up_logging(dist.rank)
    with StopSignals() as signals:
        try:
            yield EvalSetup(dist, cfg.BATCH_SIZE, cfg.WORKERS, cfg.PIN_MEM, signals.stop_requested)
        except StoppedError as error:
            if not keeps_results:
                raise KeyboardInterrupt from error
            raise
