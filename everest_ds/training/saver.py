"""Scheduling of checkpoint writes: at once, or in the background during the next steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everest_ds.config import Experiment
from everest_ds.parallel.checkpointing import Keep, Saving
from everest_ds.parallel.engine import Engine
from everest_ds.parallel.host_copies import HostCopies
from everest_ds.parallel.mesh import Mesh
from everest_ds.training.stop import Grace


class Saver:
    """Writer of a run's checkpoints, one at a time. Call every method on every rank."""

    def __init__(self, engine: Engine, folder: Path, config: Experiment, mesh: Mesh, grace: Grace) -> None:
        self._engine, self._folder, self._mesh, self._grace = engine, folder, mesh, grace
        run, parallelism = config.run, config.parallelism
        self._keep = Keep(run.keep_checkpoints, run.keep_every_steps)
        offloads = parallelism.offload_to_cpu or parallelism.offload_to_nvme is not None
        # States on a GPU are copied to the host in any case. For states on the host, background writing would
        # need an extra copy, so it is not the default.
        copied = mesh.world.device.type == "cuda" and not offloads
        in_background = copied if run.save_in_background is None else run.save_in_background
        self._copies = HostCopies(mesh.world.device) if in_background else None
        self._writing: Saving | None = None

    def save(self, facts: dict[str, Any]) -> None:
        """Save the current state, after waiting for the previous checkpoint if it is still being written.

        Raises:
            CheckpointError: on every rank, if this or the previous checkpoint could not be written.
        """
        self.finish()
        self._writing = Saving(self._engine, self._folder, facts, self._keep, self._mesh, self._copies)
        if self._copies is None:
            self.finish()

    def poll(self) -> None:
        """Publish the checkpoint if writing has finished; call this after every step.

        While a checkpoint is being written, each call costs one small message between hosts.

        Raises:
            CheckpointError: on every rank, if one rank could not write its part.
        """
        if self._writing is not None and self._writing.written():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and publish it.

        Raises:
            CheckpointError: on every rank, if one rank could not write its part.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.finish()
            self._grace.note_save(writing.seconds)
