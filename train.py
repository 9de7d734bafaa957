"""Train CrossVLT.

    # two GPUs, the published recipe for RefCOCO
    python -m torch.distributed.launch --nproc_per_node 2 --master_port 12345 train.py --dataset refcoco \\
        --swin_type base --batch-size 6 --lr 0.00003 --wd 1e-2 --epochs 40 --img_size 480

    torchrun --nproc_per_node 2 train.py --cfg configs/refcoco+.yaml            # the same by torchrun, from a yaml
    python train.py --cfg configs/one_24gb_gpu.yaml --dataset refcoco           # one GPU, the published global batch
    python train.py --dataset refcoco,refcoco+,refcocog …                       # the union, without what is evaluated
    python train.py --cfg … --model_id mine --auto_resume                       # begin, or go on after any end
    python train.py --resume checkpoints/<model_id>/last.pth                    # go on with a run

A run writes <output-dir>/<model_id>/{best,last}.pth and models/<model_id>/{train.log, metrics.jsonl, config.yaml,
environment.json, tensorboard/}. It ends with status 0; 2 after a user's mistake; 75 when a signal (SIGTERM, SIGINT,
SIGUSR1) stopped it with everything saved; 1 after a bug, or because another process died.
"""

import contextlib
import functools
import logging
import math
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertTokenizer
from yacs.config import CfgNode

from bert.files import resolve_bert_file
from bert.tokenization import check_vocabulary, fingerprint, load_tokenizer
from CrossVLT import CrossVLT, build_crossvlt
from data.dataset_refer_bert import ReferDataset
from data.loaders import DeviceBatches, build_train_loader
from data.mixed import MixedDataset, mix
from lib import config
from lib.checkpoint import Checkpoint, load_pretrained, load_strictly, load_weights, read_checkpoint, rebuild
from lib.cli import run_command
from lib.criterion import CrossVLTCriterion
from lib.engine.checkpoints import BEST, LAST, CheckpointFolder, numbered
from lib.engine.control import Control
from lib.engine.precision import Precision, compile_blocks
from lib.engine.preflight import GIB, check_space, checkpoint_bytes, duration, time_training
from lib.engine.progress import Progress, restore_random_states
from lib.engine.resume import check_recipe, check_same, find_resumed, for_share, share_of, warn_once
from lib.engine.step import TrainingStep
from lib.engine.trainer import Trainer
from lib.engine.validation import time_validation, validate
from lib.errors import MissingFileError, UserError
from lib.evaluation import EvalSetup
from lib.files import write_text
from lib.journal import Journal, write_environment
from lib.optim import build_lr_scheduler, build_optimizer, freeze, names_without_gradient
from lib.report.figures import draw_validation
from lib.variants import SWIN_VARIANTS
from refer.datasets import BERT_WEIGHTS, SWIN_URL, check_dataset
from refer.refer import REFER
from utils import (
    Distributed,
    cpu_group,
    derive_seed,
    from_main,
    gather,
    init_distributed,
    launched_rank,
    launched_world_size,
    on_main,
    set_up_logging,
)

LOG = logging.getLogger("crossvlt")


class Splits(NamedTuple):
    """What is trained and validated on, the tokenizer both are read with, and what is to be known of their pictures."""

    train: ReferDataset | MixedDataset
    val: ReferDataset
    tokenizer: BertTokenizer
    remarks: list[tuple[int, str]]  # levels of the log, and lines


def get_parser() -> config.Parser:
    def add_more(parser: config.Parser) -> None:
        parser.add_argument(
            "--resume", metavar="FILE", help="go on with a run from its last.pth, by its saved configuration"
        )
        parser.add_argument(
            "--auto_resume",
            action="store_true",
            help="go on with the run --model_id from its newest good checkpoint, or begin it where there is none",
        )

    return config.get_parser("train", __doc__, add_more)


def find_pretrained(cfg: CfgNode) -> tuple[Path | None, Path | None]:
    """The Swin and BERT files to start from, (None, None) where none is wanted.

    Raises:
        MissingFileError: one isn't there; the message says where it is to be had.
    """
    pretrained = cfg.PRETRAINED
    if pretrained.FROM_SCRATCH and pretrained.INIT_FROM:
        raise UserError("--from_scratch and --init_from contradict each other: give one of them")
    if pretrained.FROM_SCRATCH or pretrained.INIT_FROM:
        return None, None
    name = SWIN_VARIANTS[cfg.MODEL.SWIN_TYPE]["pretrained"]
    swin = Path(pretrained.SWIN or Path("pretrained") / name)
    if not swin.is_file():
        raise MissingFileError(
            f"no ImageNet Swin weights {swin}: `python -m refer.prepare --weights swin_{cfg.MODEL.SWIN_TYPE}` brings "
            f"{SWIN_URL}{name}; or name the file by --pretrained_swin_weights, or train with --from_scratch"
        )
    try:
        return swin, resolve_bert_file(pretrained.BERT, BERT_WEIGHTS, flag="--ck_bert")
    except MissingFileError as error:
        raise MissingFileError(f"{error}; or train with --from_scratch") from error


def window_size(cfg: CfgNode, swin: Path | None, start: Checkpoint | None) -> int:
    """The Swin window: as configured, else that of what training starts from, else 0 (the type's own)."""
    named = re.search(r"window(\d+)", swin.name) if swin else None
    of_start = start.model_config["window_size"] if start else 0
    return cfg.MODEL.WINDOW_SIZE or (int(named[1]) if named else of_start)


def build_model(
    cfg: CfgNode, resumed: Checkpoint | None, start: Checkpoint | None, swin: Path | None, bert: Path | None
) -> CrossVLT:
    """The network with the weights it starts from."""
    torch.manual_seed(derive_seed("initialisation", cfg.SEED))
    if resumed is not None:
        return rebuild(resumed, build_crossvlt)
    try:
        model = build_crossvlt(**config.model_keywords(cfg, window_size(cfg, swin, start)))
    except ValueError as error:
        raise UserError(f"the configured MODEL can't be built: {error}") from error
    if start is not None:
        load_weights(model, start)
    load_pretrained(model, swin, bert)
    return model


def open_run(cfg: CfgNode, resumed: Checkpoint | None, processes: Distributed) -> tuple[Path, Path]:
    """Make the run's folders and begin its log; gives back the folders of its checkpoints and of its logs.

    Raises:
        UserError: a folder can't be made, or already holds another run.
    """
    if Path(cfg.MODEL_ID).name != cfg.MODEL_ID or cfg.MODEL_ID == "..":
        raise UserError(f"--model_id {cfg.MODEL_ID}: must be a plain name, it becomes a folder's")
    checkpoints, logs = Path(cfg.OUTPUT_DIR, cfg.MODEL_ID), Path(cfg.LOG_DIR, cfg.MODEL_ID)
    own = resumed is not None and resumed.path.resolve().parent == checkpoints.resolve()
    if not own and ((checkpoints / LAST).exists() or numbered(checkpoints)):
        raise UserError(
            f"{checkpoints} already holds a run: choose another --model_id, or go on with it by --auto_resume"
        )
    if not own and (checkpoints / BEST).exists():
        raise UserError(f"{checkpoints / BEST} is another run's: choose another --model_id, or move it away")
    for folder in (checkpoints, logs):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"can't make the folder {folder}: {error.strerror}; choose another --model_id") from error
    set_up_logging(0, logs / "train.log")
    write_text(logs / "config.yaml", cfg.dump())
    step = resumed.extra["step"] if resumed else 0
    write_environment(logs / "environment.json", from_step=step, processes=processes.world_size)
    return checkpoints, logs


def wrap(model: CrossVLT, processes: Distributed) -> nn.Module:
    """DistributedDataParallel where there are several processes."""
    if processes.world_size == 1:
        return model
    if processes.device.type == "cuda":
        return DistributedDataParallel(model, device_ids=[processes.device.index])
    LOG.info("BatchNorm: ordinary, with rank 0's running statistics (SyncBatchNorm exists on CUDA only)")
    return DistributedDataParallel(model)


def open_splits(cfg: CfgNode) -> Splits:
    """Read the annotations and tokenise the sentences."""
    cfg.PRETRAINED.TOKENIZER = config.tokenizer_name(cfg, cfg.MODEL.VOCAB_SIZE)  # resolved: saved with the run
    tokenizer = load_tokenizer(cfg.PRETRAINED.TOKENIZER)
    refers = [REFER(cfg.DATA.ROOT, *names) for names in config.datasets_of(cfg)]
    how = {"img_size": cfg.DATA.IMG_SIZE, "max_tokens": cfg.DATA.MAX_TOKENS, "seed": cfg.SEED}

    def make_train(refer: REFER, excluded_images: Collection[int] = ()) -> ReferDataset:
        return ReferDataset(refer, "train", tokenizer, draw_sentences=True, excluded_images=excluded_images, **how)

    val = ReferDataset(refers[0], cfg.DATA.SPLIT, tokenizer, **how)
    if len(refers) > 1:
        train, proof = mix(refers, make_train)
        return Splits(train, val, tokenizer, [(logging.INFO, line) for line in proof.lines()])
    train = make_train(refers[0])
    keys = refers[0].image_keys()
    judged, trained = ({keys[expression.image_id] for expression in split.expressions} for split in (val, train))
    seen = len(judged & trained)
    leak = (logging.WARNING, f"{seen} of the {len(judged)} pictures of split {val.split} are in train too")
    return Splits(train, val, tokenizer, [leak] if seen else [])


def build_step(
    cfg: CfgNode, model: CrossVLT, total_steps: int, precision: Precision, resumed: Checkpoint | None
) -> TrainingStep:
    """Optimizer, scheduler, moving average and what else a step needs, as they begin or as they were saved."""
    train = cfg.TRAIN
    how = {"alignment": train.ALIGNMENT, "train_temperature": train.TRAIN_TEMPERATURE}
    frozen = names_without_gradient(model, **how)
    freeze(model, frozen)
    LOG.info("not trained: %s", ", ".join(frozen))
    optimizer = build_optimizer(
        model, train.LR, train.WEIGHT_DECAY, amsgrad=train.AMSGRAD, train_temperature=train.TRAIN_TEMPERATURE
    )
    scheduler = build_lr_scheduler(optimizer, total_steps, train.WARMUP_STEPS)
    ema = ModelEmaV3(model, train.EMA) if train.EMA else None
    if resumed:
        saved = resumed.extra
        for group, new in zip(saved["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
            group["fused"] = new["fused"]  # as this device wants it
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        for group, base, curve in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * curve(scheduler.last_epoch)  # the saved rate is another's where the length changed
        precision.scaler.load_state_dict(saved["scaler"])
        if ema:
            load_strictly(ema.module, saved["ema"], str(resumed.path))
        resumed.state_dict.clear()  # copied by now; a model's and an optimizer's size of memory
        saved["optimizer"] = saved["ema"] = None
    return TrainingStep(
        model, CrossVLTCriterion(train.ALIGNMENT), optimizer, scheduler, precision,
        clip_grad=train.CLIP_GRAD, ema=ema, global_norm=train.GLOBAL_NORM, group=cpu_group(),
    )  # fmt: skip


def fit(
    cfg: CfgNode,
    model: CrossVLT,
    splits: Splits,
    accum_steps: int,
    processes: Distributed,
    resumed: Checkpoint | None,
    *,
    may_be_done: bool,
) -> None:
    """Train to the last step, having looked first whether everything that comes can come."""
    train, device = cfg.TRAIN, processes.device
    loading = {"batch_size": cfg.BATCH_SIZE, "workers": cfg.WORKERS, "pin_memory": cfg.PIN_MEM}
    loading |= {"rank": processes.rank, "world_size": processes.world_size}
    loader = build_train_loader(splits.train, seed=cfg.SEED, accum_steps=accum_steps, **loading)
    steps_per_epoch = loader.batch_sampler.steps_per_epoch
    progress = Progress.from_state_dict(resumed.extra) if resumed else Progress()
    epochs_left = max(0, train.EPOCHS - progress.epoch)
    total_steps = train.STEPS or progress.step - progress.epoch_step + epochs_left * steps_per_epoch
    if progress.step >= total_steps and not progress.epoch_step:
        told = f"this run has all its {progress.step} steps done; ask for more by --epochs or --steps"
        if not may_be_done:
            raise UserError(told)
        LOG.info(told)
        return
    if total_steps < train.WARMUP_STEPS:
        raise UserError(f"--warmup_steps {train.WARMUP_STEPS}: the whole training has {total_steps} steps")

    checkpoints, logs = on_main(lambda: open_run(cfg, resumed, processes))
    folder = CheckpointFolder(checkpoints, train.KEEP, from_step=progress.step)
    on_main(folder.clean)
    on_main(splits.train.check_images)
    on_main(splits.val.check_images)
    if resumed:
        LOG.info("goes on from %s: epoch %d, step %d", resumed.path, progress.epoch + 1, progress.step)
    for level, remark in splits.remarks:
        LOG.log(level, remark)
    LOG.info("%s: %.1f M parameters", cfg.MODEL_ID, sum(p.numel() for p in model.parameters()) / 1e6)
    LOG.info(
        f"{len(splits.train)} samples; steps {progress.step}…{total_steps}, {steps_per_epoch} per epoch; global batch "
        f"{train.GLOBAL_BATCH} = {processes.world_size} process(es) × {cfg.BATCH_SIZE} × {accum_steps} accumulated on "
        f"{device.type}"
    )
    if train.TF32 and device.type != "cuda":
        LOG.warning("--tf32: TF32 is a way of GPUs; not used on %s", device.type)
    precision = Precision(train.AMP, device)
    step = build_step(cfg, model, total_steps, precision, resumed)
    size, weights = checkpoint_bytes(model, amsgrad=train.AMSGRAD, ema=bool(train.EMA))
    free = on_main(lambda: check_space(checkpoints, size, weights, train.KEEP))
    model.set_grad_checkpointing(train.GRAD_CHECKPOINT)
    if train.COMPILE:
        compile_blocks(model.blocks())

    def set_position(epoch: int, first_step: int) -> None:
        splits.train.set_epoch(epoch)
        loader.batch_sampler.set_position(epoch, first_step)

    with Control(train.SAVE_STEPS, train.SAVE_MINUTES, step.group) as control, contextlib.ExitStack() as at_the_end:
        setup = EvalSetup(processes, cfg.BATCH_SIZE, cfg.WORKERS, cfg.PIN_MEM, control.stop_requested)
        judging = time_validation(model, splits.val, setup)
        step.model, batches = wrap(model, processes), DeviceBatches(loader, device)
        training = time_training(step.model, step.criterion, precision, next(iter(batches)))
        LOG.info(
            f"expected: {duration(training * accum_steps * steps_per_epoch)} of training and {duration(judging)} of "
            f"validation per epoch, data loading not counted; a checkpoint has {size / GIB:.2f} GiB, {free / GIB:.0f} "
            "are free"
        )
        journal = Journal(logs if processes.is_main else None)
        on_main(lambda: journal.begin(progress.step, validated=progress.epoch_step == 0))
        at_the_end.callback(journal.close)
        if resumed and progress.epoch_step:
            restore_random_states(resumed.extra["random"][processes.rank])
        Trainer(
            model=model,
            step=step,
            micro_batches=batches,
            set_position=set_position,
            accum_steps=accum_steps,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            validate=lambda model: validate(model, splits.val, setup),
            draw=functools.partial(draw_validation, splits.val),
            progress=progress,
            control=control,
            checkpoints=folder,
            journal=journal,
            logs=logs,
            constants={
                "model_config": model.config,
                "config": config.flatten(cfg),
                "vocabulary": fingerprint(splits.tokenizer),
                "share": [processes.world_size, cfg.BATCH_SIZE, accum_steps],
            },
            split=cfg.DATA.SPLIT,
            seed=cfg.SEED,
            print_freq=cfg.PRINT_FREQ,
            processes=processes,
        ).run()
    LOG.info("done: best oIoU %.2f on %s, in %s", progress.best_oIoU, cfg.DATA.SPLIT, checkpoints / BEST)


def main() -> None:
    args = get_parser().parse_args()
    set_up_logging(launched_rank())
    cfg, given = config.resolve(args)
    resumed = find_resumed(args.resume, args.auto_resume, cfg.OUTPUT_DIR, cfg.MODEL_ID)
    if resumed:
        cfg, given = config.resolve(args, base=resumed.extra["config"])
        check_recipe(resumed, config.flatten(cfg), given)
    world_size = launched_world_size()
    accum_steps = config.divide_batch(cfg, given, world_size)
    if resumed:
        resumed = for_share(resumed, (world_size, cfg.BATCH_SIZE, accum_steps))
        before = math.prod(share_of(resumed))
        if before != cfg.TRAIN.GLOBAL_BATCH:
            warn_once(
                f"the global batch was {before} so far and is {cfg.TRAIN.GLOBAL_BATCH} from here on; an epoch has "
                "another number of steps, so the learning rate jumps to another place of its curve"
            )
    for names in config.datasets_of(cfg):
        check_dataset(cfg.DATA.ROOT, *names)
    swin, bert = (None, None) if resumed else find_pretrained(cfg)
    start = resumed or (read_checkpoint(cfg.PRETRAINED.INIT_FROM) if cfg.PRETRAINED.INIT_FROM else None)
    if cfg.PRETRAINED.DDP_TRAINED and "PRETRAINED.DDP_TRAINED" in given:
        if start is None:
            raise UserError("--ddp_trained_weights is about a checkpoint: give --init_from or --resume too, or drop it")
        start.check_prefix(True)
    splits = open_splits(cfg)
    processes = init_distributed(cfg.DEVICE, tf32=cfg.TRAIN.TF32)
    set_up_logging(processes.rank)
    on_main(functools.partial(check_same, gather((resumed.path.name, resumed.extra["step"]) if resumed else None)))
    if not cfg.MODEL_ID:
        now = time.strftime("%Y%m%d-%H%M%S")
        what = f"{cfg.DATA.NAME}_{cfg.DATA.SPLIT_BY}".replace(",", "-")
        cfg.MODEL_ID = from_main(f"{what}_{cfg.MODEL.SWIN_TYPE}_{now}")
    model = build_model(cfg, resumed, start, swin, bert).to(processes.device)
    vocabulary = start.extra.get("vocabulary") if start else None
    check_vocabulary(splits.tokenizer, model.config["vocab_size"], vocabulary)
    if processes.world_size > 1 and processes.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    start = None  # what --init_from has read is copied: a model's and perhaps an optimizer's size of memory
    fit(cfg, model, splits, accum_steps, processes, resumed, may_be_done=args.auto_resume)


if __name__ == "__main__":
    run_command(main)
