"""Re-encoding of a manifest's videos for fast decoding: smaller pictures, key frames close together.

To read a clip of a few frames, a decoder must decode everything from the preceding key frame on. Frames keep
their numbers: a new file has one picture for each of the source's, in order and upright, without sound. A
span of a video becomes a video of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from everest_ds.config import DataConfig
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.decoding.probe import probe
from everest_ds.data.decoding.pyav import naming
from everest_ds.data.ledger import Ledger
from everest_ds.data.maintenance.isolation import REENCODE_TIMEOUT_S, Lost, map_isolated
from everest_ds.data.maintenance.picture_error import check_psnr, psnr_db
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError
from everest_ds.output_paths import output_below

_NUM_TIMED = 20  # number of videos that the speedup is measured on


@dataclass(frozen=True)
class Encoding:
    """The encoder settings of the new files.

    Attributes:
        short_side: short side of the pictures, in pixels; smaller pictures keep their size.
        gop: number of frames from one key frame to the next.
        crf: x264's constant rate factor; a lower value gives better quality and larger files.
        preset: x264's preset, which trades encoding time for file size.
    """

    short_side: int = 256
    gop: int = 8
    crf: int = 20
    preset: str = "medium"


class ReencodeTask(NamedTuple):
    """A sample and the file that it is re-encoded to."""

    sample: Sample
    target: Path


class Reencoded(NamedTuple):
    """The result of re-encoding a manifest.

    Attributes:
        samples: the re-encoded samples, in the manifest's order.
        failed: the samples that could not be re-encoded, as (sample, reason).
        num_known: number of samples that had been re-encoded earlier.
    """

    samples: list[Sample]
    failed: list[tuple[Sample, str]]
    num_known: int


def plan_jobs(samples: Sequence[Sample], root: Path, out: Path) -> list[ReencodeTask]:
    """Map each sample to an MP4 file below `out`, at the same relative path as below `root`.

    Raises:
        DataError: if two samples would be written to the same file.
        UsageError: if a file would lie outside `out`, or overwrite a source.
    """
    jobs: dict[Path, ReencodeTask] = {}
    sources = {sample.path.resolve() for sample in samples}
    top = _without_dots(root)
    for sample in samples:
        path = _without_dots(sample.path)
        place = path.relative_to(top) if path.is_relative_to(top) else Path(*path.parts[1:])
        part = "" if sample.span is None else f"_{sample.span[0]}-{sample.span[1]}"
        target = output_below(out, place.with_name(f"{place.stem}{part}.mp4"), sources)
        other = jobs.setdefault(target, ReencodeTask(sample, target)).sample
        if other.name != sample.name:
            raise DataError(
                f"{target}: two videos would be written to this file",
                given=f"{other.name}, {sample.name}",
                fix="rename one of them",
            )
    return list(jobs.values())


def _without_dots(path: Path) -> Path:
    """Return the absolute path without `..`, but with the names of links, which name the new files."""
    return Path(os.path.normpath(path.absolute()))


def reencode_videos(
    jobs: Sequence[ReencodeTask],
    ledger: Ledger,
    encoding: Encoding,
    *,
    workers: int,
    on_progress: Callable[[int], None],
    timeout_s: float = REENCODE_TIMEOUT_S,
) -> Reencoded:
    """Write the file of every job, verify it, and record in `ledger` (of the new files) that it is intact.

    Files that the ledger lists as intact are not written again, so an interrupted call can be repeated.

    Args:
        jobs: the samples and their target files.
        ledger: the ledger of the new files.
        encoding: the encoder settings.
        workers: number of processes.
        on_progress: called after each sample with the number of samples done.
        timeout_s: a file that takes longer counts as failed.
    """
    made = [Sample(job.target, job.sample.label) for job in jobs]
    reasons = {i: "" for i, sample in enumerate(made) if (entry := ledger.known(sample)) and entry.is_intact}
    num_known = len(reasons)
    left = [i for i in range(len(jobs)) if i not in reasons]
    on_progress(num_known)
    outcomes = map_isolated(
        partial(write_verified, encoding=encoding),
        [jobs[i] for i in left],
        workers=workers,
        timeout_s=timeout_s,
    )
    for place, outcome in outcomes:
        index = left[place]
        if isinstance(outcome, Lost):
            reasons[index] = f"the decoder or encoder {outcome.reason}"
        elif isinstance(outcome, str):
            reasons[index] = outcome
        else:
            reasons[index] = ""
            ledger.record(made[index], "", outcome)
        on_progress(len(reasons))
    failed = [(job.sample, reasons[i]) for i, job in enumerate(jobs) if reasons[i]]
    return Reencoded([s for i, s in enumerate(made) if not reasons[i]], failed, num_known)


def write_verified(job: ReencodeTask, encoding: Encoding) -> int | str:
    """Write one file and verify it; return its number of frames, or what is wrong with it or its source.

    The file is written under a temporary name and renamed only after it was verified.
    """
    partial_file = job.target.with_name(f".{job.target.name}.{os.getpid()}.tmp.mp4")
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        with naming(job.target):
            count = _write(job.sample, partial_file, encoding)
        _verify(job.sample, partial_file, count, encoding)
        os.replace(partial_file, job.target)
    except DataError as error:
        return str(error).removeprefix(f"{job.sample.path}: ")
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    finally:
        partial_file.unlink(missing_ok=True)
    return count


def pairs_to_time(jobs: Sequence[ReencodeTask], samples: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Return (old, new) samples to measure the speedup on, spread evenly over the re-encoded `samples`."""
    made = {sample.path: sample for sample in samples}
    pairs = [(job.sample, made[job.target]) for job in jobs if job.target in made]
    return pairs[:: max(1, len(made) // _NUM_TIMED)][:_NUM_TIMED]


def _reading(encoding: Encoding) -> DataConfig:
    """Return the data config for reading sources: PyAV is exact for every file and can shrink pictures."""
    return DataConfig(decoder="pyav", decode_short_side=encoding.short_side)


def _write(sample: Sample, target: Path, encoding: Encoding) -> int:
    import av

    rate, header = probe(sample.path).frame_rate, {"movflags": "faststart"}
    with (
        open_sample(sample, _reading(encoding)) as video,
        av.open(str(target), "w", options=header) as container,
    ):
        options = {"crf": str(encoding.crf), "preset": encoding.preset}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.gop_size = encoding.gop
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for number, picture in enumerate(_even(picture) for part in video.read_all() for picture in part):
            if number == 0:
                stream.height, stream.width = picture.shape[:2]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            frame.time_base = 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        return video.num_frames


def _even(picture: torch.Tensor) -> np.ndarray[Any, Any]:
    """Crop a picture to even sides, because 4:2:0 halves the chroma planes."""
    height, width = (max(2, side - side % 2) for side in picture.shape[:2])
    return picture[:height, :width].contiguous().numpy()


def _verify(sample: Sample, target: Path, count: int, encoding: Encoding) -> None:
    """Check that the new file has the source's number of frames and matches its first and last picture.

    Raises:
        DataError: if the number of frames or a picture differs.
    """
    with (
        open_sample(sample, _reading(encoding)) as source,
        open_sample(Sample(target, None), DataConfig()) as new,
    ):
        if new.num_frames != count:
            raise DataError("re-encoded to a wrong number of frames", given=new.num_frames, allowed=count)
        expected = [_even(picture) for picture in source.read([0, count - 1])]
        written = new.read([0, count - 1]).numpy()
    for before, after in zip(expected, written, strict=True):
        check_psnr(psnr_db(before, after))
