"""The ledger of a manifest: a record of which videos are broken, and why, and which were found intact.

A ledger is the file `<manifest>.ledger.jsonl` beside its manifest. It holds one JSON object per line and is
only appended to; the last line about a video counts. A line records the size and modification time of its
video file and is ignored once the file has changed. A line that a crash cut off is ignored too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from everest_ds.data.video_list import Sample, leave_out, names_and_labels
from everest_ds.durable_files import append_row, iterate_json_rows
from everest_ds.errors import DataError

SUFFIX = ".ledger.jsonl"
CheckSource = Literal["ends", "every_frame", "run"]
Stamp = tuple[int, int]  # size in bytes, modification time in ns; (-1, -1): there is no such file


@dataclass(frozen=True)
class LedgerEntry:
    """A line of the ledger: the result of checking, or failing to read, one video.

    Attributes:
        video: the sample, as `Sample.name`.
        reason: why the video is broken; empty if it is not.
        num_frames: number of frames of the sample; 0 if they could not be counted.
        num_bytes, changed_ns: size and modification time of the file when it was checked or read.
        source: origin of the entry: `ends`, a check of the first and last frame; `every_frame`, a check of
            all frames; or `run`, a training run that failed to read the video.
    """

    video: str
    reason: str
    num_frames: int
    num_bytes: int
    changed_ns: int
    source: CheckSource

    def fault(self, min_frames: int) -> str:
        """Return why no clip of `min_frames` frames can be cut from the video, or an empty string."""
        if self.reason or self.num_frames >= min_frames:
            return self.reason
        return f"too short; given: {self.num_frames} frames; allowed: {min_frames} or more"

    @property
    def is_intact(self) -> bool:
        """True if the video was found without a fault, and its frames could be counted."""
        return not self.reason and self.num_frames > 0

    def settles(self, every_frame: bool) -> bool:
        """Return whether this entry makes another check, of every frame or of the two ends, unnecessary."""
        return self.source == "every_frame" or (
            self.source == "ends" and (self.reason != "" or not every_frame)
        )

    @property
    def stamp(self) -> Stamp:
        """The size and modification time of the file, which identify this version of it."""
        return self.num_bytes, self.changed_ns


@dataclass(frozen=True)
class Problem:
    """A sample that cannot be used.

    Attributes:
        sample: the sample.
        reason: what is wrong with it.
    """

    sample: Sample
    reason: str


@dataclass(frozen=True)
class Usable:
    """A manifest without its broken samples.

    Attributes:
        samples: the usable samples, in the manifest's order.
        excluded: the other samples with their faults, in the same order.
    """

    samples: Sequence[Sample]
    excluded: list[Problem]


class Ledger:
    """The ledger of a manifest, opened with `read` or `of_manifest`."""

    def __init__(self, path: Path, entries: dict[str, LedgerEntry]) -> None:
        self.path = path
        self._entries = entries

    @classmethod
    def read(cls, path: Path, faults_below: int | None = None) -> Ledger:
        """Read the ledger in the file `path`; return an empty ledger if there is no such file.

        Args:
            path: the ledger.
            faults_below: keep only the entries of broken videos and of those with fewer frames than this,
                because a million entries of intact videos take a gigabyte.

        Raises:
            DataError: if the file cannot be read, or is not a ledger.
        """
        entries: dict[str, LedgerEntry] = {}
        try:
            for row in iterate_json_rows(path):
                if row is None:
                    continue
                entry = _entry(path, row)
                if faults_below is None or entry.fault(faults_below):
                    entries[entry.video] = entry
                else:
                    entries.pop(entry.video, None)
        except OSError as error:
            raise DataError(f"{path}: cannot read the ledger", given=str(error)) from None
        return cls(path, entries)

    @classmethod
    def of_manifest(cls, manifest: Path, faults_below: int | None = None) -> Ledger:
        """Read the ledger that lies beside `manifest`, like `read`."""
        return cls.read(manifest.with_name(manifest.name + SUFFIX), faults_below)

    def faulty(self, min_frames: int) -> set[str]:
        """Return the names of the samples that are listed as broken, or shorter than `min_frames`."""
        return {name for name, entry in self._entries.items() if entry.fault(min_frames)}

    def known(self, sample: Sample) -> LedgerEntry | None:
        """Return the entry about the sample's file in its present state, or None if there is none."""
        entry = self._entries.get(sample.name)
        return entry if entry is not None and entry.stamp == stamp(sample.file) else None

    def broken(self, sample: Sample, min_frames: int = 1) -> str | None:
        """Return why this sample cannot be used, or None if no fault is known."""
        entry = self._entries.get(sample.name)
        fault = entry and entry.fault(min_frames)
        if entry is None or not fault:  # returns early, so that the common case needs no file system access
            return None
        return fault if entry.stamp == stamp(sample.file) else None

    def record(
        self,
        sample: Sample,
        reason: str,
        num_frames: int = 0,
        source: CheckSource = "ends",
    ) -> LedgerEntry:
        """Append an entry about `sample`; several processes may do so at once.

        Args:
            sample: the sample that was checked or read.
            reason: why the sample is broken; empty if it is not.
            num_frames: number of frames of the sample; 0 if they could not be counted.
            source: origin of the entry; a fault that a `run` found is checked again.

        Raises:
            DataError: if the file cannot be written.
        """
        size, changed = stamp(sample.file)
        entry = LedgerEntry(sample.name, reason, num_frames, size, changed, source)
        try:
            append_row(self.path, asdict(entry))
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"{self.path}: cannot write the ledger", given=reason) from None
        self._entries[entry.video] = entry
        return entry


def exclude(samples: Sequence[Sample], ledger: Ledger, min_frames: int = 1) -> Usable:
    """Separate the samples that the ledger lists as broken, or shorter than `min_frames`, from the others."""
    listed = ledger.faulty(min_frames)
    suspects = (
        [row for row, (name, _) in enumerate(names_and_labels(samples)) if name in listed] if listed else []
    )
    reasons = {row: reason for row in suspects if (reason := ledger.broken(samples[row], min_frames))}
    if not reasons:
        return Usable(samples, [])
    excluded = [Problem(samples[row], reason) for row, reason in reasons.items()]
    return Usable(leave_out(samples, list(reasons)), excluded)


def stamp(path: Path) -> Stamp:
    """Return the size and modification time of a file, following links; (-1, -1) if there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _entry(path: Path, row: dict[str, Any]) -> LedgerEntry:
    try:
        return LedgerEntry(**row)
    except TypeError:
        fix = "remove the file; a new check writes it again"
        raise DataError(f"{path}: not a ledger of this version", given=str(row)[:80], fix=fix) from None
