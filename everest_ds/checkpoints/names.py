"""Names of checkpoints. Does not import torch, so that the progress of a run can be read quickly."""

from __future__ import annotations

import re
from pathlib import Path

BEST_WEIGHTS_FILE = "best.safetensors"  # in a run folder
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` optimiser steps."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """List folders named like checkpoints, lowest step first; `verify_checkpoint` checks their content."""
    found = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the number of optimiser steps before a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_step(run: Path) -> int:
    """Return the step of a run's newest checkpoint, complete or not, or 0 without checkpoints."""
    return max(map(step_of, list_checkpoints(run / "checkpoints")), default=0)
