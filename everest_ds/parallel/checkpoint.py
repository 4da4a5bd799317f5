"""Saved state: complete or absent, never half.

A checkpoint is written into a hidden folder and renamed once every rank has finished, so a folder named
`step-...` is always whole. It holds DeepSpeed's shards (for resuming in the same world), the full float32
weights as `model.safetensors` (for everything else), and `state.json` (step, config, world).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from everest_ds.errors import CheckpointError
from everest_ds.parallel.engine import Engine, full_parameter
from everest_ds.parallel.world import World

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "state.json"


def save_checkpoint(
    engine: Engine, folder: Path, step: int, state: dict[str, Any], keep: int, world: World
) -> Path:
    """Write `folder/step-<step>` and drop all but the newest `keep`. Call on every rank.

    Args:
        state: JSON-able facts to find again in `state.json`.

    Raises:
        CheckpointError: on every rank, if one could not write; earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    saving = folder / f".saving-{final.name}"
    try:
        world.share(lambda: _fresh_folder(saving))
        world.together(lambda: engine.save_checkpoint(str(folder), tag=saving.name, save_latest=False))
        weights = full_state_dict(engine.module)
        world.share(lambda: _finish(saving, final, weights, {**state, "step": step}))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{final}: could not be saved", given=reason, fix="free disk space and run the same command again"
        ) from None
    if world.is_main:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(engine: Engine, path: Path, world: World) -> dict[str, Any]:
    """Restore model, optimiser and loss scale from a checkpoint of the same world; returns its state.

    Raises:
        CheckpointError: if it was written by another number of ranks or ZeRO stage, or is damaged.
    """
    state = read_state(path)
    here = {"world_size": world.size, "zero_stage": engine.zero_optimization_stage()}
    for key, value in here.items():
        if state.get(key) != value:
            raise CheckpointError(
                f"{path}: saved with another {key}",
                given=f"{value} now",
                allowed=state.get(key),
                fix="resume with what it was saved with, or start a new run from it by model.init_from",
            )
    loaded, _ = world.together(lambda: engine.load_checkpoint(str(path.parent), tag=path.name))
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed's shards are missing", fix=f"remove {path} and run again")
    return state


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE_FILE).is_file())


def read_state(path: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint."""
    try:
        state = json.loads((path / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable {STATE_FILE}", given=str(error)) from None
    return dict(state)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All parameters in float32 on the host, gathered one by one. Call on every rank."""
    return {name: full_parameter(p).contiguous() for name, p in model.named_parameters()}


def save_weights(weights: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file in one step: a reader never sees half of it."""
    temporary = file.with_name(f".{file.name}.tmp")
    save_file(weights, temporary, metadata=metadata)
    os.replace(temporary, file)


def load_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: if it is missing or not a safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        return load_file(file), metadata
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: not a readable weights file",
            given=str(error),
            allowed=f"a .safetensors file, such as {WEIGHTS_FILE} of a checkpoint",
        ) from None


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(saving: Path, final: Path, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    save_weights(weights, saving / WEIGHTS_FILE, {"task": str(state.get("task", ""))})
    (saving / STATE_FILE).write_text(json.dumps(state, indent=2))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(saving, final)
