"""Rank-aware logging: every rank writes its own log file, and only rank 0 writes to the console."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from everest_ds.console import stderr_console

ON_LIVE_LINE = "on_live_line"  # attribute of records that a live line shows, so that the console omits them
logger = logging.getLogger("everest_ds")


class _ConsoleHandler(logging.StreamHandler):
    """A handler for stderr; in a terminal it prints through rich, which moves a live line aside."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, ON_LIVE_LINE, None):
            return
        console = stderr_console()
        if not console.is_interactive:
            super().emit(record)
            return
        try:
            console.print(self.format(record), soft_wrap=True, markup=False, highlight=False, emoji=False)
        except OSError:  # the terminal is gone, which must not end the run
            self.handleError(record)


def setup_logging(rank: int = 0, folder: Path | None = None) -> None:
    """Send log records of `everest_ds` to `folder/rank-<rank>.log` and, on rank 0, also to stderr."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    if rank == 0:
        logger.addHandler(_ConsoleHandler(sys.stderr))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / f"rank-{rank}.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)
