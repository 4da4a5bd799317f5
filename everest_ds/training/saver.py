"""When checkpoints are on the disk: at once, or while the next steps run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everest_ds.config import Experiment
from everest_ds.parallel.engine import Engine
from everest_ds.parallel.host_copies import HostCopies
from everest_ds.parallel.mesh import Mesh
from everest_ds.parallel.saving import Keep, Saving
from everest_ds.training.grace import Grace


class Saver:
    """The checkpoints of a run, at most one of which is being written. Call everything on every rank."""

    def __init__(self, engine: Engine, folder: Path, config: Experiment, mesh: Mesh, grace: Grace) -> None:
        self._engine, self._folder, self._mesh, self._grace = engine, folder, mesh, grace
        run, parallelism = config.run, config.parallelism
        self._keep = Keep(run.keep_checkpoints, run.keep_every_steps)
        offloads = parallelism.offload_to_cpu or parallelism.offload_to_nvme is not None
        # States on a GPU are copied to the host in any case; of those on the host, a copy would be extra.
        copied = mesh.world.device.type == "cuda" and not offloads
        in_background = copied if run.save_in_background is None else run.save_in_background
        self._copies = HostCopies(mesh.world.device) if in_background else None
        self._writing: Saving | None = None

    def save(self, facts: dict[str, Any]) -> None:
        """Save the state of this moment; in the background, unless the one before is still being written.

        Raises:
            CheckpointError: on every rank, if this or the one before could not be written.
        """
        self.finish()
        self._writing = Saving(self._engine, self._folder, facts, self._keep, self._mesh, self._copies)
        if self._copies is None:
            self.finish()

    def poll(self) -> None:
        """Publish what has been written by now; costs a small message between hosts while one is on its way.

        Raises:
            CheckpointError: on every rank, if one could not write it.
        """
        if self._writing is not None and self._writing.written():
            self.finish()

    def finish(self) -> None:
        """Wait until nothing is being written any more.

        Raises:
            CheckpointError: on every rank, if one could not write it.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.finish()
            self._grace.note_save(writing.seconds)
