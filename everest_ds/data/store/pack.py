"""Packing of a data set's frames into a frame store.

Worker processes decode and encode samples, each into a file of its own; this process appends the files to the
shards and records each. The store becomes valid, or changes, in one step at the end.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from everest_ds.data.ledger import Ledger, stamp
from everest_ds.data.maintenance.isolation import Lost, map_isolated
from everest_ds.data.manifest_lines import NO_LABEL, SampleColumns
from everest_ds.data.store.index import PlaceColumns, write_store_index
from everest_ds.data.store.layout import FRAMES, LIST_FILE, SHARDS, Packing, folder_of, shard_name
from everest_ds.data.store.packing_log import PackedSample, PackingLog
from everest_ds.data.store.sample_members import PackedPart, PackTask, append_part, write_part
from everest_ds.data.store.shards import SHARD_BYTES, ShardWriter, check_room, naming_errors
from everest_ds.data.video_list import Sample
from everest_ds.durable_files import replace_file
from everest_ds.errors import DataError

PACK_TIMEOUT_S = 1800.0  # a sample that takes longer counts as failed
_PARTS = ".parts"  # folder of the files that wait to be appended
_NUM_PROBED = 12  # samples from which the rest is predicted


class Estimate(NamedTuple):
    """The prediction of packing, from the samples that are packed already.

    Attributes:
        num_bytes: bytes that the samples that are not packed yet will take.
        minutes: time that they will take, in minutes.
        spread_pct: standard error of both, in percent.
    """

    num_bytes: float
    minutes: float
    spread_pct: float


class StorePacker:
    """The packing of a list of samples into a store; see `shards.packing_into`.

    Attributes:
        failed: reasons by sample name for the samples that could not be packed.

    Args:
        samples: the samples, in the order that they will have in the store.
        root: the folder from which the samples' names count.
        out: the store.
        packing: the settings.
        workers: number of processes.
        shard_bytes: size at which a shard is closed.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        root: Path,
        out: Path,
        packing: Packing,
        workers: int,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.failed: dict[str, str] = {}
        self._samples = samples
        self._names = [name_in_store(sample, root) for sample in samples]
        self._out = out
        self._packing = packing
        self._workers = workers
        self._shard_bytes = shard_bytes
        self._log = PackingLog(out, packing)
        ledger = Ledger.of_manifest(out, faults_below=1)
        for row in list(self._log.packed.values()):
            if ledger.broken(self._stored(row)):
                self._log.forget(row.name)
        self._next_shard = self._log.repair_shards()
        self._next_number = self._log.next_number
        self._left = [
            place
            for place, (sample, name) in enumerate(zip(samples, self._names, strict=True))
            if not self._log.has(sample, name)
        ]
        self.num_known = len(samples) - len(self._left)

    def pack_some(self, on_progress: Callable[[int], None]) -> None:
        """Pack a few samples that are spread over the list, so that `estimate` knows enough.

        Raises:
            DataError: as `pack_all`.
        """
        lack = max(0, min(_NUM_PROBED - self.num_known, len(self._left)))
        spread = np.linspace(0, len(self._left) - 1, lack).astype(int)
        self._pack([self._left[place] for place in spread], on_progress)

    def pack_all(self, on_progress: Callable[[int], None]) -> None:
        """Pack all samples that are not packed yet.

        Args:
            on_progress: called after each sample with the number of samples done.

        Raises:
            DataError: if the disk is full, or the store cannot be written for another reason.
        """
        self._pack(self._left, on_progress)

    @property
    def num_left(self) -> int:
        """Number of samples that are neither packed nor have failed."""
        return len(self._left)

    def estimate(self, num_left: int) -> Estimate:
        """Predict the size of so many further samples, and the time to pack them."""
        found = map(self._log.packed.get, self._names)
        parts = [row.part for row in found if row is not None]
        if not parts:
            return Estimate(0.0, 0.0, 0.0)
        sizes = np.array([part.num_bytes for part in parts], float)
        seconds = float(np.mean([part.cpu_s for part in parts]))
        spread = sizes.std() / sizes.mean() / len(sizes) ** 0.5
        minutes = seconds * num_left / self._workers / 60
        return Estimate(float(sizes.mean()) * num_left, minutes, float(100 * spread))

    def check_room(self, folder: Path, num_left: int) -> None:
        """Check that the disk of `folder` has room for so many further samples, as far as can be predicted.

        Raises:
            DataError: if it does not.
        """
        fix = "choose another --out, or lower --quality or --short-side, or raise --every"
        check_room(folder, self.estimate(num_left).num_bytes, FRAMES, fix)

    def pairs(self) -> list[tuple[Sample, Sample]]:
        """Return packed samples with their sources, as (source, packed), spread over the list."""
        found = [
            (sample, self._stored(row))
            for sample, row in zip(self._samples, map(self._log.packed.get, self._names), strict=True)
            if row is not None
        ]
        return found[:: max(1, len(found) // _NUM_PROBED)][:_NUM_PROBED]

    def finish(self) -> dict[str, Any]:
        """Make the store valid with all samples that are packed, and return its settings and totals.

        Raises:
            DataError: if no sample is packed, or the store cannot be written.
        """
        rows = [
            (sample, row)
            for sample, name in zip(self._samples, self._names, strict=True)
            if (row := self._log.packed.get(name)) is not None and name not in self.failed
        ]
        if not rows:
            name, reason = next(iter(self.failed.items()))
            raise DataError(f"{self._out}: no sample could be packed", given=f"{name}: {reason}")
        packed = [row for _, row in rows]
        facts = self._facts(packed)
        with naming_errors(self._out, FRAMES):
            write_store_index(self._out, _columns(rows), _places(packed), facts)
            replace_file(self._out / LIST_FILE, _list_text(rows))
            shutil.rmtree(self._out / _PARTS, ignore_errors=True)
        return facts

    def _pack(self, places: Sequence[int], on_progress: Callable[[int], None]) -> None:
        done = len(self._names) - len(self._left)
        on_progress(done)
        with naming_errors(self._out, FRAMES):
            tasks = list(self._tasks(places))
            outcomes = map_isolated(
                partial(write_part, packing=self._packing),
                tasks,
                workers=self._workers,
                timeout_s=PACK_TIMEOUT_S,
            )
            with ShardWriter(self._out / SHARDS, self._next_shard, self._shard_bytes) as shards:
                for place, outcome in outcomes:
                    self._note(tasks[place], outcome, shards)
                    done += 1
                    on_progress(done)
            self._next_shard = shards.next_shard
        settled = {task.name for task in tasks}
        self._left = [place for place in self._left if self._names[place] not in settled]

    def _tasks(self, places: Sequence[int]) -> Iterator[PackTask]:
        parts = self._out / _PARTS
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        once = {self._names[place]: place for place in reversed(places)}
        for name, place in once.items():
            part = parts / folder_of(self._next_number)
            yield PackTask(self._samples[place], name, self._next_number, part)
            self._next_number += 1

    def _note(self, task: PackTask, outcome: PackedPart | str | Lost, shards: ShardWriter) -> None:
        if isinstance(outcome, PackedPart):
            stream, shard, start = shards.begin()
            append_part(task.part, stream, outcome)
            row = PackedSample(task.name, stamp(task.sample.file), task.number, shard, start, outcome)
            self._log.add(row)
        else:
            reason = f"the decoder {outcome.reason}" if isinstance(outcome, Lost) else outcome
            self.failed[task.name] = reason

    def _stored(self, row: PackedSample) -> Sample:
        return Sample(self._out / row.name, None, None, row.place(self._out, self._packing))

    def _facts(self, packed: Sequence[PackedSample]) -> dict[str, Any]:
        parts = [row.part for row in packed]
        psnr = [part.psnr_db for part in parts]
        return {
            "packing": asdict(self._packing),
            "samples": len(parts),
            "frames": sum(self._packing.num_kept(part.num_frames) for part in parts),
            "bytes": sum(part.num_bytes for part in parts),
            "source_bytes": sum(row.source[0] for row in packed),
            "shards": len({row.shard for row in packed}),
            "lowest_psnr_db": min(psnr),
            "median_psnr_db": float(np.median(psnr)),
        }


def name_in_store(sample: Sample, root: Path) -> str:
    """Return the name of a sample in a store: its path below `root`, and its span."""
    name, top = os.path.normpath(Path(sample.name).absolute()), os.path.normpath(root.absolute())
    return os.path.relpath(name, top) if Path(name).is_relative_to(top) else name.lstrip("/")


def _columns(rows: Sequence[tuple[Sample, PackedSample]]) -> SampleColumns:
    names = [row.name.encode() for _, row in rows]
    stops = np.cumsum([len(name) for name in names], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), stops[:-1]])
    labels = [NO_LABEL if sample.label is None else sample.label for sample, _ in rows]
    text = np.frombuffer(b"".join(names), np.uint8)
    no_spans, none = np.empty((0, 2), np.int64), np.empty(0, np.int64)
    lines = np.arange(1, len(rows) + 1, dtype=np.int32)
    return SampleColumns(text, starts, stops, np.array(labels, np.int64), no_spans, lines, none)


def _places(packed: Sequence[PackedSample]) -> PlaceColumns:
    return PlaceColumns(
        np.array([row.shard for row in packed], np.int32),
        np.array([row.start for row in packed], np.int64),
        np.array([row.part.num_bytes for row in packed], np.int64),
        np.array([row.part.checksum for row in packed], np.uint32),
        np.array([row.start + row.part.records_at for row in packed], np.int64),
        np.array([row.part.records_checksum for row in packed], np.uint32),
        np.array([row.part.num_frames for row in packed], np.int32),
        np.array([row.part.height for row in packed], np.int32),
        np.array([row.part.width for row in packed], np.int32),
    )


def _list_text(rows: Sequence[tuple[Sample, PackedSample]]) -> str:
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerow(["name", "label", "shard", "folder", "frames", "height", "width"])
    for sample, row in rows:
        place = (shard_name(row.shard), folder_of(row.number))
        table.writerow([row.name, sample.label, *place, row.part.num_frames, row.part.height, row.part.width])
    return stream.getvalue()
