"""A training run: its folders and everything written there (log, metrics, checkpoints), when to save and to stop."""

import logging
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from PIL import Image
from tqdm import tqdm
from yacs.config import CfgNode

from data.loaders import Batch
from lib.checkpoint import Checkpoint, save_checkpoint
from lib.engine.checkpoints import BEST, CheckpointFolder
from lib.engine.folders import check_logs, continues_in, find_run_id, lock_folder, run_folders
from lib.engine.journal import ENVIRONMENT_FILE, Journal, write_environment
from lib.engine.signals import StopSignals
from lib.engine.state import Meter, TrainState, random_states, seed_everything
from lib.errors import LostWorkerError, StoppedError, UserError
from lib.evaluation import EvaluationResult
from lib.files import release, write_text
from lib.locks import Lock
from lib.metrics import METRIC_NAMES
from lib.terminal import draws_bars
from utils import (
    Distributed,
    continue_without,
    derive_seed,
    float32_precision,
    from_main,
    gather,
    on_main,
    set_up_logging,
    sum_over_processes,
)

LOG = logging.getLogger("crossvlt")


class NonFiniteError(FloatingPointError):
    """A loss or gradient is inf or nan; no weight was updated. ``caused_here``: by the samples of this process."""

    def __init__(self, message: str, caused_here: bool) -> None:
        super().__init__(message)
        self.caused_here = caused_here


class Run:
    """One training run: its folders, log, metrics.jsonl, TensorBoard files, checkpoints and signal handlers.

    It decides when to save and when to stop, identically on all processes. It knows nothing about the network. Use it
    as a context manager; :meth:`open` creates the folders.

    Args:
        cfg: the configuration.
        distributed: rank and device of this process.
        constants: entries that every checkpoint contains besides the state: configuration, vocabulary, …
        from_step: step of the checkpoint that the run resumes from, or 0.
    """

    def __init__(self, cfg: CfgNode, distributed: Distributed, constants: dict[str, Any], from_step: int = 0) -> None:
        self.cfg, self.distributed, self.constants = cfg, distributed, constants
        folder, self.logs = run_folders(cfg)
        self.checkpoints = CheckpointFolder(folder, cfg.TRAIN.KEEP, from_step)
        self.journal = Journal(self.logs if distributed.is_main else None)
        self.signals = StopSignals()
        self._locks: list[Lock] = []  # of the main process
        self._exit_stack = ExitStack()
        self._bar: tqdm | None = None
        self._saved_at = self._logged_at = time.monotonic()
        self._logged_step = 0

    @classmethod
    def open(
        cls, cfg: CfgNode, distributed: Distributed, constants: dict[str, Any], resumed: Checkpoint | None
    ) -> "Run":
        """Create the folders of a new run, or open those of the resumed one, lock them, and start the log.

        Raises:
            UserError: a folder cannot be created, contains another run, or is in use by another training.
        """
        run = cls(cfg, distributed, constants, from_step=resumed.extra["step"] if resumed else 0)
        on_main(lambda: run._open_folders(resumed))
        return run

    def _open_folders(self, resumed: Checkpoint | None) -> None:
        with ExitStack() as stack:
            self._locks.append(stack.enter_context(lock_folder(self.checkpoints.folder, "--output-dir")))
            self.constants["run_id"] = find_run_id(self.checkpoints.folder, resumed)
            if self.logs.resolve() != self.checkpoints.folder.resolve():
                self._locks.append(stack.enter_context(lock_folder(self.logs, "--log_dir")))
            continues = continues_in(self.checkpoints.folder, resumed)
            check_logs(self.logs, self.constants["run_id"], is_new=not continues)
            if continues:
                release(self.checkpoints.folder, self.logs)
            set_up_logging(0, self.logs / "train.log")
            write_text(self.logs / "config.yaml", self.cfg.dump())
            write_environment(
                self.logs / ENVIRONMENT_FILE,
                run_id=self.constants["run_id"],
                from_step=self.checkpoints.from_step,
                processes=self.distributed.world_size,
            )
            self.checkpoints.delete_partial_files()
            self._exit_stack = stack.pop_all()

    def __enter__(self) -> "Run":
        self.signals.__enter__()
        continue_without("stdout")  # a closed terminal or pipe does not end the training
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self.journal.close()
        self.signals.__exit__(*exception)
        self._exit_stack.close()

    def _write(self, function: Callable[[], Any]) -> None:
        """Call ``function``, which writes files of the run, on the main process while it holds the locks.

        Raises:
            UserError: a lock file was deleted, so that another training can have started; or raised by ``function``.
        """

        def check_and_write() -> None:
            for held in self._locks:
                if held.is_lost():
                    set_up_logging(0)  # closes train.log
                    raise UserError(
                        f"{held.path} was deleted. Another training may be writing this folder now, therefore this one "
                        "ends. Run the same command with --auto_resume to continue from the last checkpoint."
                    )
            function()

        on_main(check_and_write)

    def log_start(self, state: TrainState, num_samples: int) -> None:
        """Log what is trained and how the batch is divided."""
        cfg, (processes, batch_size, accum_steps) = self.cfg, self.constants["share"]
        if state.step:
            LOG.info("Resumed at epoch %d, step %d", state.epoch + 1, state.step)
        LOG.info("%s: %.1f M parameters", cfg.MODEL_ID, sum(p.numel() for p in state.model.parameters()) / 1e6)
        LOG.info(
            f"{num_samples} samples; steps {state.step} to {state.total_steps}, {state.steps_per_epoch} per epoch; "
            f"global batch {cfg.TRAIN.GLOBAL_BATCH} = {processes} process(es) × {batch_size} × {accum_steps} "
            f"accumulated on {self.distributed.device.type}"
        )

    def log_expected_times(self, state: TrainState, seconds_per_pass: float, validation_seconds: float) -> None:
        """Log the expected duration of an epoch."""
        training_seconds = seconds_per_pass * self.constants["share"][2] * state.steps_per_epoch
        LOG.info(
            f"Expected per epoch: {format_duration(training_seconds)} training, {format_duration(validation_seconds)} "
            "validation, without data loading"
        )

    def begin(self, state: TrainState) -> None:
        """Open metrics.jsonl, and save the first checkpoint of a new run.

        The first checkpoint tests the disk before any training, and can be resumed with any division of the batch.
        """
        self._write(lambda: self.journal.begin(state.step, validated=state.epoch_step == 0))
        if state.step == 0:
            self.save(state, ends_epoch=True)

    @contextmanager
    def saving_on_stop(self, state: TrainState) -> Iterator[None]:
        """Save a checkpoint if the block is stopped by a signal or loses a data-loading worker.

        With several processes, a lost worker ends the run without saving, because the others cannot take part.
        """
        try:
            yield
        except StoppedError as error:
            self.save(state, ends_epoch=False)
            raise StoppedError(
                f"{self.signals.received or 'Signal to another process'}: stopped at step {state.step}, everything is "
                f"saved in {self.checkpoints.folder}. Run the same command with --auto_resume to continue."
            ) from error
        except LostWorkerError as error:
            saved = "The last checkpoint is"
            if self.distributed.world_size == 1:
                self.save(state, ends_epoch=False)
                saved = f"Everything up to step {state.step} is saved"
            folder = self.checkpoints.folder
            raise LostWorkerError(f"{error} {saved} in {folder}: continue with --auto_resume.") from error

    def begin_epoch(self, state: TrainState) -> None:
        """Prepare logging. Seed all random generators, unless the run continues within the epoch."""
        if state.epoch_step == 0:
            seed_everything(derive_seed("epoch", self.cfg.SEED, state.epoch, self.distributed.rank))
            state.recent, state.whole = Meter(), Meter()
        self._bar = tqdm(
            total=state.epoch_step + state.remaining_steps(),
            initial=state.epoch_step,
            desc=f"epoch {state.epoch + 1}",
            leave=False,
            unit="step",
            disable=not (self.distributed.is_main and draws_bars()),
        )
        self._logged_at, self._logged_step = time.monotonic(), state.step

    def after_step(self, state: TrainState, losses: dict[str, float], *, num_samples: int) -> None:
        """Log the step, save a checkpoint if one is due, and stop if a signal was received by any process.

        Raises:
            StoppedError: :meth:`saving_on_stop` saves.
        """
        is_last = state.remaining_steps() == 0
        self._bar.update()
        if "loss" in losses:
            self._bar.set_postfix_str(f"loss {losses['loss']:.3f}")
        if is_last or state.epoch_step % self.cfg.PRINT_FREQ == 0:
            self._log_step(state, num_samples)
        stop, save = self._stop_and_save(state.step)
        if stop:
            raise StoppedError
        if is_last:  # the checkpoint after the validation follows
            self._bar.close()
        elif save:
            self.save(state, ends_epoch=False)

    def _stop_and_save(self, step: int) -> tuple[bool, bool]:
        """Return whether to stop and whether a checkpoint is due; the same on all processes, with one exchange."""
        interval = 60 * self.cfg.TRAIN.SAVE_MINUTES
        save_by_clock = self.distributed.is_main and 0 < interval <= time.monotonic() - self._saved_at
        save_by_step = self.cfg.TRAIN.SAVE_STEPS > 0 and step % self.cfg.TRAIN.SAVE_STEPS == 0
        stop, save = sum_over_processes([float(self.signals.received is not None), float(save_by_clock)])
        return stop > 0, save > 0 or save_by_step

    def _log_step(self, state: TrainState, num_samples: int) -> None:
        """Log the means since the last log line."""
        seconds = (time.monotonic() - self._logged_at) / (state.step - self._logged_step)
        self._logged_at, self._logged_step = time.monotonic(), state.step
        means, skipped = state.recent.means(), int(state.recent.total("skipped"))
        means.pop("skipped", None)
        state.recent = Meter()
        position = f"epoch {state.epoch + 1} step {state.step}/{state.total_steps}"
        suffix = f"  {skipped} skipped" if skipped else ""
        text = f"{position}  {_format_losses(means)}  {seconds:.2f} s/step{suffix}"
        means |= {
            "samples_per_second": num_samples * self.distributed.world_size / seconds,
            "memory_gib": peak_memory_gib(self.distributed.device),
            "skipped": skipped,
        }
        self._write(lambda: self.journal.write("train", state.step, {"epoch": state.epoch + 1, **means}))
        LOG.debug(text)

    def end_epoch(
        self, state: TrainState, result: EvaluationResult, draw: Callable[[], dict[str, Image.Image]]
    ) -> None:
        """Log the validation, save the best weights and a checkpoint, and advance to the next epoch.

        Args:
            state: updated in place.
            result: of the validation.
            draw: returns images for TensorBoard by name; called on the main process, if TensorBoard is installed.
        """
        state.epoch, state.epoch_step, state.metrics = state.epoch + 1, 0, result.metrics
        means, metrics = state.whole.means(), result.metrics
        mean_loss = f"mean loss {means['loss']:.4f}  " if "loss" in means else ""
        values = "  ".join(f"{name} {metrics[name]:.2f}" for name in METRIC_NAMES)
        skipped = f"  ({state.skipped} steps skipped so far)" if state.skipped else ""
        precision = float32_precision(self.distributed.device)
        LOG.info("epoch %d: %s%s in %s: %s%s", state.epoch, mean_loss, self.cfg.DATA.SPLIT, precision, values, skipped)
        losses = {"train_loss": means["loss"]} if "loss" in means else {}
        entry = {"epoch": state.epoch, "split": self.cfg.DATA.SPLIT, "precision": precision, **losses, **metrics}
        self._write(lambda: self.journal.write("eval", state.step, entry, draw))
        is_first = from_main(not (self.checkpoints.folder / BEST).exists())
        if is_first or metrics["oIoU"] > state.best_oIoU:
            state.best_oIoU = metrics["oIoU"]
            content = {**self.constants, **state.position(), "model": state.eval_model.state_dict()}
            self._write(lambda: self.checkpoints.save_best(content))
        self.save(state, ends_epoch=True)

    def save(self, state: TrainState, *, ends_epoch: bool) -> None:
        """Save a checkpoint with everything that an exact continuation needs."""
        content = {**self.constants, **state.state_dict(), "random": gather(random_states())}
        self._write(lambda: self.checkpoints.save(content, ends_epoch=ends_epoch))
        self._saved_at = time.monotonic()

    def report_non_finite(self, error: NonFiniteError, state: TrainState, micro_batches: Sequence[Batch]) -> NoReturn:
        """Save the batches and weights that led to inf or nan, then raise a UserError on the main process."""
        rank, step = self.distributed.rank, state.step + 1
        reports = gather((error.caused_here, [batch["index"].tolist() for batch in micro_batches], str(error)))
        causes = [i for i, (caused_here, _, _) in enumerate(reports) if caused_here] or list(range(len(reports)))
        saved = ""
        if rank in causes:
            path = self.logs / f"non_finite_step_{step:08d}_rank_{rank}.pt"
            content: dict[str, Any] = {"step": step, "batches": [_to_cpu(batch) for batch in micro_batches]}
            if rank == causes[0]:
                content["model"] = state.model.state_dict()
            try:
                save_checkpoint(path, content)
                saved = f"Batch{' and weights' if 'model' in content else ''} saved in {path}."
            except UserError as failure:
                saved = str(failure)
        saved = " ".join(filter(None, gather(saved)))

        def fail() -> None:
            samples = [index for i in causes for indices in reports[i][1] for index in indices]
            raise UserError(
                f"Epoch {state.epoch + 1}, step {step}: {reports[causes[0]][2]} on samples {samples}. {saved} "
                "Lower --lr, or set --warmup_steps or --clip_grad."
            )

        on_main(fail)
        raise AssertionError("on_main raises or exits on every process")


def _to_cpu(batch: Batch) -> Batch:
    return {name: value.cpu() for name, value in batch.items()}


def _format_losses(means: dict[str, float]) -> str:
    if "loss" not in means:
        return "all steps skipped"
    alignment = " ".join(f"{value:.3f}" for name, value in means.items() if name.startswith("alignment"))
    others = [name for name in means if not name.startswith("alignment") and name not in ("lr", "grad_norm")]
    parts = [f"{name} {means[name]:.4f}" for name in others] + ([f"alignment {alignment}"] if alignment else [])
    return "  ".join([*parts, f"lr {means['lr']:.3g}", f"grad norm {means['grad_norm']:.2f}"])


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: the GPU's allocations, or on a CPU the resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def format_duration(seconds: float) -> str:
    """Return a duration as text: ``40 s``, ``12 min``, ``3.5 h``."""
    for unit, size, digits in (("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
