"""Train CrossVLT.

    torchrun --nproc_per_node 2 train.py --cfg configs/refcoco.yaml             # the published recipe, two GPUs
    python train.py --cfg configs/one_24gb_gpu.yaml --dataset refcoco           # one GPU, the published global batch
    python train.py --dataset refcoco,refcoco+,refcocog --splitBy unc,unc,umd   # the union of several datasets
    python train.py --cfg configs/refcoco.yaml --model_id mine --auto_resume    # start the run, or resume it
    python train.py --resume checkpoints/<model_id>/last.pth                    # resume from a file

    # the command of the published code
    python -m torch.distributed.launch --nproc_per_node 2 --master_port 12345 train.py --dataset refcoco \\
        --swin_type base --batch-size 6 --lr 0.00003 --wd 1e-2 --epochs 40 --img_size 480

Output: <output-dir>/<model_id>/{best,last}.pth and models/<model_id>/{train.log, metrics.jsonl, config.yaml,
environment.json, tensorboard/}. Exit status: 0 success; 1 a bug or a process that died; 2 a user's mistake; 75 stopped
by a signal (SIGTERM, SIGINT, SIGUSR1, SIGHUP) after saving a checkpoint.
"""

from functools import partial

from lib.cli import Parser, run_command
from lib.config import flatten, get_parser, load_config
from lib.errors import UserError


def add_arguments(parser: Parser) -> None:
    parser.add_input(
        "--resume",
        must_exist=True,
        metavar="FILE",
        help="continue a run from its last.pth with its saved configuration",
    )
    parser.add_argument(
        "--auto_resume",
        action="store_true",
        help="continue the run --model_id from its newest intact checkpoint, or start it if there is none",
    )


def main() -> None:
    args = get_parser("train", __doc__, add_arguments).parse_args()
    cfg, given = load_config(args)

    # Heavy imports come after parsing, so that --help and typos are answered at once.
    import torch

    from bert.tokenization import fingerprint, save_form
    from data.loaders import build_train_loader
    from data.transforms import preprocessing
    from lib.criterion import CrossVLTCriterion
    from lib.engine.build import agree_on_run, build_datasets, build_model, build_tokenizer, load_recipe, wrap_model
    from lib.engine.checkpoints import BEST
    from lib.engine.loop import train_one_epoch
    from lib.engine.preflight import check_disk_space, time_training
    from lib.engine.run import Run
    from lib.engine.state import build_train_state, restore_random_states
    from lib.engine.validation import time_validation, validate
    from lib.evaluation import EvalSetup
    from lib.precision import compile_blocks
    from lib.report.figures import draw_validation
    from utils import LOGGER, init_distributed, launched_rank, on_main, set_up_logging

    # A user's mistakes are reported before any folder is created.
    set_up_logging(launched_rank())
    cfg, start = load_recipe(args, cfg, given)  # start: the weights or checkpoint to start from
    tokenizer = build_tokenizer(cfg, start)
    train_set, val_set = build_datasets(cfg, tokenizer)

    distributed = init_distributed(cfg.DEVICE, tf32=cfg.TRAIN.TF32, saved_threads=start.saved_threads)
    set_up_logging(distributed.rank)
    agree_on_run(cfg, start.resumed)
    on_main(train_set.check_images)
    on_main(val_set.check_images)
    train_loader = build_train_loader(
        train_set,
        distributed.device,
        batch_size=cfg.BATCH_SIZE,
        accum_steps=start.accum_steps,
        workers=cfg.WORKERS,
        rank=distributed.rank,
        world_size=distributed.world_size,
        seed=cfg.SEED,
        pin_memory=cfg.PIN_MEM,
    )

    model = build_model(cfg, start, tokenizer, distributed)
    criterion = CrossVLTCriterion(cfg.TRAIN.ALIGNMENT, cfg.TRAIN.SEGMENTATION_WEIGHT)
    state = build_train_state(model, cfg.TRAIN, train_loader.steps_per_epoch, start.resumed)
    if state.is_finished:
        message = f"All {state.step} steps of this run are done. Pass a larger --epochs or --steps to continue."
        if not args.auto_resume:
            raise UserError(message)
        LOGGER.info(message)
        return

    constants = {  # saved in every checkpoint together with the state
        "model_name": cfg.MODEL.NAME,
        "model_config": model.config,
        "config": flatten(cfg),
        "vocabulary": fingerprint(tokenizer),
        "tokenizer": save_form(tokenizer),
        "preprocessing": preprocessing(cfg.DATA.IMG_SIZE, cfg.DATA.MAX_TOKENS),
        # The division of the global batch.
        "share": [distributed.world_size, cfg.BATCH_SIZE, start.accum_steps],
        "threads": torch.get_num_threads(),
    }
    with Run.open(cfg, distributed, constants, start.resumed) as run:
        run.log_start(state, num_samples=len(train_set))
        check_disk_space(state, run.checkpoints.folder, cfg.TRAIN.KEEP)
        model.set_grad_checkpointing(cfg.TRAIN.GRAD_CHECKPOINT)
        if cfg.TRAIN.COMPILE:
            compile_blocks(model.blocks())
        eval_setup = EvalSetup(distributed, cfg.BATCH_SIZE, cfg.WORKERS, cfg.PIN_MEM, run.signals.stop_requested)
        validation_seconds = time_validation(model, val_set, eval_setup)
        ddp_model = wrap_model(model, distributed)
        first_batch = next(train_loader.steps(state.epoch))[0]
        run.log_expected_times(
            state, time_training(ddp_model, criterion, first_batch, cfg.TRAIN.AMP), validation_seconds
        )
        if start.resumed and state.epoch_step:  # the run continues within an epoch
            restore_random_states(start.resumed.extra["random"][distributed.rank])
        run.begin(state)

        for _ in state.remaining_epochs():
            with run.saving_on_stop(state):
                train_one_epoch(ddp_model, criterion, train_loader, state, run)
                result = validate(state.eval_model, val_set, eval_setup)
            run.end_epoch(state, result, draw=partial(draw_validation, val_set, result))
    LOGGER.info("Done. Best oIoU %.2f on %s: %s", state.best_oIoU, cfg.DATA.SPLIT, run.checkpoints.folder / BEST)


if __name__ == "__main__":
    run_command(main)
