"""Stopping on request: signals only set a flag; the loop saves at the end of the step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

# Ctrl-C; what schedulers send before the end; what SLURM users ask for with --signal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Context in which the stop signals set `received` instead of ending the process.

    A second Ctrl-C ends it at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
