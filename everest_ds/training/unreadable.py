"""Record of the videos that cannot be read during a run; too many of them end the run.

Each rank notes the videos that its own loader could not read. Rank 0 writes `broken.jsonl`, one object per
line. An epoch keeps its length: a replacement fills the video's slot (`data.order.stand_ins`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everest_ds.config import DataConfig
from everest_ds.data.ledger import Ledger
from everest_ds.data.reading import Failure
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError
from everest_ds.log import logger
from everest_ds.parallel.world import World


class BrokenVideos:
    """The unreadable videos of a run, by epoch.

    Args:
        samples: the training samples of the run.
        data: `max_broken_pct` is the limit per epoch. Damaged files are recorded in the ledger of `train`, so
            that later runs leave them out; this run keeps them, because its order would change.
        file: the `broken.jsonl` of the run.
        world: the ranks of the run.
    """

    def __init__(self, samples: Sequence[Sample], data: DataConfig, file: Path, world: World) -> None:
        self._samples = samples
        self._manifest = data.train
        self._max_pct = data.max_broken_pct
        self._file = file
        self._world = world
        self._noted: list[Failure] = []  # failures of this rank since the last `collect`
        self._known: set[Failure] = set()  # all collected failures of all ranks

    def forget_after(self, step: int) -> None:
        """Drop failures after `step`, from which the run resumes: they will recur. Call on every rank."""
        rows = self._world.share(lambda: _keep_until(self._file, step))
        self._known = {Failure(*(row[name] for name in Failure._fields)) for row in rows}

    def note(self, failure: Failure) -> None:
        """Note a sample that this rank's loader could not read."""
        self._noted.append(failure)

    def collect(self, step: int, epoch: int) -> int:
        """Gather and record the failures that all ranks have noted. Call on every rank.

        Returns:
            The number of slots of `epoch` that a replacement has filled so far.

        Raises:
            DataError: on every rank, if more than `max_broken_pct` of an epoch's videos are unreadable.
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
        except DataError as error:  # data sets are often read-only, and the run has its own record
            logger.warning("%s", error)

    def _too_many(self, epoch: int, slots: list[int]) -> DataError:
        reasons = {failure.sample: failure.reason for failure in self._known}
        first = f"{self._samples[slots[0]].name}: {reasons[slots[0]]}"
        error = DataError(
            f"too many videos cannot be read in epoch {epoch}",
            given=f"{len(slots)} of {len(self._samples)}, for example {first}",
            allowed=f"{self._max_pct:g} % (data.max_broken_pct)",
            fix=f"see {self._file}, repair the files, or raise data.max_broken_pct",
        )
        error.on_every_rank = True
        return error


def _keep_until(file: Path, step: int) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    lines = file.read_text().split("\n")[:-1]  # drops a last line that a crash cut off
    rows = [row for row in map(json.loads, lines) if row["step"] <= step]
    shorter = file.with_name(f".{file.name}.tmp")
    shorter.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(shorter, file)
    return rows
