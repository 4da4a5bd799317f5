"""The work of the disk for clips that are not in the page cache: the bytes that it delivers, and the wait."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

from everest_ds.config import Experiment
from everest_ds.costs.bottleneck import LoadingCost
from everest_ds.data.clips import TrainingClips
from everest_ds.data.order import Visit
from everest_ds.data.store.layout import StoredFrames
from everest_ds.data.video_list import Sample
from everest_ds.models.threads import one_thread
from everest_ds.profiling.storage_rates import drop_from_page_cache, io_count

_SCHEDULE = Path("/proc/self/schedstat")  # Linux only
_READ_S = 2.0  # duration of the measurement


def measure_cold(cost: LoadingCost, samples: Sequence[Sample], config: Experiment) -> LoadingCost:
    """Measure bytes and waiting time of clips that are read from the disk, one after the other.

    A system reads whole pages, and reads ahead, so that more bytes come from a disk than a decoder asks for.

    Args:
        cost: CPU time of loading a clip, and the bytes that its decoder asks for.
        samples: a few samples.
        config: config of the run.

    Returns:
        The cost with both; `cost` itself if the bytes do not come from a disk, or the system does not say.
    """
    clips = TrainingClips(samples, config)
    readings, began = [], time.perf_counter()
    with one_thread():  # with more threads, CPU time could exceed the time that passes
        for number in count():
            if (reading := _read_cold_clip(clips, Visit(*divmod(number, len(samples))))) is not None:
                readings.append(reading)
            if time.perf_counter() - began > _READ_S:
                break
    # A disk whose rate is limited is faster at first, for as long as its allowance lasts.
    steady = readings[len(readings) // 2 :]
    asked, delivered, idle_s = (
        (sum(values) for values in zip(*steady, strict=True)) if steady else (0, 0, 0.0)
    )
    if not delivered:
        return cost
    read_bytes = cost.read_bytes * delivered / asked
    return replace(cost, read_bytes=read_bytes, wait_ms=1e3 * max(0.0, idle_s) * read_bytes / delivered)


class _ColdReading(NamedTuple):
    """One reading: the bytes that the decoder asked for and the disk delivered, and the idle time."""

    asked: int
    delivered: int
    idle_s: float


def _read_cold_clip(clips: TrainingClips, visit: Visit) -> _ColdReading | None:
    """Read a sample that is not in the page cache; return None if it cannot be read."""
    file = clips.samples[visit.sample].file
    drop_from_page_cache(file)
    before = io_count("rchar"), io_count("read_bytes"), _idle_s()
    if clips[visit].failures:
        return None
    idle_s = _idle_s() - before[2]
    asked = min(io_count("rchar") - before[0], file.stat().st_size)
    return _ColdReading(asked, io_count("read_bytes") - before[1], idle_s)


def copies_of_stored(samples: Sequence[Sample], folder: Path) -> list[Sample]:
    """Copy samples of a store to a folder, as staging does with whole shards, and return the copies."""
    return [
        replace(sample, stored=_copied(sample.stored, folder / f"{number}.tar"))
        for number, sample in enumerate(samples)
        if sample.stored is not None
    ]


def _copied(frames: StoredFrames, file: Path) -> StoredFrames:
    """Write a sample's frames to the same place of a new file, which is empty elsewhere."""
    with open(frames.shard, "rb") as shard, open(file, "wb") as out:
        shard.seek(frames.start)
        out.seek(frames.start)
        out.write(shard.read(frames.num_bytes))
        out.flush()
        os.fsync(out.fileno())  # the page cache keeps what is not on the disk yet
    return frames._replace(shard=file)


def _idle_s() -> float:
    """Return the time since a fixed moment in which this process neither computed nor waited for a core."""
    without_core_ns = int(_SCHEDULE.read_text().split()[1]) if _SCHEDULE.exists() else 0
    return time.perf_counter() - time.process_time() - 1e-9 * without_core_ns
