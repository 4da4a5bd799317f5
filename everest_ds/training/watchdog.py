"""Where a hanging rank hangs: the stacks of all its threads in a file, when it has not moved for too long."""

from __future__ import annotations

import faulthandler
from pathlib import Path
from types import TracebackType


class Watchdog:
    """Context in which a rank is expected to `beat`; it only tells, the other ranks end the run.

    The stacks are written by a thread without Python in it, so even a rank that holds the interpreter's lock
    is seen.
    """

    def __init__(self, file: Path, timeout_s: float) -> None:
        self._path = file
        self._timeout_s = timeout_s

    def __enter__(self) -> Watchdog:
        self._file = open(self._path, "w")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()

    def beat(self) -> None:
        """All is well until now; wait once more."""
        faulthandler.dump_traceback_later(self._timeout_s, file=self._file)
