"""Videos that cannot be read while a run goes on: counted, written down, and the end of the run if too many.

Each rank notes what its own loader could not read; rank 0 writes `broken.jsonl`, one object a line. Nothing
is left out of an epoch for it: a stand-in is in the video's slot (`data.order.stand_ins`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everest_ds.config import DataConfig
from everest_ds.data.ledger import Ledger
from everest_ds.data.manifest import Sample
from everest_ds.data.reading import Failure
from everest_ds.errors import DataError
from everest_ds.log import logger
from everest_ds.parallel.world import World


class BrokenVideos:
    """What could not be read, epoch by epoch.

    Args:
        data: of the run: its `max_broken_pct`, and `train`, whose ledger learns of damaged files, so that
            later runs leave them out. This run does not: its order would change.
        file: where the run writes them down.
    """

    def __init__(self, samples: Sequence[Sample], data: DataConfig, file: Path, world: World) -> None:
        self._samples = samples
        self._manifest = data.train
        self._max_pct = data.max_broken_pct
        self._file = file
        self._world = world
        self._noted: list[Failure] = []  # since the last `collect`, of this rank
        self._known: set[Failure] = set()  # of all ranks

    def forget_after(self, step: int) -> None:
        """Take up where a run was saved: what came later will happen again. Call on every rank."""
        rows = self._world.share(lambda: _keep_until(self._file, step))
        self._known = {Failure(*(row[name] for name in Failure._fields)) for row in rows}

    def note(self, failure: Failure) -> None:
        """This rank's loader could not read a sample."""
        self._noted.append(failure)

    def collect(self, step: int, epoch: int) -> int:
        """Bring together what all ranks noted. Call on every rank.

        Returns:
            Slots of `epoch` so far that a stand-in filled.

        Raises:
            DataError: on every rank, if an epoch lacks too many.
        """
        noted = {failure for part in self._world.gather(self._noted) for failure in part}
        self._noted = []
        new = sorted(noted - self._known)
        self._known |= noted
        if new:
            self._world.share(lambda: self._write(step, new))
        for each in sorted({failure.epoch for failure in new}):
            slots = self._slots(each)
            if len(slots) > self._max_pct / 100 * len(self._samples):
                raise self._too_many(each, sorted(slots))
        return len(self._slots(epoch))

    def _slots(self, epoch: int) -> set[int]:
        return {failure.slot for failure in self._known if failure.epoch == epoch}

    def _write(self, step: int, failures: list[Failure]) -> None:
        with open(self._file, "a") as file:
            for failure in failures:
                name = self._samples[failure.sample].name
                logger.warning("epoch %d: cannot read %s: %s", failure.epoch, name, failure.reason)
                file.write(json.dumps({"step": step, **failure._asdict(), "video": name}) + "\n")
        if self._manifest is not None:
            self._tell(Ledger.of_manifest(self._manifest), [f for f in failures if f.damaged])

    def _tell(self, ledger: Ledger, damaged: list[Failure]) -> None:
        try:
            for failure in damaged:
                sample = self._samples[failure.sample]
                if ledger.broken(sample) is None:
                    ledger.record(sample, failure.reason, by_run=True)
        except DataError as error:  # data sets often lie where a run may not write; it has its own file
            logger.warning("%s", error)

    def _too_many(self, epoch: int, slots: list[int]) -> DataError:
        reasons = {failure.sample: failure.reason for failure in self._known}
        first = f"{self._samples[slots[0]].name}: {reasons[slots[0]]}"
        error = DataError(
            f"too many videos cannot be read in epoch {epoch}",
            given=f"{len(slots)} of {len(self._samples)}, as {first}",
            allowed=f"{self._max_pct:g} % (data.max_broken_pct)",
            fix=f"see {self._file}, repair the files, or raise data.max_broken_pct",
        )
        error.on_every_rank = True
        return error


def _keep_until(file: Path, step: int) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    lines = file.read_text().split("\n")[:-1]  # a last line cut off by a crash is no line
    rows = [row for row in map(json.loads, lines) if row["step"] <= step]
    shorter = file.with_name(f".{file.name}.tmp")
    shorter.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(shorter, file)
    return rows
