"""The work of loading a clip, measured stage by stage in this process by CPU time.

CPU time stays meaningful if other programs share the machine, and predicts what each worker process can do.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from everest_ds.config import Experiment
from everest_ds.costs.bottleneck import LoadingCost
from everest_ds.data.batch_memory import BatchMemory
from everest_ds.data.clip_source import ClipSource, Pack
from everest_ds.data.clips import TrainingClips
from everest_ds.data.order import Visit
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError
from everest_ds.models.threads import one_thread
from everest_ds.profiling.storage_rates import io_count

_NUM_VIDEOS = 32
# Readings in all, if the time allows. Decoding takes from a fifth to twice its mean, by the distance of a
# clip's start from a key frame, so a mean over fewer readings would be off by a tenth and more.
_READINGS = 96
_MOST_CLIPS = 8  # of a batch, so that short measurements make a few batches


class StageTimes(NamedTuple):
    """The measured work of loading clips.

    Attributes:
        cost: mean work per clip.
        decode_ms: decoding time by sample.
        num_clips: number of readings; a sample may be read several times.
    """

    cost: LoadingCost
    decode_ms: dict[Sample, float]
    num_clips: int


class _Reading(NamedTuple):
    """One reading of a sample: times in seconds, and bytes."""

    decode_s: float
    crop_s: float
    pack_s: float
    collate_s: float
    read_bytes: float


def measure_stages(
    samples: Sequence[Sample], config: Experiment, pack: Pack | None, budget_s: float
) -> StageTimes:
    """Measure the work of loading clips of `samples`, read as in training.

    Args:
        samples: the data set, of which a random selection is read.
        config: config of the run.
        pack: selects the tokens of a clip, which is timed too; None if the run cannot pack.
        budget_s: CPU time to spend, in seconds; at least one sample is read.

    Raises:
        DataError: if no sample can be read, or all are too short.
    """
    order = np.random.default_rng(0).permutation(len(samples))  # its first part is a fair selection, too
    chosen = [samples[int(index)] for index in order[:_NUM_VIDEOS]]
    with one_thread():
        stopwatch = _Stopwatch(chosen, config, pack)
        stopwatch.read(Visit(0, 0))  # imports the decoder
        readings: list[tuple[Sample, _Reading]] = []
        unreadable: set[int] = set()  # each would be tried twice, with a pause
        began = time.process_time()
        for number in range(max(_READINGS, len(chosen))):
            visit = Visit(*divmod(number, len(chosen)))
            if visit.sample in unreadable:
                continue
            if (reading := stopwatch.read(visit)) is not None:
                readings.append((chosen[visit.sample], reading))
            else:
                unreadable.add(visit.sample)
            if readings and time.process_time() - began > budget_s:
                break
    if not readings:
        raise DataError("no clip can be cut from the videos", given=f"{len(chosen)} videos that were tried")
    return _summary(readings, config.data.repeats)


class _Stopwatch:
    """Reads samples and times the stages of each reading."""

    def __init__(self, samples: Sequence[Sample], config: Experiment, pack: Pack | None) -> None:
        self._packs = config.data.pack_tokens or config.tokens.reads_motion
        self._pack = None if pack is None else _TimedPack(pack)
        self._clips = TrainingClips(samples, config, self._pack if self._packs else None)
        self._clips.reader.watch = self._watch
        self._hand_over = HandOver(self._clips, config.batch.micro_batch_size)
        self._decode_s, self._read_bytes = 0.0, 0

    def read(self, visit: Visit) -> _Reading | None:
        """Time one reading; return None if the sample cannot be read."""
        self._decode_s = 0.0
        self._read_bytes = 0
        packed_s = self._pack.seconds if self._pack else 0.0
        start = time.process_time()
        item = self._clips[visit]
        loaded = time.process_time()
        self._hand_over(item.clips)
        collated = time.process_time()
        if item.failures:
            return None
        crop_s = loaded - start - self._decode_s
        if self._pack and self._packs:
            crop_s -= self._pack.seconds - packed_s
        elif self._pack:
            for clip in item.clips:
                self._pack(clip.clip)
        pack_s = self._pack.seconds - packed_s if self._pack else 0.0
        size = self._clips.samples[visit.sample].file.stat().st_size
        read_bytes = min(self._read_bytes or size, size)
        return _Reading(self._decode_s, crop_s, pack_s, collated - loaded, read_bytes)

    def _watch(self, index: int | None) -> None:
        """Start the clock of the decoder before a reading, and stop it after."""
        sign = -1 if index is not None else 1
        self._decode_s += sign * time.process_time()
        self._read_bytes += sign * io_count("rchar")


class _TimedPack:
    """A selection of tokens that adds up the CPU seconds that it takes."""

    def __init__(self, pack: Pack) -> None:
        self.keeps_clips, self._pack, self.seconds = pack.keeps_clips, pack, 0.0

    def __call__(self, clip: Tensor, moved: Tensor | None = None) -> tuple[Tensor, Tensor]:
        start = time.process_time()
        packed = self._pack(clip, moved)
        self.seconds += time.process_time() - start
        return packed


class HandOver:
    """The way of clips from a worker to its rank, within one process, in batches of `size`."""

    def __init__(self, source: ClipSource, size: int) -> None:
        self._memory, self._size = BatchMemory(), min(size, _MOST_CLIPS)
        self._clips: list[Any] = []
        source.new_clip = self._memory.new_clip

    def __call__(self, clips: list[Any]) -> None:
        """Add clips to the batch in progress; once it is complete, join, send and receive it."""
        self._clips += clips
        if len(self._clips) >= self._size:
            pickle.loads(pickle.dumps(self._memory.joined(self._clips)))
            self._memory.end_batch()
            self._clips.clear()


def _summary(readings: Sequence[tuple[Sample, _Reading]], repeats: int) -> StageTimes:
    by_sample: dict[Sample, list[_Reading]] = {}
    for sample, reading in readings:
        by_sample.setdefault(sample, []).append(reading)
    means = {sample: _mean(each) for sample, each in by_sample.items()}
    mean = _mean(list(means.values()))  # every video counts once
    cost = LoadingCost(
        decode_ms=1e3 * mean.decode_s,
        crop_ms=1e3 * mean.crop_s / repeats,
        collate_ms=1e3 * mean.collate_s / repeats,
        pack_ms=1e3 * mean.pack_s / repeats,
        read_bytes=mean.read_bytes,
    )
    decode_ms = {sample: 1e3 * each.decode_s for sample, each in means.items()}
    return StageTimes(cost, decode_ms, len(readings))


def _mean(readings: Sequence[_Reading]) -> _Reading:
    return _Reading(*(fmean(values) for values in zip(*readings, strict=True)))
