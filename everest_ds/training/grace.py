"""The time that a run needs to stop, from measured steps and saves, checked against SLURM's signal time."""

from __future__ import annotations

import json
from pathlib import Path

from everest_ds.log import logger
from everest_ds.units import format_duration

GRACE_FILE = "grace.json"
# The signal may arrive just after a step began, and a busy file system may be twice as slow as measured.
_SAFETY = 2


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
            self._compare(json.loads(file.read_text())["needed_s"])

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
            self._file.write_text(json.dumps(facts) + "\n")
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
