"""Measurements of one configuration of the data loader after the other, for `bench_data.py`."""

from __future__ import annotations

import operator
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path

from peer_loaders import videomae_loader

from everest_ds.config import BatchPlan, Experiment
from everest_ds.console import progress_of
from everest_ds.data.clips import training_batches
from everest_ds.data.store.token_cache import TokenCache
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError
from everest_ds.profiling.storage_rates import drop_from_page_cache

GIVEN, STORE, CACHE = "as given", "store", "cache"  # names of sources
SLOW, STAGED = "slow store", "staged store"  # a store on a slow disk, and its copy on a local one
JPEG, TOKENS = "jpeg", "tokens"  # names of what decodes a store and a cache
_COLD = (SLOW, STAGED)  # sources that are read from the disk, not from the page cache
_PASSES = {CACHE: 16}  # readings of every sample per measurement, where one would be over too soon


@dataclass(frozen=True)
class Cell:
    """One loader configuration, which is one row of the table.

    Attributes:
        source: the files that are read: `as given`, `gop N`, or one of the names above.
        decoder: `data.decoder`, the name above of what reads a store or cache, or the peer's name.
        workers: number of worker processes.
        repeats: clips cut from each decoded sample; 0 for a peer.
    """

    source: str
    decoder: str
    workers: int
    repeats: int


@dataclass(frozen=True)
class Bench:
    """The settings that all cells share.

    Attributes:
        sources: the samples of each source.
        cache: the token cache of the source `cache`, or None.
        batch_size: clips per micro-batch.
        batches: micro-batches per measurement.
        size: height and width of the clips, in pixels.
        peer: clone of VideoMAE's repository, or None.
        scratch: folder for temporary files.
    """

    sources: dict[str, Sequence[Sample]]
    cache: TokenCache | None
    batch_size: int
    batches: int
    size: int
    peer: Path | None
    scratch: Path

    @property
    def num_clips(self) -> int:
        """Clips per measurement."""
        return self.batch_size * self.batches


def experiment(cell: Cell, batch_size: int, size: int) -> Experiment:
    """Build a config with VideoMAE's pre-training clips: 16 frames at stride 4, multi-scale crop."""
    own_decoder = cell.decoder in (JPEG, TOKENS)
    return Experiment.model_validate(
        {
            "task": "pretrain",
            "model": {"image_size": size},
            "tokens": {"score": "pixel"},
            "data": {
                "decoder": "pyav" if own_decoder else cell.decoder,
                "num_workers": cell.workers,
                "repeats": cell.repeats,
                "draws": 1 if cell.source == CACHE else None,
                "frame_stride": 4,
                "train_crop": "multi_scale",
            },
            "batch": {"micro_batch_size": batch_size},
        }
    )


@dataclass(frozen=True)
class Measurement:
    """One timed pass over a few batches, from the start of the workers to their end.

    Attributes:
        clips: clips of all batches.
        seconds, cpu_seconds: time of the pass; CPU time is that of the rank and its workers.
        loading_cpu_seconds: the workers' part of the CPU time, or all of it without workers.
        steady_clips_per_s: clips per second after each worker has delivered its first batch, without the time
            in which the workers waited for a core that another program used, except for a slow disk.
    """

    clips: int
    seconds: float
    cpu_seconds: float
    loading_cpu_seconds: float
    steady_clips_per_s: float

    @property
    def clips_per_s(self) -> float:
        """Clips per second of wall-clock time."""
        return self.clips / self.seconds

    @property
    def cpu_ms(self) -> float:
        """CPU time per clip, in milliseconds."""
        return 1000 * self.cpu_seconds / self.clips

    @property
    def loading_cpu_ms(self) -> float:
        """CPU time per clip of the processes that load it, in milliseconds."""
        return 1000 * self.loading_cpu_seconds / self.clips


def measure(bench: Bench, cells: Sequence[Cell], rounds: int) -> dict[Cell, list[Measurement]]:
    """Measure every cell once per round; return the measurements of each cell in order of rounds."""
    found: dict[Cell, list[Measurement]] = {cell: [] for cell in cells}
    with progress_of("measuring", rounds * len(cells)) as on_progress:
        for number in range(rounds):
            for done, cell in enumerate(cells, start=1):
                found[cell].append(_measure(bench, cell, number))
                on_progress(number * len(cells) + done)
    return found


def _measure(bench: Bench, cell: Cell, number: int) -> Measurement:
    if cell.source in _COLD:
        for file in dict.fromkeys(sample.file for sample in bench.sources[cell.source]):
            drop_from_page_cache(file)
    start, before = time.perf_counter(), _cpu_seconds()
    batches = _peer_batches(bench, cell) if cell.repeats == 0 else _our_batches(bench, cell, number)
    # A slow disk goes on delivering while a worker waits for a core.
    lost_s = float if cell.source == SLOW else _seconds_without_core
    arrivals = [(clips, time.perf_counter() - start - lost_s()) for clips in batches]
    seconds, first = time.perf_counter() - start, min(max(cell.workers, 1), len(arrivals) - 1)
    rank_s, workers_s = map(operator.sub, _cpu_seconds(), before)
    return Measurement(
        sum(clips for clips, _ in arrivals),
        seconds,
        rank_s + workers_s,
        workers_s if cell.workers else rank_s,
        sum(clips for clips, _ in arrivals[first:]) / (arrivals[-1][1] - arrivals[first - 1][1]),
    )


def _seconds_without_core() -> float:
    """Return the longest time that a worker has waited for a core: batches in order wait for the slowest.

    The time is 0 on other systems than Linux, which do not count it.
    """
    if not Path("/proc/self/schedstat").exists():
        return 0.0
    waits = [
        int(Path(f"/proc/{worker.pid}/schedstat").read_text().split()[1]) for worker in active_children()
    ]
    return 1e-9 * max(waits, default=0)


def _cpu_seconds() -> tuple[float, float]:
    """Return the CPU time of this process, and that of its workers that have ended, in seconds."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, workers = (usage.ru_utime + usage.ru_stime for usage in usages)
    return own, workers


def _our_batches(bench: Bench, cell: Cell, number: int) -> Iterator[int]:
    config = experiment(cell, bench.batch_size, bench.size)
    plan = BatchPlan(bench.batch_size, 1, 1, cell.repeats)
    samples = enough(bench.sources[cell.source], plan.samples_per_step * bench.batches)
    steps = bench.batches * _PASSES.get(cell.source, 1)
    span, cache = range(number * steps, (number + 1) * steps), bench.cache if cell.source == CACHE else None
    for batch in training_batches(samples, config, plan, 0, span, False, _refuse, cache=cache):
        yield len(batch.clip)


def _peer_batches(bench: Bench, cell: Cell) -> Iterator[int]:
    assert bench.peer is not None
    videos = [s.path for s in enough(bench.sources[cell.source], bench.num_clips)]
    loader = videomae_loader(
        bench.peer, videos, bench.scratch / "videomae.csv", bench.batch_size, cell.workers
    )
    for clips, _ in loader:
        yield len(clips)


def enough(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return exactly `count` samples by cycling through `samples`."""
    return [samples[i % len(samples)] for i in range(count)]


def _refuse(failure: object) -> None:
    raise DataError("a video cannot be read", given=failure)
