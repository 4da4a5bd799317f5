"""Saving and restoring checkpoints by all ranks together; saving may continue in the background.

Every rank writes the elements that it holds. The checkpoint does not depend on the ranks that wrote it (see
`everest_ds.checkpoints`): any number of ranks at any ZeRO stage can resume from it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from everest_ds.checkpoints.folder import abandon_saving, commit, damage, prune, set_aside, start_saving
from everest_ds.checkpoints.names import list_checkpoints
from everest_ds.checkpoints.reader import CheckpointReader, entry
from everest_ds.checkpoints.sealed_manifest import (
    STATES,
    Cut,
    Facts,
    Manifest,
    Parameter,
    Piece,
    read_checkpoint_manifest,
)
from everest_ds.checkpoints.tensor_file import FileSeal, TensorSpec, publish_tensors, write_tensors
from everest_ds.errors import CheckpointError
from everest_ds.log import logger
from everest_ds.parallel.deepspeed_internals import loss_scale, set_loss_scale
from everest_ds.parallel.engine import Engine, full_parameter
from everest_ds.parallel.host_copies import HostCopies
from everest_ds.parallel.mesh import Mesh
from everest_ds.parallel.world import World
from everest_ds.parallel.zero_states import (
    LocalShard,
    ZeroStates,
    optimizer_step,
    set_optimizer_step,
    states_of_engine,
    whole_shape,
)


class Keep(NamedTuple):
    """The checkpoints to keep: the newest `last`, and all at multiples of `every_steps`."""

    last: int
    every_steps: int | None


class Saving:
    """A checkpoint that is being written; it appears under its final name only when `finish` returns.

    With `copies`, a thread writes from a copy on the host, and the next steps need not wait. Without
    `copies`, the constructor returns only after the states have been written.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        facts: dict[str, Any],
        keep: Keep,
        mesh: Mesh,
        copies: HostCopies | None,
    ) -> None:
        """Start writing a checkpoint of the engine's states. Call on every rank.

        Args:
            engine: the engine to save.
            folder: the folder of all checkpoints of the run.
            facts: the fields of `Facts` that the engine does not provide.
            keep: the checkpoints that `finish` leaves in `folder`.
            mesh: the ranks of the run.
            copies: host buffer for writing in the background, in use until `finish` returns; None to write
                at once.

        Raises:
            CheckpointError: on every rank, if `folder` is not writable.
        """
        self._world, self._folder, self._keep = mesh.world, folder, keep
        started = time.perf_counter()
        states = states_of_engine(engine, mesh)
        own = {"optimizer_step": optimizer_step(states), "loss_scale": loss_scale(engine)}
        self._facts = Facts(**facts, **own)
        try:
            self._path = self._world.share(lambda: start_saving(folder, self._facts.step))
        except OSError as error:
            raise not_saved(folder, error) from None
        write = _writer(states, self._path, self._world.rank, copies)
        self.seconds = 0.0  # how long this rank took to write; set when it has finished

        def note_seconds(_: object) -> None:
            self.seconds = time.perf_counter() - started

        self._part = _start(write, in_background=copies is not None)
        self._part.add_done_callback(note_seconds)

    def written(self) -> bool:
        """Return True if all ranks have finished writing, successfully or not. Call on every rank."""
        return not self._world.any(not self._part.done())

    def finish(self) -> Path:
        """Wait for all ranks, publish the checkpoint and remove old ones. Call on every rank.

        Raises:
            CheckpointError: on every rank, if one rank could not write; earlier checkpoints are untouched.
        """
        world, keep = self._world, self._keep
        try:
            written = world.gather(world.together(self._part.result))
            path = world.share(lambda: commit(self._path, _manifest(self._facts, written)))
            world.share(lambda: prune(self._folder, keep.last, keep.every_steps))
        except OSError as error:
            if world.is_main:
                abandon_saving(self._path)
            raise not_saved(self._folder, error) from None
        return path


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
    """Write the full float32 weights of a sharded model to `file`, one tensor at a time. Call on every rank.

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


def not_saved(path: Path, error: OSError) -> CheckpointError:
    """Turn an OSError raised while saving `path` into a CheckpointError."""
    return CheckpointError(
        f"{path}: saving failed",
        given=error.strerror or str(error),
        fix="free disk space and run the same command again",
    )


class _Saved(NamedTuple):
    """The part of a parameter that one rank saved."""

    name: str
    shape: tuple[int, ...]
    cut: Cut
    piece: Piece


class _Written(NamedTuple):
    """The file that one rank wrote, and the pieces of parameters in it."""

    file: str
    seal: FileSeal
    saved: list[_Saved]


def _start(write: Callable[[], _Written], in_background: bool) -> Future[_Written]:
    """Call `write`, in a daemon thread on request; its error is raised when the result is read.

    An executor's threads are not daemons: if the disk hung, they would keep the process from ending.
    """
    future: Future[_Written] = Future()

    def run() -> None:
        try:
            future.set_result(write())
        except BaseException as error:
            future.set_exception(error)

    if in_background:
        Thread(target=run, name="checkpoint", daemon=True).start()
    else:
        run()
    return future


def _writer(states: ZeroStates, saving: Path, rank: int, copies: HostCopies | None) -> Callable[[], _Written]:
    """Return a function that writes this rank's file, weights first, so that an export reads one range.

    With `copies`, the file holds the states at the time of this call; without, those at the time of writing.
    """
    mine = [shard for shard in states.shards() if shard.saved_here]
    file = f"rank-{rank:05d}.safetensors"
    specs = {
        entry(state, shard.name): TensorSpec(torch.float32, (shard.numel,))
        for state in STATES
        for shard in mine
    }
    tensors: Iterable[Tensor] = (states.get(shard, state) for state in STATES for shard in mine)
    if copies is None:
        tensors = (tensor.cpu() for tensor in tensors)
    else:
        tensors = copies.take([math.prod(spec.shape) for spec in specs.values()], tensors)
    saved = [_Saved(h.name, h.shape, h.cut, Piece(file, h.cut.rank, h.start, h.numel)) for h in mine]

    def write() -> _Written:
        if copies is not None:
            copies.wait()
        return _Written(file, write_tensors(saving / file, specs, tensors, {}), saved)

    return write


def _manifest(facts: Facts, written: list[_Written]) -> Manifest:
    by_name: dict[str, list[_Saved]] = {}
    for saved in chain.from_iterable(part.saved for part in written):
        by_name.setdefault(saved.name, []).append(saved)
    parameters = {}
    for name, (first, *others) in by_name.items():
        pieces = sorted((s.piece for s in (first, *others)), key=lambda piece: (piece.shard, piece.start))
        shape, cut = first.shape, first.cut
        parameters[name] = Parameter(shape=shape, degree=cut.degree, outer=cut.outer, pieces=tuple(pieces))
    files = {part.file: part.seal for part in written}
    return Manifest(facts=facts, files=files, parameters=parameters)


def _read_part(states: ZeroStates, path: Path, manifest: Manifest) -> None:
    set_optimizer_step(states, manifest.facts.optimizer_step)
    shards = list(states.shards())
    _check_same_model(shards, path, manifest)
    with CheckpointReader(path, manifest) as reader:
        for each in shards:
            for state in STATES:
                states.put(each, state, reader.read(state, each.name, each.start, each.numel, each.cut))


def _check_same_model(shards: list[LocalShard], path: Path, manifest: Manifest) -> None:
    for each in shards:
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
