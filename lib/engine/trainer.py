"""The training of a run: epochs of steps, validation, checkpoints, and leaving so that it can be gone on with."""

import logging
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from tqdm import tqdm

from lib.checkpoint import save_checkpoint
from lib.engine.checkpoints import BEST, CheckpointFolder
from lib.engine.control import Control
from lib.engine.progress import Meter, Progress, random_states, seed_everything
from lib.engine.step import NonFiniteError, TrainingStep
from lib.errors import StoppedError, UserError
from lib.evaluation import Batch, EvaluationResult
from lib.journal import Journal
from lib.metrics import METRIC_NAMES
from utils import Distributed, derive_seed, from_main, gather, on_main

LOG = logging.getLogger("crossvlt")


class Trainer:
    """Takes a run from where ``progress`` says it is to its last step.

    Args:
        model: unwrapped: what is saved.
        step: does the optimizer steps.
        micro_batches: of this process; what it iterates over follows from ``set_position``.
        set_position: (epoch, first step): called before ``micro_batches`` is iterated.
        accum_steps: micro-batches per step.
        steps_per_epoch, total_steps: optimizer steps.
        validate: judges a model; called by all processes.
        draw: pictures of a validation for the journal, by name.
        progress: where the run is; brought forward.
        control: entered by the caller.
        checkpoints: written to by the main process.
        journal: of the main process; another's writes nothing.
        logs: the folder of the run's logs, for what is worth looking at after a failure.
        constants: what every checkpoint holds and no step changes.
        split: validated on.
        seed: everything random in an epoch follows from it, the epoch and the process's rank.
        print_freq: steps between lines.
        processes: this one among those working together.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        step: TrainingStep,
        micro_batches: Iterable[Batch],
        set_position: Callable[[int, int], None],
        accum_steps: int,
        steps_per_epoch: int,
        total_steps: int,
        validate: Callable[[nn.Module], EvaluationResult],
        draw: Callable[[EvaluationResult], dict[str, Image.Image]],
        progress: Progress,
        control: Control,
        checkpoints: CheckpointFolder,
        journal: Journal,
        logs: Path,
        constants: dict[str, Any],
        split: str,
        seed: int,
        print_freq: int,
        processes: Distributed,
    ) -> None:
        self.model, self.step, self.ema = model, step, step.ema
        self.micro_batches, self.set_position, self.accum_steps = micro_batches, set_position, accum_steps
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.validate, self.draw, self.split = validate, draw, split
        self.progress, self.control, self.checkpoints = progress, control, checkpoints
        self.journal, self.logs, self.constants = journal, logs, constants
        self.seed, self.print_freq, self.processes = seed, print_freq, processes

    def run(self) -> None:
        """Train to the last step, with a validation and a checkpoint after each epoch.

        Raises:
            StoppedError: a signal asked for the end; everything is saved.
            UserError: a loss became inf or nan, a picture can't be read, the disk is full, the GPU's memory too small.
        """
        progress = self.progress
        if progress.step == 0:
            self._save(ends_epoch=True)  # shows that the disk takes it, before hours of work depend on that
        while progress.step < self.total_steps or progress.epoch_step:
            self._train_epoch()
            self._validate()

    def _train_epoch(self) -> None:
        """The rest of an epoch, up to its last step or the run's."""
        progress = self.progress
        number = min(self.steps_per_epoch - progress.epoch_step, self.total_steps - progress.step)
        if progress.epoch_step == 0:
            # A run that is resumed here draws what an uninterrupted one does; inside an epoch the states are restored.
            seed_everything(derive_seed("epoch", self.seed, progress.epoch, self.processes.rank))
            progress.recent, progress.whole = Meter(), Meter()
        if number <= 0:
            return
        self.set_position(progress.epoch, progress.epoch_step)
        self.step.model.train()
        title = f"epoch {progress.epoch + 1}"
        bar = tqdm(
            total=progress.epoch_step + number, initial=progress.epoch_step, desc=title, leave=False, unit="step",
            disable=None if self.processes.is_main else True,
        )  # fmt: skip
        began, lines_from = time.perf_counter(), progress.step
        try:
            for count, batches in enumerate(self._grouped(), 1):
                values = self._one_step(batches)
                bar.update()
                if "loss" in values:
                    bar.set_postfix_str(f"loss {values['loss']:.3f}")
                if progress.epoch_step % self.print_freq == 0 or count == number:
                    seconds = (time.perf_counter() - began) / (progress.step - lines_from)
                    self._tell(title, seconds, samples=sum(len(batch["index"]) for batch in batches))
                    began, lines_from = time.perf_counter(), progress.step
                stop, save = self.control.after_step(progress.step, is_main=self.processes.is_main)
                if stop:
                    self._leave()
                if count == number:
                    break
                if save:
                    self._save(ends_epoch=False)
        finally:
            bar.close()

    def _grouped(self) -> Iterator[list[Batch]]:
        """``accum_steps`` micro-batches at a time."""
        group = []
        for batch in self.micro_batches:
            group.append(batch)
            if len(group) == self.accum_steps:
                yield group
                group = []

    def _one_step(self, batches: list[Batch]) -> dict[str, float]:
        progress = self.progress
        try:
            values = self.step(batches)
        except NonFiniteError as error:
            self._report_non_finite(error, batches)
        progress.step += 1
        progress.epoch_step += 1
        progress.skipped += int(values.get("skipped", 0))
        progress.recent.add(values)
        progress.whole.add(values)
        return values

    def _report_non_finite(self, error: NonFiniteError, batches: list[Batch]) -> None:
        """Save what led there, and end all processes with one line about it."""
        rank, step = self.processes.rank, self.progress.step + 1
        everyone = gather((error.own, [batch["index"].tolist() for batch in batches], str(error)))
        causes = [i for i, (own, _, _) in enumerate(everyone) if own] or list(range(len(everyone)))
        told = ""
        if rank in causes:
            path = self.logs / f"non_finite_step_{step:08d}_rank_{rank}.pt"
            content = {"step": step, "batches": [{name: value.cpu() for name, value in b.items()} for b in batches]}
            if rank == causes[0]:
                content["model"] = self.model.state_dict()
            try:
                save_checkpoint(path, content)
                told = f"batch{' and weights' if 'model' in content else ''} saved in {path}"
            except UserError as failure:
                told = str(failure)
        told = "; ".join(filter(None, gather(told)))

        def tell() -> None:
            samples = [index for i in causes for batch in everyone[i][1] for index in batch]
            raise UserError(
                f"epoch {self.progress.epoch + 1}, step {step}: {everyone[causes[0]][2]} on samples {samples}; {told}: "
                "lower --lr, or set --warmup_steps or --clip_grad"
            )

        on_main(tell)

    def _tell(self, title: str, seconds: float, samples: int) -> None:
        """A line for the log and one for the journal, over the steps since the last."""
        progress = self.progress
        values = progress.recent.means()
        skipped = int(progress.recent.total("skipped"))
        values.pop("skipped", None)
        speed = samples * self.processes.world_size / seconds
        LOG.debug(
            "%s step %d/%d  %s  %.2f s/step%s",
            title, progress.step, self.total_steps, _line(values), seconds, f"  {skipped} skipped" if skipped else "",
        )  # fmt: skip
        values |= {
            "samples_per_second": speed,
            "memory_gib": peak_memory_gib(self.processes.device),
            "skipped": skipped,
        }
        on_main(lambda: self.journal.write("train", progress.step, {"epoch": progress.epoch + 1, **values}))
        progress.recent = Meter()

    def _validate(self) -> None:
        """Judge the model, note whether it is the best so far, and close the epoch with a checkpoint."""
        progress, judged = self.progress, self.ema.module if self.ema else self.model
        broadcast_buffers(self.model)
        if self.ema:
            broadcast_buffers(judged)
        try:
            result = self.validate(judged)
        except StoppedError:
            self._leave()
        metrics = result.metrics
        progress.epoch, progress.epoch_step, progress.metrics = progress.epoch + 1, 0, metrics
        means = progress.whole.means()
        losses = {"train_loss": means["loss"]} if "loss" in means else {}
        told = "  ".join(f"{name} {metrics[name]:.2f}" for name in METRIC_NAMES)
        mean = "".join(f"mean loss {loss:.4f}  " for loss in losses.values())
        skipped = f"  ({progress.skipped} steps skipped so far)" if progress.skipped else ""
        LOG.info("epoch %d: %s%s: %s%s", progress.epoch, mean, self.split, told, skipped)
        on_main(lambda: self._journal_validation(result, losses))
        is_first = from_main(not (self.checkpoints.folder / BEST).exists())
        if is_first or metrics["oIoU"] > progress.best_oIoU:
            progress.best_oIoU = metrics["oIoU"]
            content = {**self.constants, **progress.state_dict(), "model": judged.state_dict()}
            on_main(lambda: self.checkpoints.save_best(content))
        self._save(ends_epoch=True)

    def _journal_validation(self, result: EvaluationResult, losses: dict[str, float]) -> None:
        progress = self.progress
        values = {"epoch": progress.epoch, "split": self.split, **losses, **result.metrics}
        self.journal.write("eval", progress.step, values)
        if self.journal.accepts_images:
            for name, picture in self.draw(result).items():
                self.journal.draw(name, picture, progress.step)

    def _save(self, *, ends_epoch: bool) -> None:
        """A checkpoint of everything that going on from here exactly needs."""
        content = {
            **self.constants,
            **self.progress.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scheduler": self.step.scheduler.state_dict(),
            "scaler": self.step.precision.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "random": gather(random_states()),
        }
        on_main(lambda: self.checkpoints.save(content, ends_epoch=ends_epoch))
        self.control.saved()

    def _leave(self) -> NoReturn:
        self._save(ends_epoch=False)
        raise StoppedError(
            f"{self.control.received or 'a signal to another process'}: stopped at step {self.progress.step} with "
            f"everything saved in {self.checkpoints.folder}; the same command with --auto_resume goes on"
        )


def _line(means: dict[str, float]) -> str:
    if "loss" not in means:
        return "no step taken"
    alignment = [value for name, value in means.items() if name.startswith("alignment")]
    shown = f"loss {means['loss']:.4f}  segmentation {means['segmentation']:.4f}"
    if alignment:
        shown += "  alignment " + " ".join(f"{value:.3f}" for value in alignment)
    return f"{shown}  lr {means['lr']:.3g}  grad norm {means['grad_norm']:.2f}"


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has used so far: the GPU's allocations, or on a CPU the resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the main one's buffers: BatchNorm's running statistics, where they are not synchronised."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
