"""Saving and restoring a run together: every rank writes and reads the elements that it holds.

What lies on the disk does not depend on the ranks that wrote it (see `everest_ds.checkpoints`), so that any
number of ranks at any ZeRO stage goes on from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from everest_ds.checkpoints.folder import (
    abandon_saving,
    commit,
    damage,
    list_checkpoints,
    prune,
    set_aside,
    start_saving,
)
from everest_ds.checkpoints.manifest import Cut, Facts, Manifest, Parameter, Piece, read_manifest
from everest_ds.checkpoints.reader import STATES, CheckpointReader, entry
from everest_ds.checkpoints.tensor_file import FileSeal, TensorSpec, publish_tensors, write_tensors
from everest_ds.errors import CheckpointError
from everest_ds.log import logger
from everest_ds.parallel.engine import Engine, full_parameter
from everest_ds.parallel.mesh import Mesh
from everest_ds.parallel.states import (
    Held,
    ModelStates,
    loss_scale,
    model_states,
    optimizer_step,
    set_loss_scale,
    set_optimizer_step,
    whole_shape,
)
from everest_ds.parallel.world import World


class Keep(NamedTuple):
    """Which checkpoints stay: the newest `last`, and those at multiples of `every_steps`."""

    last: int
    every_steps: int | None


class _Saved(NamedTuple):
    """What one rank saved of a parameter."""

    name: str
    shape: tuple[int, ...]
    cut: Cut
    piece: Piece


class _Written(NamedTuple):
    """What one rank wrote: its file, and what is in it."""

    file: str
    seal: FileSeal
    saved: list[_Saved]


def save_checkpoint(engine: Engine, folder: Path, facts: dict[str, Any], keep: Keep, mesh: Mesh) -> Path:
    """Write the checkpoint of this step and drop those that need not be kept. Call on every rank.

    Args:
        facts: those of `Facts` that are not the engine's to know.

    Raises:
        CheckpointError: on every rank, if one could not write; earlier checkpoints are untouched.
    """
    states, world = model_states(engine, mesh), mesh.world
    try:
        saving = world.share(lambda: start_saving(folder, facts["step"]))
    except OSError as error:
        raise _not_saved(folder, error) from None
    try:
        written = world.gather(world.together(lambda: _write_part(states, saving, world.rank)))
        own = {"optimizer_step": optimizer_step(states), "loss_scale": loss_scale(engine)}
        path = world.share(lambda: commit(saving, _manifest(Facts(**facts, **own), written)))
        world.share(lambda: prune(folder, keep.last, keep.every_steps))
    except OSError as error:
        if world.is_main:
            abandon_saving(saving)
        raise _not_saved(folder, error) from None
    return path


def newest_complete(folder: Path, world: World) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that is whole, read by all ranks together; None before the first one.

    Damaged ones that are newer are named and set aside.

    Raises:
        CheckpointError: if there are damaged ones only.
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
    """Restore weights, moments, step count and loss scale. Call on every rank.

    Raises:
        CheckpointError: if it is of another model, or a file is damaged.
    """
    states = model_states(engine, mesh)
    mesh.world.together(lambda: _read_part(states, path, manifest))
    states.refresh()
    set_loss_scale(engine, manifest.facts.loss_scale)


def save_model(model: nn.Module, file: Path, metadata: Mapping[str, str], mesh: Mesh) -> None:
    """Publish the full float32 weights of a sharded model, gathered one by one. Call on every rank.

    Raises:
        CheckpointError: on every rank, if rank 0 could not write; `file` stays what it was.
    """
    specs = {n: TensorSpec(torch.float32, whole_shape(p, mesh)) for n, p in model.named_parameters()}
    gathered = (full_parameter(p) for p in model.parameters())

    def write() -> None:
        try:
            if mesh.world.is_main:
                publish_tensors(file, specs, gathered, metadata)
        finally:  # the others wait in every gather, whatever became of the file
            for _ in gathered:
                pass

    try:
        mesh.world.together(write)
    except OSError as error:
        raise _not_saved(file, error) from None


def _write_part(states: ModelStates, saving: Path, rank: int) -> _Written:
    """This rank's file: the weights first, so that an export reads them in one go."""
    mine = [held for held in states.held() if held.saved_here]
    file = f"rank-{rank:05d}.safetensors"
    specs = {
        entry(state, held.name): TensorSpec(torch.float32, (held.numel,)) for state in STATES for held in mine
    }
    tensors = (states.get(held, state) for state in STATES for held in mine)
    seal = write_tensors(saving / file, specs, tensors, {})
    return _Written(
        file, seal, [_Saved(h.name, h.shape, h.cut, Piece(file, h.cut.rank, h.start, h.numel)) for h in mine]
    )


def _manifest(facts: Facts, written: list[_Written]) -> Manifest:
    by_name: dict[str, list[_Saved]] = {}
    for saved in chain.from_iterable(part.saved for part in written):
        by_name.setdefault(saved.name, []).append(saved)
    return Manifest(
        facts=facts,
        files={part.file: part.seal for part in written},
        parameters={name: _parameter(saved) for name, saved in by_name.items()},
    )


def _parameter(saved: list[_Saved]) -> Parameter:
    first = saved[0]
    pieces = sorted((each.piece for each in saved), key=lambda piece: (piece.shard, piece.start))
    return Parameter(shape=first.shape, degree=first.cut.degree, outer=first.cut.outer, pieces=tuple(pieces))


def _read_part(states: ModelStates, path: Path, manifest: Manifest) -> None:
    set_optimizer_step(states, manifest.facts.optimizer_step)
    held = list(states.held())
    _check_same_model(held, path, manifest)
    with CheckpointReader(path, manifest) as reader:
        for each in held:
            for state in STATES:
                states.put(each, state, reader.read(state, each.name, each.start, each.numel, each.cut))


def _check_same_model(held: list[Held], path: Path, manifest: Manifest) -> None:
    for each in held:
        saved = manifest.parameters.get(each.name)
        if saved is None or saved.shape != each.shape:
            raise CheckpointError(
                f"{path}: of another model, at `{each.name}`",
                given="absent" if saved is None else f"shape {saved.shape}",
                allowed=f"shape {each.shape}",
            )


def _examine(path: Path, world: World) -> tuple[Manifest | None, str | None]:
    """The manifest and what is wrong; each rank reads its share of the files."""
    try:
        manifest = world.share(lambda: read_manifest(path))
    except CheckpointError as error:
        return None, str(error)
    names = sorted(manifest.files)[world.rank :: world.size]
    problems = world.gather(damage(path, manifest, names))
    return manifest, next((problem for problem in problems if problem is not None), None)


def _skip(damaged: list[tuple[Path, str]]) -> None:
    for path, problem in damaged:
        logger.warning("not resuming from %s: %s; it is now %s", path, problem, set_aside(path).name)


def _not_saved(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: could not be saved",
        given=error.strerror or str(error),
        fix="free disk space and run the same command again",
    )
