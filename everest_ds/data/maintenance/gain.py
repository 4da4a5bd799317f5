"""The gain of re-encoding or packing: how much faster clips are read from the new files than from the old."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from everest_ds.config import DataConfig
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.frames import ClipFrames
from everest_ds.data.video_list import Sample


class Gain(NamedTuple):
    """The reading times and file sizes before and after re-encoding; times are medians of interleaved runs.

    Attributes:
        clips: number of clips that were timed.
        before_ms, after_ms: median time to open a file and decode one clip.
        before_bytes, after_bytes: total size of the files.
    """

    clips: int
    before_ms: float
    after_ms: float
    before_bytes: int
    after_bytes: int

    def facts(self, clip: str) -> dict[str, Any]:
        """Return the measurement as the rows of a table; `clip` describes the clips that were read."""
        faster, smaller = self.before_ms > self.after_ms, self.after_bytes < self.before_bytes
        gains = " and ".join(["faster"] * faster + ["smaller"] * smaller)
        return {
            "decode_before_ms": self.before_ms,
            "decode_after_ms": self.after_ms,
            "speedup": self.before_ms / self.after_ms,
            "size_after_pct": 100 * self.after_bytes / self.before_bytes,
            "measured_on": f"{self.clips} clips of {clip}; medians of interleaved runs",
            "worth_it": gains or "no: keep the original videos, or lower --short-side",
        }

    def rates(self, clip: str) -> dict[str, Any]:
        """Return the clips that one core decodes per second; `clip` describes the clips that were read."""
        return {
            "clips_per_s_per_core_before": round(1000 / self.before_ms, 1),
            "clips_per_s_per_core_after": round(1000 / self.after_ms, 1),
            "speedup": round(self.before_ms / self.after_ms, 1),
            "measured_on": f"{self.clips} clips of {clip}, decoded only",
        }


def measure_gain(
    pairs: Sequence[tuple[Sample, Sample]], data: DataConfig, num_frames: int, repeats: int = 3
) -> Gain | None:
    """Time reading random training clips from the old and new files; return None if all are too short."""
    clip = ClipFrames.of(num_frames, data)
    times: dict[int, list[float]] = {0: [], 1: []}
    for number, pair in enumerate(pairs):
        for repeat in range(repeats):
            for side, sample in enumerate(pair):
                start = time.perf_counter()
                with open_sample(sample, data) as video:
                    if video.num_frames < clip.needed:
                        break
                    rng = np.random.default_rng([number, repeat])
                    video.read(clip.for_training(video.num_frames, rng))
                times[side].append(1e3 * (time.perf_counter() - start))
    if not times[1]:
        return None
    before, after = (float(np.median(times[side])) for side in (0, 1))
    sizes = [sum(_num_bytes(pair[side]) for pair in pairs) for side in (0, 1)]
    return Gain(len(times[1]), before, after, *sizes)


def _num_bytes(sample: Sample) -> int:
    return sample.path.stat().st_size if sample.stored is None else sample.stored.num_bytes
