"""What checkpoints are called. Free of torch: asking how far a run got is cheap."""

from __future__ import annotations

import re
from pathlib import Path

BEST_WEIGHTS_FILE = "best.safetensors"  # of a run folder
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimiser steps lies."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Everything named like a checkpoint, oldest step first; `folder.damage` tells which are complete."""
    found = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser steps done before it was saved, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_step(run: Path) -> int:
    """The step of a run's newest checkpoint, complete or not; 0 without any."""
    return max(map(step_of, list_checkpoints(run / "checkpoints")), default=0)
