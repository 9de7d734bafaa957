"""When to save and when to leave: signals and the clock, so that all processes decide alike."""

import signal
import time
from types import FrameType

import torch.distributed as dist

from utils import sum_over_processes

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS_UNTIL_IMPATIENT = 2.0  # torchrun passes Ctrl-C on, so that a process can get the same one twice


class Control:
    """Notices signals while it is entered (main thread only), and tells when a checkpoint is due.

    SIGTERM, SIGINT and SIGUSR1 set ``received``; a second SIGINT some seconds later interrupts at once.

    Args:
        save_steps: a checkpoint every so many steps; 0: not by steps.
        save_minutes: a checkpoint every so many minutes of the main process's clock; 0: not by the clock.
        group: for exchanging numbers between processes (:func:`utils.cpu_group`).
    """

    def __init__(self, save_steps: int, save_minutes: float, group: dist.ProcessGroup | None = None) -> None:
        self.save_steps, self.save_seconds, self.group = save_steps, 60 * save_minutes, group
        self.received: str | None = None
        self._received_at = self._saved_at = time.monotonic()
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Control":
        self._before = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and number == signal.SIGINT and now - self._received_at > SECONDS_UNTIL_IMPATIENT:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._received_at = signal.Signals(number).name, now

    def stop_requested(self) -> bool:
        """Whether any process got a signal; to be called by all of them together."""
        return sum_over_processes([float(self.received is not None)], self.group)[0] > 0

    def after_step(self, step: int, *, is_main: bool) -> tuple[bool, bool]:
        """(stop, save): whether any process got a signal, whether a checkpoint is due; the same on all processes."""
        by_clock = is_main and 0 < self.save_seconds <= time.monotonic() - self._saved_at
        stop, save = sum_over_processes([float(self.received is not None), float(by_clock)], self.group)
        return stop > 0, save > 0 or (self.save_steps > 0 and step % self.save_steps == 0)

    def saved(self) -> None:
        """The clock starts anew."""
        self._saved_at = time.monotonic()
