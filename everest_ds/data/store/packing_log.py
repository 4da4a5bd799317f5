"""The record of packing: one line for each sample that is in a shard, so that an interrupted call resumes.

A line is appended when the sample is in the shard. What a crash leaves in a shard behind the last recorded
sample is cut off at the next start. The name of the file states the settings, so that samples with different
settings never meet in one store.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everest_ds.data.ledger import Stamp, stamp
from everest_ds.data.store.layout import SHARDS, Packing, StoredFrames, shard_name
from everest_ds.data.store.sample_members import PackedPart
from everest_ds.data.store.shards import repair_shards
from everest_ds.data.store.stored_video import check_stored
from everest_ds.data.video_list import Sample
from everest_ds.durable_files import append_row, iterate_json_rows
from everest_ds.errors import DataError, UsageError


@dataclass(frozen=True)
class PackedSample:
    """A sample in a shard.

    Attributes:
        name: its name in the store.
        source: size and time of the file that it was packed from.
        number: its number, after which its folder in the shard is named.
        shard: number of the shard.
        start: offset of its first member in the shard.
        part: its content.
    """

    name: str
    source: Stamp
    number: int
    shard: int
    start: int
    part: PackedPart

    @property
    def stop(self) -> int:
        """Offset of the end of its last member."""
        return self.start + self.part.num_bytes

    def place(self, folder: Path, packing: Packing) -> StoredFrames:
        """Return the place of its frames in the store `folder`."""
        part = self.part
        return StoredFrames(
            shard=folder / SHARDS / shard_name(self.shard),
            start=self.start,
            num_bytes=part.num_bytes,
            checksum=part.checksum,
            records_at=self.start + part.records_at,
            records_checksum=part.records_checksum,
            num_frames=part.num_frames,
            every=packing.every,
            height=part.height,
            width=part.width,
        )


class PackingLog:
    """The record of a store.

    Attributes:
        packed: the samples in the shards, by name.

    Args:
        folder: the store.
        packing: its settings.

    Raises:
        UsageError: if the folder holds samples that were packed with other settings.
        DataError: if the record cannot be read.
    """

    def __init__(self, folder: Path, packing: Packing) -> None:
        self._folder = folder
        self._packing = packing
        self._file = folder / log_name(packing)
        others = sorted(other.name for other in folder.glob(log_name(None)) if other != self._file)
        if others:
            raise UsageError(
                f"{folder}: the frames in this folder were packed with other settings",
                given=self._file.stem,
                allowed=others[0].removesuffix(".jsonl"),
                fix="use the same --short-side, --quality and --every, or another --out",
            )
        try:
            rows = [_packed(row) for row in iterate_json_rows(self._file) if row is not None]
        except OSError as error:
            raise DataError(f"{self._file}: cannot be read", given=error.strerror) from None
        self.packed = {row.name: row for row in rows if row is not None}

    @property
    def next_number(self) -> int:
        """A number that no sample has."""
        return 1 + max((row.number for row in self.packed.values()), default=-1)

    def add(self, row: PackedSample) -> None:
        """Record a sample that is now in a shard.

        Raises:
            OSError: if the record cannot be written.
        """
        append_row(self._file, asdict(row) | {"part": row.part._asdict()})
        self.packed[row.name] = row

    def has(self, sample: Sample, name: str) -> bool:
        """Return whether the sample is packed, from the present state of its file."""
        row = self.packed.get(name)
        return row is not None and row.source == stamp(sample.file)

    def forget(self, name: str) -> None:
        """Forget a sample, which will be packed again and recorded anew."""
        self.packed.pop(name, None)

    def repair_shards(self) -> int:
        """Make the shards agree with the record after an interruption, and return the next shard's number.

        Raises:
            OSError: if a shard cannot be written.
        """
        for row in repair_shards(self._folder / SHARDS, self.packed.values(), self._is_intact):
            self.forget(row.name)
        return 1 + max((row.shard for row in self.packed.values()), default=-1)

    def _is_intact(self, row: PackedSample) -> bool:
        try:
            check_stored(self._folder / row.name, row.place(self._folder, self._packing))
        except DataError:
            return False
        return True


def log_name(packing: Packing | None) -> str:
    """Return the name of the record of a store with these settings, or a pattern that matches all names."""
    if packing is None:
        return "packing-*.jsonl"
    return f"packing-side{packing.short_side}-quality{packing.quality}-every{packing.every}.jsonl"


def _packed(row: dict[str, Any]) -> PackedSample | None:
    """Return the sample that a line of the record describes, or None if the line is damaged."""
    try:
        return PackedSample(**{**row, "source": tuple(row["source"]), "part": PackedPart(**row["part"])})
    except (TypeError, KeyError):
        return None
