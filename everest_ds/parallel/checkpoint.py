"""Restoring a run from a checkpoint and publishing its weights, on all ranks together.

Every rank reads only the elements that it will hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from everest_ds.checkpoints.folder import damage, set_aside
from everest_ds.checkpoints.names import list_checkpoints
from everest_ds.checkpoints.reader import STATES, CheckpointReader
from everest_ds.checkpoints.sealed_manifest import Manifest, read_checkpoint_manifest
from everest_ds.checkpoints.tensor_file import TensorSpec, publish_tensors
from everest_ds.errors import CheckpointError
from everest_ds.log import logger
from everest_ds.parallel.checkpointing import not_saved
from everest_ds.parallel.engine import Engine, full_parameter
from everest_ds.parallel.mesh import Mesh
from everest_ds.parallel.world import World
from everest_ds.parallel.zero_states import (
    LocalShard,
    ZeroStates,
    set_loss_scale,
    set_optimizer_step,
    states_of_engine,
    whole_shape,
)


def newest_complete(folder: Path, world: World) -> tuple[Path, Manifest] | None:
    """Return the newest complete checkpoint in `folder` and its manifest, or None if there is none yet.

    Newer checkpoints that are damaged are logged and renamed out of the way. Call on every rank.

    Raises:
        CheckpointError: if every checkpoint is damaged.
    """
    paths = world.share(lambda: list_checkpoints(folder))
    skipped: list[tuple[Path, str]] = []
    for path in reversed(paths):
        manifest, problem = _examine(path, world)
        if manifest is not None and problem is None:
            world.share(lambda: _skip(skipped))
            return path, manifest
        skipped.append((path, problem or "unreadable"))
    if skipped:
        raise CheckpointError(
            f"{folder}: none of {len(skipped)} checkpoints is complete",
            given=skipped[0][1],
            fix="put an intact copy there, or remove the folder to start over",
        )
    return None


def load_checkpoint(engine: Engine, path: Path, manifest: Manifest, mesh: Mesh) -> None:
    """Restore weights, AdamW moments, step count and loss scale. Call on every rank.

    Raises:
        CheckpointError: if the checkpoint belongs to another model, or one of its files is damaged.
    """
    states = states_of_engine(engine, mesh)
    mesh.world.together(lambda: _read_part(states, path, manifest))
    states.refresh()
    set_loss_scale(engine, manifest.facts.loss_scale)


def save_model(model: nn.Module, file: Path, metadata: Mapping[str, str], mesh: Mesh) -> None:
    """Write the full float32 weights of a sharded model to `file`, gathered one by one. Call on every rank.

    Raises:
        CheckpointError: on every rank, if rank 0 could not write; `file` is left unchanged.
    """
    specs = {n: TensorSpec(torch.float32, whole_shape(p, mesh)) for n, p in model.named_parameters()}
    gathered = (full_parameter(p) for p in model.parameters())

    def write() -> None:
        try:
            if mesh.world.is_main:
                publish_tensors(file, specs, gathered, metadata)
        finally:  # the other ranks wait in every gather, even if writing failed here
            for _ in gathered:
                pass

    try:
        mesh.world.together(write)
    except OSError as error:
        raise not_saved(file, error) from None


def _read_part(states: ZeroStates, path: Path, manifest: Manifest) -> None:
    set_optimizer_step(states, manifest.facts.optimizer_step)
    held = list(states.held())
    _check_same_model(held, path, manifest)
    with CheckpointReader(path, manifest) as reader:
        for each in held:
            for state in STATES:
                states.put(each, state, reader.read(state, each.name, each.start, each.numel, each.cut))


def _check_same_model(held: list[LocalShard], path: Path, manifest: Manifest) -> None:
    for each in held:
        saved = manifest.parameters.get(each.name)
        if saved is None or saved.shape != each.shape:
            raise CheckpointError(
                f"{path}: the checkpoint belongs to another model: `{each.name}` differs",
                given="absent" if saved is None else f"shape {saved.shape}",
                allowed=f"shape {each.shape}",
            )


def _examine(path: Path, world: World) -> tuple[Manifest | None, str | None]:
    """Return the manifest, if readable, and a description of the damage, if any.

    Each rank reads its share of the files.
    """
    try:
        manifest = world.share(lambda: read_checkpoint_manifest(path))
    except CheckpointError as error:
        return None, str(error)
    names = sorted(manifest.files)[world.rank :: world.size]
    problems = world.gather(damage(path, manifest, names))
    return manifest, next((problem for problem in problems if problem is not None), None)


def _skip(damaged: list[tuple[Path, str]]) -> None:
    for path, problem in damaged:
        logger.warning("not resuming from %s: %s; renamed to %s", path, problem, set_aside(path).name)
