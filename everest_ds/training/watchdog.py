"""A watchdog that writes the stacks of all threads of a hanging rank to a file."""

from __future__ import annotations

import faulthandler
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType


class Watchdog:
    """A context manager in which a rank must call `beat` regularly; otherwise its stacks are written.

    The watchdog does not end the run: the other ranks do, by their collective timeout. The stacks are written
    by a native thread, so this works even if a Python thread holds the interpreter's lock.
    """

    def __init__(self, file: Path, timeout_s: float) -> None:
        self._path = file
        self._timeout_s = timeout_s

    def __enter__(self) -> Watchdog:
        # After a network partition, this rank of the previous start may still run, with its own file.
        self._path.unlink(missing_ok=True)
        self._file = open(self._path, "w")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        own = os.fstat(self._file.fileno())
        self._file.close()
        with suppress(FileNotFoundError):  # a later start may have removed the file
            if own.st_size == 0 and os.path.samestat(own, self._path.stat()):
                self._path.unlink()

    def beat(self) -> None:
        """Restart the countdown."""
        faulthandler.dump_traceback_later(self._timeout_s, file=self._file)
