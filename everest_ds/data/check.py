"""Look for trouble in the videos of a manifest before a training run does, and write it into its ledger.

Every file is opened in a worker process: one that kills its decoder, or keeps it for ever, is a finding, not
the end of the check. What the ledger knows already is not looked at again, unless the file has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from everest_ds.config import DataConfig
from everest_ds.data.decode import open_sample
from everest_ds.data.decode_pyav import find_missing_end
from everest_ds.data.isolation import Lost, map_isolated
from everest_ds.data.ledger import Ledger, Problem
from everest_ds.data.manifest import Sample
from everest_ds.errors import DataError

HANG_S = 120.0
_AT_ONCE = 32  # frames held in memory


class Finding(NamedTuple):
    """What looking at a video found out.

    Attributes:
        reason: what is wrong with it; empty: nothing is.
        num_frames: of the sample; 0 where they could not be counted.
    """

    reason: str
    num_frames: int


class Checked(NamedTuple):
    """A checked manifest.

    Attributes:
        problems: in the manifest's order.
        num_known: samples that the ledger knew already.
    """

    problems: list[Problem]
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
    timeout_s: float = HANG_S,
) -> Checked:
    """Open every video, count its frames and decode its first and last one; the ledger learns all of it.

    Args:
        ledger: of this manifest. Stopped at any time, a check goes on where it was.
        data: names the decoder.
        min_frames: a shorter video is a problem, though not broken: the ledger keeps its frames.
        workers: number of processes.
        on_progress: told how many samples are done, after each.
        every_frame: decode all frames, also of what was found whole by its ends.
        timeout_s: a file that keeps a decoder longer is broken.
    """
    known = {
        i: entry for i, s in enumerate(samples) if (entry := ledger.known(s)) and entry.settles(every_frame)
    }
    left = [i for i in range(len(samples)) if i not in known]
    entries = dict(known)
    on_progress(len(entries))
    inspect = partial(find_fault, data=data, every_frame=every_frame)
    outcomes = map_isolated(inspect, [samples[i] for i in left], workers=workers, timeout_s=timeout_s)
    for place, outcome in outcomes:
        finding = Finding(f"the decoder {outcome.reason}", 0) if isinstance(outcome, Lost) else outcome
        index = left[place]
        entries[index] = ledger.record(samples[index], *finding, every_frame=every_frame)
        on_progress(len(entries))
    faults = [(sample, entries[i].fault(min_frames)) for i, sample in enumerate(samples)]
    problems = [Problem(sample, reason) for sample, reason in faults if reason]
    return Checked(problems, len(known))


def find_fault(sample: Sample, data: DataConfig, every_frame: bool = False) -> Finding:
    """What is wrong with a video."""
    try:
        with open_sample(sample, data) as video:
            count = video.num_frames
            for first in range(0, count, _AT_ONCE) if every_frame else ():
                video.read(range(first, min(first + _AT_ONCE, count)))
            video.read([0, count - 1])
        fault = find_missing_end(sample.path) if sample.span is None else ""
    except DataError as error:
        return Finding(str(error).removeprefix(f"{sample.path}: "), 0)
    return Finding(fault, 0 if fault else count)
