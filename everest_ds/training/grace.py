"""How long a run needs to stop in time, from its own steps and saves, against what SLURM grants it."""

from __future__ import annotations

import json
from pathlib import Path

from everest_ds.log import logger
from everest_ds.units import format_duration

FILE_NAME = "grace.json"
# The signal may come right after a step began; a busy file system may take twice as long as it did.
_SAFETY = 2


class Grace:
    """The slowest step and save so far, of this start or, until both are known, of the one before.

    Args:
        granted_s: between the signal and the end; None if nobody says.
        file: where the measurement is kept for the next start; None on all ranks but one.
    """

    def __init__(self, granted_s: float | None, file: Path | None) -> None:
        self._granted_s = granted_s
        self._file = file
        self._step_s = self._save_s = 0.0
        self._warned = False
        if file is not None and file.is_file():
            self._compare(json.loads(file.read_text())["needed_s"])

    def note_step(self, seconds: float) -> None:
        """Note the host's time of a step and of what was due after it, without the save.

        A GPU may still compute then. That shortens no estimate: the host can run ahead by a bounded number of
        launches only, so its times add up to the device's, the longest is at least the mean step, and what
        the device has left to do at a save counts as part of that save.
        """
        self._step_s = max(self._step_s, seconds)

    def note_save(self, seconds: float) -> None:
        """A checkpoint was saved."""
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
        """Two steps and two saves."""
        return _SAFETY * (self._step_s + self._save_s)

    def _compare(self, needed_s: float) -> None:
        if self._granted_s is None or needed_s <= self._granted_s or self._warned:
            return
        self._warned = True
        logger.warning(
            "too little time to stop: two of the slowest steps and saves take %s, --signal grants %s;"
            " fix: sbatch --signal=USR1@%d and EVEREST_SIGNAL_SECONDS=%d",
            format_duration(needed_s),
            format_duration(self._granted_s),
            needed_s + 1,
            needed_s + 1,
        )
