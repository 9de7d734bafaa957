"""Signals that stop a training or an evaluation after saving its work."""

import signal
import time
from types import FrameType

from utils import STOP_SIGNALS, sum_over_processes

# A process can receive the same Ctrl-C twice, from the terminal and from torchrun.
SECONDS_BEFORE_SECOND_INTERRUPT = 2.0


class StopSignals:
    """Context manager (main thread only) that records ``STOP_SIGNALS`` instead of ending the process.

    A SIGHUP that was ignored before, as under ``nohup``, remains ignored.

    A second SIGINT, more than two seconds after the first signal, raises KeyboardInterrupt.

    Attributes:
        received: name of the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous_handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        is_second = self.received and now - self._received_at > SECONDS_BEFORE_SECOND_INTERRUPT
        if is_second and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._received_at = signal.Signals(number).name, now

    def stop_requested(self) -> bool:
        """Return whether any process received a signal. Collective: all processes call it and get the same answer."""
        return sum_over_processes([float(self.received is not None)])[0] > 0
