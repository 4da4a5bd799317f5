"""Stopping and saving on request, by signals or files, which the training loop handles after each step."""

from __future__ import annotations

import signal
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType

# From Ctrl-C; from schedulers before a job ends; from SLURM, as requested with --signal=USR1.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
KILL_FILE, SAVE_FILE = "kill", "save"


class StopReason(IntEnum):
    """The stop or save request of a run; if ranks differ, the greatest one counts."""

    NONE = 0
    SAVE = 1  # the file RUN/save: save and continue
    SIGNAL = 2  # a stop signal: save and stop, to be resumed later
    KILL = 3  # the file RUN/kill: save and stop for good

    @property
    def stops(self) -> bool:
        """True if the request ends the run."""
        return self >= StopReason.SIGNAL

    @property
    def origin(self) -> str:
        """The origin of the request, for the job log."""
        return {StopReason.SAVE: f"RUN/{SAVE_FILE}", StopReason.KILL: f"RUN/{KILL_FILE}"}.get(
            self, "a signal"
        )


class StopRequest:
    """A context manager in which stop signals set `received` instead of ending the process.

    A second Ctrl-C ends the process at once.

    Args:
        run: the run folder, in which the files `kill` and `save` are looked up; None on all ranks but one.
    """

    def __init__(self, run: Path | None = None) -> None:
        self.received: signal.Signals | None = None
        self._files = (
            {} if run is None else {StopReason.KILL: run / KILL_FILE, StopReason.SAVE: run / SAVE_FILE}
        )

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wish(self) -> StopReason:
        """Return the strongest request that this rank has received so far."""
        found = [wish for wish, file in self._files.items() if file.exists()]
        if self.received is not None:
            found.append(StopReason.SIGNAL)
        return max(found, default=StopReason.NONE)

    def acknowledge(self, wish: StopReason) -> None:
        """Remove the file behind a request that was carried out, so that it is not repeated."""
        if wish in self._files:
            self._files[wish].unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
