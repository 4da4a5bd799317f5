"""Stopping and saving on request: signals and files only leave a wish; the loop grants it after the step."""

from __future__ import annotations

import signal
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType

# Ctrl-C; what schedulers send before the end; what SLURM users ask for with --signal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
KILL_FILE, SAVE_FILE = "kill", "save"


class Wish(IntEnum):
    """What somebody asked of the run; of several ranks' wishes the greatest counts."""

    NONE = 0
    SAVE = 1  # the file RUN/save: save and go on
    SIGNAL = 2  # a stop signal: save and stop, to be started again
    KILL = 3  # the file RUN/kill: save and stop for good

    @property
    def stops(self) -> bool:
        return self >= Wish.SIGNAL

    @property
    def origin(self) -> str:
        """Who asked, for the job log."""
        return {Wish.SAVE: f"RUN/{SAVE_FILE}", Wish.KILL: f"RUN/{KILL_FILE}"}.get(self, "a signal")


class StopRequest:
    """Context in which the stop signals set `received` instead of ending the process.

    A second Ctrl-C ends it at once.

    Args:
        run: the folder in which to look for the files `kill` and `save`; None on all ranks but one.
    """

    def __init__(self, run: Path | None = None) -> None:
        self.received: signal.Signals | None = None
        self._files = {} if run is None else {Wish.KILL: run / KILL_FILE, Wish.SAVE: run / SAVE_FILE}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wish(self) -> Wish:
        """What was asked of this rank until now."""
        found = [wish for wish, file in self._files.items() if file.exists()]
        if self.received is not None:
            found.append(Wish.SIGNAL)
        return max(found, default=Wish.NONE)

    def granted(self, wish: Wish) -> None:
        """Remove the file that asked for it, so that it does not ask again."""
        if wish in self._files:
            self._files[wish].unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
