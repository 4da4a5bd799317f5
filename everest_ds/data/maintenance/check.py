"""The manifest check: a search for unreadable or short videos before training, recorded in the ledger.

Every file is opened in a worker process, so that a file that crashes or hangs its decoder becomes a finding
and does not end the check. Files that the ledger already covers are skipped unless they have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from everest_ds.config import DataConfig
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.decoding.pyav import find_missing_end
from everest_ds.data.ledger import CheckSource, Ledger, Problem
from everest_ds.data.maintenance.isolation import CHECK_TIMEOUT_S, Lost, map_isolated
from everest_ds.data.store.stored_video import check_stored
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError


class VideoCheck(NamedTuple):
    """The result of checking one video.

    Attributes:
        reason: what is wrong with the video; empty if nothing is.
        num_frames: number of frames of the sample; 0 if they could not be counted.
    """

    reason: str
    num_frames: int


class Checked(NamedTuple):
    """The result of checking a manifest.

    Attributes:
        problems: the broken samples, in the manifest's order.
        too_short: the intact samples that are too short, in the same order.
        num_known: number of samples that the ledger already covered.
    """

    problems: list[Problem]
    too_short: list[Problem]
    num_known: int


def check_manifest(
    samples: Sequence[Sample],
    ledger: Ledger,
    data: DataConfig,
    *,
    min_frames: int,
    workers: int,
    on_progress: Callable[[int], None],
    every_frame: bool = False,
    timeout_s: float = CHECK_TIMEOUT_S,
) -> Checked:
    """Open every video, count its frames, decode the first and last one, and record the result in the ledger.

    Args:
        samples: the samples of the manifest.
        ledger: the ledger of this manifest, from which an interrupted check resumes.
        data: the data config, which names the decoder.
        min_frames: shortest usable video, in frames. A shorter video is reported as too short; the ledger
            records its number of frames and no fault.
        workers: number of processes.
        on_progress: called after each sample with the number of samples done.
        every_frame: decode all frames, including those of videos that an earlier check of the first and last
            frame found intact.
        timeout_s: a file that occupies a decoder for longer counts as broken.
    """
    known = {
        i: entry for i, s in enumerate(samples) if (entry := ledger.known(s)) and entry.settles(every_frame)
    }
    left = [i for i in range(len(samples)) if i not in known]
    source: CheckSource = "every_frame" if every_frame else "ends"
    entries = dict(known)
    on_progress(len(entries))
    inspect = partial(find_fault, data=data, every_frame=every_frame)
    outcomes = map_isolated(inspect, [samples[i] for i in left], workers=workers, timeout_s=timeout_s)
    for place, outcome in outcomes:
        finding = VideoCheck(f"the decoder {outcome.reason}", 0) if isinstance(outcome, Lost) else outcome
        index = left[place]
        entries[index] = ledger.record(samples[index], *finding, source)
        on_progress(len(entries))
    problems, too_short = list[Problem](), list[Problem]()
    for index, sample in enumerate(samples):
        if fault := entries[index].fault(min_frames):
            (problems if entries[index].reason else too_short).append(Problem(sample, fault))
    return Checked(problems, too_short, len(known))


def find_fault(sample: Sample, data: DataConfig, every_frame: bool = False) -> VideoCheck:
    """Decode the first and last frame of a video, or every frame; return its fault and number of frames.

    All bytes of a sample in a frame store are checked.
    """
    try:
        if sample.stored is not None:
            check_stored(sample.path, sample.stored)
            return VideoCheck("", sample.stored.num_frames)
        with open_sample(sample, data) as video:
            count = video.num_frames
            if every_frame:
                for _ in video.read_all():
                    pass
            video.read([0, count - 1])
        fault = find_missing_end(sample.path) if sample.span is None else ""
    except DataError as error:
        return VideoCheck(str(error).removeprefix(f"{sample.path}: "), 0)
    return VideoCheck(fault, 0 if fault else count)
