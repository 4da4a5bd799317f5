"""Rank-aware logging: every rank writes its own log file, and only rank 0 writes to the console."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

logger = logging.getLogger("everest_ds")


def setup_logging(rank: int = 0, folder: Path | None = None) -> None:
    """Send log records of `everest_ds` to `folder/rank-<rank>.log` and, on rank 0, also to stderr."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    if rank == 0:
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(console)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / f"rank-{rank}.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)
