"""Train CrossVLT.

    # two GPUs, the published recipe for RefCOCO
    python -m torch.distributed.launch --nproc_per_node 2 --master_port 12345 train.py --dataset refcoco \\
        --swin_type base --batch-size 6 --lr 0.00003 --wd 1e-2 --epochs 40 --img_size 480

    torchrun --nproc_per_node 2 train.py --dataset refcoco+           # the same by torchrun
    python train.py --dataset refcocog --splitBy umd -b 12            # one process
    python train.py --resume checkpoints/<model_id>/last.pth          # go on with a run

A run writes <output-dir>/<model_id>/{best,last}.pth and models/<model_id>/{train.log, config.yaml}.
"""

import functools
import logging
import re
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertTokenizer
from yacs.config import CfgNode

from bert.files import find_bert_file
from bert.tokenization import check_vocabulary, fingerprint, load_tokenizer
from CrossVLT import CrossVLT, build_crossvlt
from data.dataset_refer_bert import ReferDataset
from data.loaders import build_eval_loader, build_train_loader
from lib import config
from lib.checkpoint import Checkpoint, load_pretrained, load_weights, read_checkpoint, rebuild, save_checkpoint
from lib.criterion import CrossVLTCriterion
from lib.engine import broadcast_buffers, train_one_epoch, training_step
from lib.evaluation import evaluate
from lib.metrics import METRIC_NAMES
from lib.optim import build_lr_scheduler, build_optimizer, freeze, names_without_gradient
from refer.refer import REFER, check_dataset
from utils import (
    MissingFileError,
    Processes,
    UserError,
    derive_seed,
    from_main,
    on_main,
    run_command,
    set_up_logging,
    set_up_processes,
    written_aside,
)

LOG = logging.getLogger("crossvlt")

# What may change when a run is resumed; everything else is the recipe that the checkpoint was trained by.
CHANGEABLE = {
    "DATA.ROOT", "PRETRAINED.TOKENIZER", "TRAIN.EPOCHS", "TRAIN.STEPS", "OUTPUT_DIR", "LOG_DIR", "MODEL_ID",
    "PRINT_FREQ", "BATCH_SIZE", "WORKERS", "PIN_MEM", "DEVICE", "PRETRAINED.DDP_TRAINED",
}  # fmt: skip


def get_parser() -> config.Parser:
    def add_more(parser: config.Parser) -> None:
        parser.add_argument(
            "--resume", metavar="FILE", help="go on with a run from its last.pth, by its saved configuration"
        )

    return config.get_parser("train", __doc__, add_more)


def open_resumed(path: str) -> Checkpoint:
    """The checkpoint of a run to go on with.

    Raises:
        UserError: it has no optimizer state, so that going on would not be going on.
    """
    checkpoint = read_checkpoint(path)
    if not checkpoint.is_resumable:
        raise UserError(
            f"--resume {path}: no optimizer state in it, so the training can't go on where it was; "
            f"start a new one from its weights with --init_from {path}"
        )
    return checkpoint


def check_resumed(cfg: CfgNode, given: set[str], resumed: Checkpoint) -> None:
    """Refuse flags that contradict the recipe of the run that is resumed."""
    for key in sorted(given - CHANGEABLE):
        saved, now = resumed.extra["config"].get(key), config.lookup(cfg, key)
        if key == "MODEL.WINDOW_SIZE" and now:  # saved as 0 where the window came from a file's name
            saved = resumed.model_config["window_size"]
        if saved != now:
            raise UserError(
                f"--resume goes on with the saved recipe, where {key} is {saved!r}, not {now!r}: "
                "drop that flag, or start a new run with --init_from"
            )


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
    name = config.SWIN_FILES[cfg.MODEL.SWIN_TYPE]
    swin = Path(pretrained.SWIN or Path("pretrained") / name)
    if not swin.is_file():
        raise MissingFileError(
            f"no ImageNet Swin weights {swin}: download {config.SWIN_ADDRESS}{name} to there, name the file by "
            "--pretrained_swin_weights, or train with --from_scratch"
        )
    try:
        return swin, find_bert_file(pretrained.BERT, config.BERT_FILES, flag="--ck_bert")
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


def open_run(cfg: CfgNode, resumed: Checkpoint | None) -> Path:
    """Make the run's folders; gives back that of its checkpoints.

    Raises:
        UserError: a folder can't be made, or already holds another run.
    """
    if Path(cfg.MODEL_ID).name != cfg.MODEL_ID or cfg.MODEL_ID == "..":
        raise UserError(f"--model_id {cfg.MODEL_ID}: must be a plain name, it becomes a folder's")
    checkpoints, logs = Path(cfg.OUTPUT_DIR, cfg.MODEL_ID), Path(cfg.LOG_DIR, cfg.MODEL_ID)
    own = resumed is not None and resumed.path.resolve().parent == checkpoints.resolve()
    for name in ("last.pth", "best.pth"):
        if (checkpoints / name).exists() and not own:
            raise UserError(
                f"{checkpoints} already holds a run: choose another --model_id, or go on with it by "
                f"--resume {checkpoints / 'last.pth'}"
            )
    for folder in (checkpoints, logs):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"can't make the folder {folder}: {error.strerror}; choose another --model_id") from error
    set_up_logging(0, logs / "train.log")
    with written_aside(logs / "config.yaml") as aside:
        aside.write_text(cfg.dump(), encoding="utf-8")
    return checkpoints


def wrap(model: CrossVLT, processes: Processes) -> nn.Module:
    """DistributedDataParallel where there are several processes."""
    if processes.world_size == 1:
        return model
    if processes.device.type == "cuda":
        return DistributedDataParallel(model, device_ids=[processes.device.index])
    LOG.info("BatchNorm: ordinary, with rank 0's running statistics (SyncBatchNorm exists on CUDA only)")
    return DistributedDataParallel(model)


def open_splits(cfg: CfgNode) -> tuple[ReferDataset, ReferDataset, BertTokenizer]:
    """The training and validation split, and the tokenizer they are read with."""
    cfg.PRETRAINED.TOKENIZER = config.tokenizer_name(cfg, cfg.MODEL.VOCAB_SIZE)  # resolved: saved with the run
    tokenizer = load_tokenizer(cfg.PRETRAINED.TOKENIZER)
    refer = REFER(cfg.DATA.ROOT, cfg.DATA.NAME, cfg.DATA.SPLIT_BY)
    how = {"img_size": cfg.DATA.IMG_SIZE, "max_tokens": cfg.DATA.MAX_TOKENS, "seed": cfg.SEED}
    train_set = ReferDataset(refer, "train", tokenizer, draw_sentences=True, **how)
    return train_set, ReferDataset(refer, cfg.DATA.SPLIT, tokenizer, **how), tokenizer


def fit(
    cfg: CfgNode,
    model: CrossVLT,
    train_set: ReferDataset,
    val_set: ReferDataset,
    vocabulary: str,
    processes: Processes,
    resumed: Checkpoint | None,
) -> None:
    """Train to the last step, with a validation and a checkpoint after each epoch."""
    share = {"batch_size": cfg.BATCH_SIZE, "workers": cfg.WORKERS, "pin_memory": cfg.PIN_MEM}
    share |= {"rank": processes.rank, "world_size": processes.world_size}
    device = processes.device
    train_batches = build_train_loader(train_set, seed=cfg.SEED, **share)
    val_batches = build_eval_loader(val_set, **share)
    epoch, step, best = (resumed.extra[key] for key in ("epoch", "step", "best_oIoU")) if resumed else (0, 0, 0.0)
    total_steps = cfg.TRAIN.STEPS or step + max(0, cfg.TRAIN.EPOCHS - epoch) * len(train_batches)
    if step >= total_steps:
        raise UserError(f"this run has all its {step} steps done; ask for more by --epochs or --steps")
    if total_steps < cfg.TRAIN.WARMUP_STEPS:
        raise UserError(f"--warmup_steps {cfg.TRAIN.WARMUP_STEPS}: the whole training has {total_steps} steps")
    checkpoints = on_main(lambda: open_run(cfg, resumed))

    frozen = names_without_gradient(model, alignment=cfg.TRAIN.ALIGNMENT)
    freeze(model, frozen)
    optimizer = build_optimizer(model, cfg.TRAIN.LR, cfg.TRAIN.WEIGHT_DECAY, amsgrad=cfg.TRAIN.AMSGRAD)
    scheduler = build_lr_scheduler(optimizer, total_steps, cfg.TRAIN.WARMUP_STEPS)
    if resumed:
        optimizer.load_state_dict(resumed.extra["optimizer"])
        scheduler.load_state_dict(resumed.extra["scheduler"])
        for group, base, curve in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * curve(scheduler.last_epoch)  # the saved rate is another's where the length changed
        resumed.state_dict.clear()  # copied by now; a model's and an optimizer's size of memory
        del resumed.extra["optimizer"]
    LOG.info("%s: %.1f M parameters", cfg.MODEL_ID, sum(p.numel() for p in model.parameters()) / 1e6)
    LOG.info("not trained: %s", ", ".join(frozen))
    LOG.info(
        f"{len(train_set)} samples; steps {step}…{total_steps}, {len(train_batches)} per epoch; global "
        f"batch {processes.world_size * cfg.BATCH_SIZE} = {processes.world_size} × {cfg.BATCH_SIZE} on {device.type}"
    )
    wrapped = wrap(model, processes)
    do_step = functools.partial(
        training_step, wrapped, CrossVLTCriterion(cfg.TRAIN.ALIGNMENT), optimizer, scheduler,
        device=device, clip_grad=cfg.TRAIN.CLIP_GRAD,
    )  # fmt: skip
    validate = functools.partial(evaluate, model, device=device, log=LOG.debug)
    first = torch.utils.data.Subset(val_set, range(min(len(val_set), 2 * cfg.BATCH_SIZE * processes.world_size)))
    # Two batches now: better to stumble over the validation split at once than after an epoch.
    validate(build_eval_loader(first, **share), num_expressions=len(first))

    while step < total_steps:
        # Everything random in an epoch follows from its number: a resumed run draws what an uninterrupted one does.
        torch.manual_seed(derive_seed("epoch", cfg.SEED, epoch, processes.rank))
        train_set.set_epoch(epoch)
        train_batches.sampler.set_epoch(epoch)
        wrapped.train()
        means = train_one_epoch(
            do_step, train_batches, title=f"epoch {epoch + 1}", first_step=step, total_steps=total_steps,
            print_freq=cfg.PRINT_FREQ, log=LOG.debug, show_bar=processes.is_main,
        )  # fmt: skip
        epoch, step = epoch + 1, step + means["steps"]
        broadcast_buffers(model)
        title = f"{cfg.DATA.SPLIT} {epoch}" if processes.is_main else None
        metrics = validate(val_batches, num_expressions=len(val_set), progress=title).metrics
        told = "  ".join(f"{name} {metrics[name]:.2f}" for name in METRIC_NAMES)
        LOG.info("epoch %d: mean loss %.4f  %s: %s", epoch, means["loss"], cfg.DATA.SPLIT, told)
        is_best = metrics["oIoU"] > best or not (checkpoints / "best.pth").exists()
        best = max(best, metrics["oIoU"])
        content = {
            "model": model.state_dict(), "model_config": model.config, "config": config.flatten(cfg),
            "vocabulary": vocabulary, "epoch": epoch, "step": step, "metrics": metrics, "best_oIoU": best,
        }  # fmt: skip
        if from_main(is_best):
            on_main(functools.partial(save_checkpoint, checkpoints / "best.pth", content))
        content |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        on_main(functools.partial(save_checkpoint, checkpoints / "last.pth", content))
    LOG.info("done: best oIoU %.2f on %s, in %s", best, cfg.DATA.SPLIT, checkpoints / "best.pth")


def main() -> None:
    args = get_parser().parse_args()
    resumed = open_resumed(args.resume) if args.resume else None
    cfg, given = config.resolve(args, base=resumed.extra["config"] if resumed else None)
    if resumed:
        check_resumed(cfg, given, resumed)
    check_dataset(cfg.DATA.NAME, cfg.DATA.SPLIT_BY)
    swin, bert = (None, None) if resumed else find_pretrained(cfg)
    start = resumed or (read_checkpoint(cfg.PRETRAINED.INIT_FROM) if cfg.PRETRAINED.INIT_FROM else None)
    if cfg.PRETRAINED.DDP_TRAINED and "PRETRAINED.DDP_TRAINED" in given:
        if start is None:
            raise UserError("--ddp_trained_weights is about a checkpoint: give --init_from or --resume too, or drop it")
        start.check_prefix(True)
    train_set, val_set, tokenizer = open_splits(cfg)
    processes = set_up_processes(cfg.DEVICE)
    set_up_logging(processes.rank)
    if not cfg.MODEL_ID:
        now = time.strftime("%Y%m%d-%H%M%S")
        cfg.MODEL_ID = from_main(f"{cfg.DATA.NAME}_{cfg.DATA.SPLIT_BY}_{cfg.MODEL.SWIN_TYPE}_{now}")
    model = build_model(cfg, resumed, start, swin, bert).to(processes.device)
    check_vocabulary(tokenizer, model.config["vocab_size"], start.extra.get("vocabulary") if start else None)
    if processes.world_size > 1 and processes.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    fit(cfg, model, train_set, val_set, fingerprint(tokenizer), processes, resumed)


if __name__ == "__main__":
    run_command(main)
