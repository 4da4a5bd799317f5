"""What is known about the videos of a manifest: which are broken, why, and which were found whole.

A ledger is `<manifest>.ledger.jsonl` beside its manifest: one JSON object a line, appended, the last line of
a video counts. A line holds the size and time of change of the file it speaks of; once the file is another,
it says nothing any more. A line that was cut off by a crash is no line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from everest_ds.data.manifest import Sample
from everest_ds.errors import DataError

SUFFIX = ".ledger.jsonl"
Source = Literal["ends", "every_frame", "run"]
Stamp = tuple[int, int]  # bytes, time of change in ns; (-1, -1): there is no such file


@dataclass(frozen=True)
class Entry:
    """What was found out about a video.

    Attributes:
        video: the sample, as `Sample.name`.
        reason: why it is broken; empty: it is not.
        num_frames: pictures of the sample; 0 where they could not be counted.
        num_bytes, changed_ns: of the file, when it was looked at.
        source: who found out: a check of the ends, one of every frame, or a training run that failed on it.
    """

    video: str
    reason: str
    num_frames: int
    num_bytes: int
    changed_ns: int
    source: Source

    def fault(self, min_frames: int) -> str:
        """Why a clip of `min_frames` frames cannot be cut from it; empty: it can."""
        if self.reason or self.num_frames >= min_frames:
            return self.reason
        return f"too short; given: {self.num_frames} frames; allowed: {min_frames} or more"

    def settles(self, every_frame: bool) -> bool:
        """Whether a check, of every frame or of the ends, would find out nothing more."""
        return self.source == "every_frame" or (
            self.source == "ends" and (self.reason != "" or not every_frame)
        )

    @property
    def stamp(self) -> Stamp:
        """Tells this file from another of the same name."""
        return self.num_bytes, self.changed_ns


@dataclass(frozen=True)
class Problem:
    """A sample that cannot be used.

    Attributes:
        sample: which.
        reason: what is wrong with it.
    """

    sample: Sample
    reason: str


@dataclass(frozen=True)
class Usable:
    """A manifest without its broken samples.

    Attributes:
        samples: what is left, in the manifest's order.
        excluded: what is not, in the same order.
    """

    samples: list[Sample]
    excluded: list[Problem]


class Ledger:
    """The ledger of a manifest; see `read`."""

    def __init__(self, path: Path, entries: Iterable[Entry]) -> None:
        self.path = path
        self._entries = {entry.video: entry for entry in entries}

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """The ledger in file `path`; an empty one if there is no such file.

        Raises:
            DataError: the file cannot be read, or is no ledger.
        """
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return cls(path, [])
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot read the ledger", given=str(error)) from None
        return cls(path, (entry for line in lines if (entry := _entry(path, line)) is not None))

    @classmethod
    def of_manifest(cls, manifest: Path) -> Ledger:
        """The ledger beside `manifest`."""
        return cls.read(manifest.with_name(manifest.name + SUFFIX))

    def known(self, sample: Sample) -> Entry | None:
        """What is known about the file as it is now; None: nothing."""
        entry = self._entries.get(sample.name)
        return entry if entry is not None and entry.stamp == stamp(sample.path) else None

    def broken(self, sample: Sample, min_frames: int = 1) -> str | None:
        """Why this sample cannot be used; None: as far as known it can."""
        entry = self._entries.get(sample.name)
        fault = entry and entry.fault(min_frames)
        if entry is None or not fault:  # the common case asks the file system nothing
            return None
        return fault if entry.stamp == stamp(sample.path) else None

    def record(
        self,
        sample: Sample,
        reason: str,
        num_frames: int = 0,
        *,
        by_run: bool = False,
        every_frame: bool = False,
    ) -> Entry:
        """Append what was found out; several processes may do so at once.

        Args:
            reason: why the sample is broken; empty: it is not.
            by_run: a run found out, not a check; a check looks again.
            every_frame: all frames were decoded, not just those at the ends.

        Raises:
            DataError: the file cannot be written.
        """
        size, changed = stamp(sample.path)
        source: Source = "run" if by_run else "every_frame" if every_frame else "ends"
        entry = Entry(sample.name, reason, num_frames, size, changed, source)
        try:
            with open(self.path, "ab+") as file:
                file.write(b"" if _at_line_start(file) else b"\n")
                file.write(json.dumps(asdict(entry)).encode() + b"\n")  # one write: no other gets in between
        except OSError as error:
            raise DataError(f"{self.path}: cannot write the ledger", given=error.strerror) from None
        self._entries[entry.video] = entry
        return entry


def exclude(samples: Sequence[Sample], ledger: Ledger, min_frames: int = 1) -> Usable:
    """Leave out, by name, what the ledger knows to be broken, or shorter than `min_frames`."""
    reasons = [ledger.broken(sample, min_frames) for sample in samples]
    found = list(zip(samples, reasons, strict=True))
    return Usable(
        [sample for sample, reason in found if reason is None],
        [Problem(sample, reason) for sample, reason in found if reason is not None],
    )


def stamp(path: Path) -> Stamp:
    """Size and time of change of a file, links followed."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _entry(path: Path, line: str) -> Entry | None:
    if not line.strip():
        return None
    try:
        return Entry(**json.loads(line))
    except json.JSONDecodeError:
        return None
    except TypeError:
        raise DataError(f"{path}: not a ledger of this version", given=line[:80], fix="remove it") from None


def _at_line_start(file: BinaryIO) -> bool:
    """Whether a file ends as it should, and not within a line whose writer was killed."""
    return file.seek(0, os.SEEK_END) == 0 or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n"
