"""Requests to stop or save a run, which the loop handles after each step, and the time that a stop needs."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType

from everest_ds.durable_files import replace_json
from everest_ds.log import logger
from everest_ds.stop_signals import STOP_SIGNALS
from everest_ds.units import format_duration

KILL_FILE, SAVE_FILE = "kill", "save"
GRACE_FILE = "grace.json"
# The signal may arrive just after a step began, and a busy file system may be twice as slow as measured.
_SAFETY = 2


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
        """The origin of the request, for the event log."""
        files = {StopReason.SAVE: SAVE_FILE, StopReason.KILL: KILL_FILE}
        return f"RUN/{files[self]}" if self in files else "a signal"


class StopRequest:
    """A context manager in which stop signals set `received` instead of ending the process.

    A second Ctrl-C ends the process at once.

    Args:
        run: the run folder, in which the files `kill` and `save` are looked up; None on all ranks but one.
    """

    def __init__(self, run: Path | None = None) -> None:
        self.received: signal.Signals | None = None
        self._num_interrupts = 0
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

    def reason(self) -> StopReason:
        """Return the strongest request that this rank has received so far."""
        found = [reason for reason, file in self._files.items() if file.exists()]
        if self.received is not None:
            found.append(StopReason.SIGNAL)
        return max(found, default=StopReason.NONE)

    def acknowledge(self, reason: StopReason) -> None:
        """Remove the file behind a request that was carried out, so that it is not repeated."""
        if reason in self._files:
            self._files[reason].unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts == 2:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


class Grace:
    """The time that a run needs to stop, from its slowest step and save so far.

    Until this start has saved once, the measurement of the previous start is used.

    Args:
        granted_s: seconds between the stop signal and the end of the job; None if unknown.
        file: stores the measurement for the next start; None on all ranks but one.
    """

    def __init__(self, granted_s: float | None, file: Path | None) -> None:
        self._granted_s = granted_s
        self._file = file
        self._step_s = self._save_s = 0.0
        self._warned = False
        if file is not None and file.is_file():
            with suppress(ValueError, KeyError, TypeError):  # damaged: this start measures again
                self._compare(float(json.loads(file.read_text())["needed_s"]))

    def note_step(self, seconds: float) -> None:
        """Note the host time of a step, including logging and validation after it but not the save.

        A GPU may still be computing when the host is done. This does not make the estimate too short: the
        host can run ahead by a bounded number of launches only, so host times add up to device times, the
        longest host time is at least the mean step, and work left on the device counts towards the save.
        """
        self._step_s = max(self._step_s, seconds)

    def note_save(self, seconds: float) -> None:
        """Note how long a checkpoint took to save, and store the measurement."""
        self._save_s = max(self._save_s, seconds)
        if self._file is not None:
            facts = {
                "slowest_step_s": self._step_s,
                "slowest_save_s": self._save_s,
                "needed_s": self.needed_s,
            }
            replace_json(self._file, facts)
            self._compare(self.needed_s)

    @property
    def needed_s(self) -> float:
        """The seconds needed to stop: two of the slowest steps and two of the slowest saves."""
        return _SAFETY * (self._step_s + self._save_s)

    def _compare(self, needed_s: float) -> None:
        if self._granted_s is None or needed_s <= self._granted_s or self._warned:
            return
        self._warned = True
        logger.warning(
            "too little time to stop: two of the slowest steps and two of the slowest saves take %s,"
            " but --signal leaves %s;"
            " fix: sbatch --signal=USR1@%d and EVEREST_SIGNAL_SECONDS=%d",
            format_duration(needed_s),
            format_duration(self._granted_s),
            needed_s + 1,
            needed_s + 1,
        )
