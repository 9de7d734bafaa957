"""Build the datasets and the network of a training run from its configuration."""

import inspect
import logging
import math
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertTokenizer
from yacs.config import CfgNode

from bert.encoder_config import read_encoder_sizes
from bert.files import find_beside, resolve_bert_file
from bert.tokenization import check_vocabulary, load_tokenizer, restore_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.mixed import MixedDataset, mix
from data.pack.source import check_packed, open_source
from lib import config
from lib.checkpoint import Checkpoint, load_pretrained, load_weights, read_checkpoint, rebuild
from lib.engine.checkpoints import check_recipe, check_same, division_of, find_resumed, match_division
from lib.engine.folders import check_not_running
from lib.errors import MissingFileError, UserError
from lib.models import NETWORKS
from lib.variants import NO_FILE, SWIN_VARIANTS
from refer.datasets import BERT_WEIGHTS, SWIN_URL, check_dataset
from refer.refer import REFER
from utils import Distributed, derive_seed, from_main, gather, launched_world_size, on_main, warn_once

LOG = logging.getLogger("crossvlt")


class Start(NamedTuple):
    """Where a training starts."""

    resumed: Checkpoint | None  # the run continues from this checkpoint
    initial: Checkpoint | None  # a new run starts from the weights of this one (--init_from)
    pretrained: tuple[Path | None, Path | None]  # or from these Swin and BERT files
    accum_steps: int  # forward passes per process and optimizer step
    uses_saved_tokenizer: bool  # of the checkpoint

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint with the weights to start from, if there is one."""
        return self.resumed or self.initial

    @property
    def saved_threads(self) -> int | None:
        """The number of CPU threads of the resumed run. None: a new run, or one of an older version."""
        return self.resumed.extra.get("threads") if self.resumed else None


def load_recipe(args: Any, cfg: CfgNode, given: dict[str, str]) -> tuple[CfgNode, Start]:
    """Find the weights to start from, and return the configuration. When resuming, the saved recipe is the default.

    Args:
        args: the parsed flags.
        cfg, given: the configuration of a new run, from :func:`lib.config.load_config`.

    Raises:
        UserError: a mistake in flags or files.
    """
    check_not_running(cfg)
    resumed = find_resumed(args.resume, args.auto_resume, cfg.OUTPUT_DIR, cfg.MODEL_ID)
    if resumed:
        cfg, given = config.load_config(args, base=resumed.extra["config"])
        check_not_running(cfg)  # MODEL_ID can be from the checkpoint
        check_recipe(resumed, config.flatten(cfg), given)
    accum_steps = config.divide_batch(cfg, given, launched_world_size())
    if resumed:
        resumed = match_division(resumed, (launched_world_size(), cfg.BATCH_SIZE, accum_steps))
        previous = math.prod(division_of(resumed))
        if previous != cfg.TRAIN.GLOBAL_BATCH:
            warn_once(
                f"The global batch changes from {previous} to {cfg.TRAIN.GLOBAL_BATCH}. From now on, epochs have a "
                "different number of steps, so the learning rate jumps."
            )
    for dataset, split_by in config.datasets_of(cfg):
        check_dataset(cfg.DATA.ROOT, dataset, split_by)
    pretrained = (None, None) if resumed else find_pretrained(cfg)
    set_encoder_sizes(cfg, given, pretrained[1])
    initial = read_checkpoint(cfg.PRETRAINED.INIT_FROM) if cfg.PRETRAINED.INIT_FROM and not resumed else None
    if initial is not None:
        initial.check_network(cfg.MODEL.NAME, hint=f"Pass --model {initial.model_name}, or another checkpoint.")
        heads = initial.model_config.get("mha", "")  # visible in no shape
        if cfg.MODEL.MHA not in ("", heads):
            raise UserError(f"{initial.path} was trained with mha {heads}, not {cfg.MODEL.MHA}. Drop --mha.")
        cfg.MODEL.MHA = heads
    checkpoint = resumed or initial
    if cfg.PRETRAINED.DDP_TRAINED and "PRETRAINED.DDP_TRAINED" in given:
        if checkpoint is None:
            raise UserError("--ddp_trained_weights requires a checkpoint. Pass --init_from or --resume, or drop it.")
        checkpoint.check_prefix(True)
    tokenizer = config.tokenizer_name(cfg, cfg.MODEL.VOCAB_SIZE)
    uses_saved = checkpoint is not None and "tokenizer" in checkpoint.extra and "PRETRAINED.TOKENIZER" not in given
    if uses_saved and initial:
        tokenizer = initial.extra.get("config", {}).get("PRETRAINED.TOKENIZER", tokenizer)
    cfg.PRETRAINED.TOKENIZER = tokenizer  # saved with the run
    return cfg, Start(resumed, initial, pretrained, accum_steps, uses_saved)


def agree_on_run(cfg: CfgNode, resumed: Checkpoint | None) -> None:
    """Check that all processes resume from the same checkpoint, and give a run without ``--model_id`` a name."""
    found = gather((resumed.path.name, resumed.extra["step"], resumed.extra.get("run_id")) if resumed else None)
    on_main(lambda: check_same(found))
    if not cfg.MODEL_ID:
        dataset = f"{cfg.DATA.NAME}_{cfg.DATA.SPLIT_BY}".replace(",", "-")
        cfg.MODEL_ID = from_main(f"{dataset}_{cfg.MODEL.SWIN_TYPE}_{time.strftime('%Y%m%d-%H%M%S')}")


def build_tokenizer(cfg: CfgNode, start: Start) -> BertTokenizer:
    """Return the tokenizer that the checkpoint contains, or load the configured one. UserError: it is missing."""
    if start.uses_saved_tokenizer:
        extra = start.checkpoint.extra
        return restore_tokenizer(extra["tokenizer"], start.checkpoint.path, extra.get("vocabulary"))
    return load_tokenizer(cfg.PRETRAINED.TOKENIZER)


def build_datasets(cfg: CfgNode, tokenizer: BertTokenizer) -> tuple[ReferDataset | MixedDataset, ReferDataset]:
    """Read the annotations and return the training and the validation split.

    With several datasets, training uses their union without the images of any evaluation split, and validation the
    first dataset. Logs how many images the splits share.
    """
    refers = [REFER(cfg.DATA.ROOT, *names) for names in config.datasets_of(cfg)]
    splits = [(refers[0], cfg.DATA.SPLIT), *((refer, "train") for refer in refers)]
    check_packed(cfg.DATA.PACKED, *((refer.dataset, refer.splitBy, split) for refer, split in splits))

    def build(refer: REFER, split: str, **kwargs: Any) -> ReferDataset:
        source = open_source(cfg.DATA.PACKED, refer, split, cfg.DATA.IMG_SIZE)
        kwargs |= {"img_size": cfg.DATA.IMG_SIZE, "max_tokens": cfg.DATA.MAX_TOKENS}
        return ReferDataset(refer, split, tokenizer, source=source, **kwargs)

    def build_train(refer: REFER, excluded_images: Collection[int] = ()) -> ReferDataset:
        return build(refer, "train", draw_seed=cfg.SEED, excluded_images=excluded_images)

    val_set = build(refers[0], cfg.DATA.SPLIT)
    if len(refers) > 1:
        train_set, report = mix(refers, build_train)
        for line in report.lines():
            LOG.info(line)
        return train_set, val_set
    train_set = build_train(refers[0])
    keys = refers[0].image_keys()
    val_images, train_images = ({keys[e.image_id] for e in split.expressions} for split in (val_set, train_set))
    shared = len(val_images & train_images)
    if shared:
        warn_once("%d of the %d images of split %s are also in train", shared, len(val_images), val_set.split)
    return train_set, val_set


def find_pretrained(cfg: CfgNode) -> tuple[Path | None, Path | None]:
    """Return the Swin and BERT files to start from; None for an encoder that starts from other weights.

    Raises:
        MissingFileError: a file is missing; the message says where to download it.
    """
    pretrained = cfg.PRETRAINED
    if pretrained.FROM_SCRATCH or pretrained.INIT_FROM:
        return None, None
    name = SWIN_VARIANTS[cfg.MODEL.SWIN_TYPE]["pretrained"]
    swin = None if pretrained.SWIN == NO_FILE else Path(pretrained.SWIN or Path("pretrained") / name)
    if swin and not swin.is_file():
        raise MissingFileError(
            f"ImageNet Swin weights {swin} not found. Download them with `python -m refer.prepare --weights "
            f"swin_{cfg.MODEL.SWIN_TYPE}` (from {SWIN_URL}{name}), pass --pretrained_swin_weights FILE, or start "
            f"from random weights with --pretrained_swin_weights {NO_FILE} or, both encoders, --from_scratch."
        )
    if pretrained.BERT == NO_FILE:
        return swin, None
    try:
        return swin, resolve_bert_file(pretrained.BERT, BERT_WEIGHTS, flag="--ck_bert")
    except MissingFileError as error:
        hint = f"Or start from random weights with --ck_bert {NO_FILE} or, both encoders, --from_scratch."
        raise MissingFileError(f"{error} {hint}") from error


def set_encoder_sizes(cfg: CfgNode, given: dict[str, str], bert: Path | None) -> None:
    """Set the sizes of the language encoder to those in the config.json beside its pretrained weights, if there is one.

    The network uses the encoder's first MODEL.TEXT_LAYERS layers, or all of them if it has fewer. CrossVLT's language
    stages 2 to 4 start from random weights, as published.

    Raises:
        UserError: a YAML file sets another size, or more layers than the encoder has.
    """
    path = find_beside(bert, cfg.PRETRAINED.BERT, "config.json") if bert else None
    if path is None:
        return
    encoder = read_encoder_sizes(path)
    layers = cfg.MODEL.TEXT_LAYERS if "MODEL.TEXT_LAYERS" in given else min(cfg.MODEL.TEXT_LAYERS, encoder.text_layers)
    if layers > encoder.text_layers:
        raise UserError(
            f"{given['MODEL.TEXT_LAYERS']}: MODEL.TEXT_LAYERS is {layers}, but the encoder of --ck_bert has only "
            f"{encoder.text_layers} layers ({path})."
        )
    for name, size in encoder._replace(text_layers=layers)._asdict().items():
        key = f"MODEL.{name.upper()}"
        if key in given and config.lookup(cfg, key) != size:
            raise UserError(
                f"{given[key]}: {key} is {config.lookup(cfg, key)}, but the encoder of --ck_bert has {size} ({path}). "
                "Drop the key, or pass another --ck_bert."
            )
        cfg.MODEL[name.upper()] = size
    LOG.info(
        "Language encoder %s: the first %d of %d layers, %d channels, %d heads, %d word embeddings",
        cfg.PRETRAINED.BERT, layers, encoder.text_layers, *encoder[:1], *encoder[2:],
    )  # fmt: skip


def build_model(cfg: CfgNode, start: Start, tokenizer: BertTokenizer, distributed: Distributed) -> nn.Module:
    """Build the network with the weights that training starts from, on this process's device.

    Raises:
        UserError: the configured sizes, the files and the vocabulary do not match.
    """
    torch.manual_seed(derive_seed("initialisation", cfg.SEED))
    if start.resumed is not None:
        model = rebuild(start.resumed)
    else:
        swin, bert = start.pretrained
        try:
            keywords = config.model_keywords(cfg, _window_size(cfg, swin, start.initial))
            model = NETWORKS[cfg.MODEL.NAME].build(**keywords)
        except ValueError as error:
            raise UserError(f"Cannot build the configured MODEL: {error}") from error
        if start.initial is not None:
            load_weights(model, start.initial)
        load_pretrained(model, swin, bert)
    trained_with = start.checkpoint.extra.get("vocabulary") if start.checkpoint else None
    check_vocabulary(tokenizer, model.config["vocab_size"], trained_with)
    model = model.to(distributed.device)
    if distributed.world_size > 1 and distributed.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def _window_size(cfg: CfgNode, swin: Path | None, initial: Checkpoint | None) -> int:
    """Return the configured window size, or that of the initial weights, or 0 (the default of the Swin type)."""
    if cfg.MODEL.WINDOW_SIZE:
        return cfg.MODEL.WINDOW_SIZE
    if initial is not None:
        return initial.model_config["window_size"]
    match = re.search(r"window(\d+)", swin.name) if swin else None
    return int(match[1]) if match else 0


def wrap_model(model: nn.Module, distributed: Distributed) -> nn.Module:
    """Wrap the model in DistributedDataParallel if there are several processes."""
    if distributed.world_size == 1:
        return model
    # Training uses no buffer of BatchNorm, so it is enough to copy them at the end of an epoch.
    buffers = "forward_sync_buffers"  # its name before torch 2.15: broadcast_buffers
    if buffers not in inspect.signature(DistributedDataParallel).parameters:
        buffers = "broadcast_buffers"
    options = {"gradient_as_bucket_view": True, "static_graph": True, buffers: False}
    if distributed.device.type == "cuda":
        return DistributedDataParallel(model, device_ids=[distributed.device.index], **options)
    LOG.info("BatchNorm is not synchronized (SyncBatchNorm requires CUDA); rank 0's running statistics are used")
    return DistributedDataParallel(model, **options)
