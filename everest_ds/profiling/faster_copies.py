"""Copies of a few videos in forms that decode faster, made to measure what the whole data set would gain.

A new form of the data is one row of `FASTER_FORMS`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from everest_ds.config import Experiment
from everest_ds.costs.bottleneck import LoadingCost
from everest_ds.data.clip_source import Pack
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.frames import ClipFrames
from everest_ds.data.maintenance.reencode import Encoding, plan_jobs, write_verified
from everest_ds.data.store.index import open_store
from everest_ds.data.store.layout import Packing
from everest_ds.data.store.pack import StorePacker
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError
from everest_ds.profiling.loading_stages import measure_stages

_NUM_VIDEOS = 8
_MOST_FRAMES = 300  # of each video: all of the ten seconds of a video of Kinetics
_BUDGET_S = 3.0  # CPU time of reading the copies


class FasterForm(NamedTuple):
    """A form of the data that decodes faster.

    Attributes:
        copy: writes the samples in that form into an empty folder, and returns the new samples.
        apply: the command that converts a data set, with `{data}` in place of its path.
    """

    copy: Callable[[Sequence[Sample], Path], list[Sample]]
    apply: str


def _reencode(samples: Sequence[Sample], folder: Path) -> list[Sample]:
    made = []
    for job in plan_jobs(samples, Path("/"), folder):
        outcome = write_verified(job, Encoding())
        if isinstance(outcome, str):
            raise DataError(f"{job.sample.name}: cannot be re-encoded", given=outcome)
        made.append(Sample(job.target, job.sample.label))
    return made


def _pack(samples: Sequence[Sample], folder: Path) -> list[Sample]:
    packer = StorePacker(samples, Path("/"), folder, Packing(), workers=1)
    packer.pack_all(lambda done: None)
    if packer.failed:
        name, reason = next(iter(packer.failed.items()))
        raise DataError(f"/{name}: cannot be packed", given=reason)
    packer.finish()
    return list(open_store(folder))


FASTER_FORMS: dict[str, FasterForm] = {
    "pack": FasterForm(_pack, "everest-ds data pack {data} --out STORE"),
    "reencode": FasterForm(_reencode, "everest-ds data reencode {data} --out FOLDER"),
}


def representatives(decode_ms: Mapping[Sample, float]) -> list[Sample]:
    """Return a few samples whose decoding times are spread like those of all samples."""
    ordered = sorted(decode_ms, key=lambda sample: (decode_ms[sample], sample.name))
    count = min(_NUM_VIDEOS, len(ordered))
    return [ordered[(2 * place + 1) * len(ordered) // (2 * count)] for place in range(count)]


def measure_form(
    form: FasterForm, samples: Sequence[Sample], config: Experiment, pack: Pack | None
) -> LoadingCost:
    """Convert the middle of each sample in a temporary folder, and measure the work of loading its clips.

    Raises:
        DataError: if a sample cannot be read or converted.
    """
    needed, parts = ClipFrames.of(config.candidate_geometry.num_frames, config.data).needed, []
    for sample in samples:
        with open_sample(sample, config.data) as video:
            length = min(video.num_frames, max(_MOST_FRAMES, 2 * needed))
            start = (sample.span[0] if sample.span else 0) + (video.num_frames - length) // 2
        parts.append(Sample(sample.path, sample.label, (start, start + length)))
    with tempfile.TemporaryDirectory(prefix="everest-ds-") as folder:
        return measure_stages(form.copy(parts, Path(folder)), config, pack, _BUDGET_S).cost
