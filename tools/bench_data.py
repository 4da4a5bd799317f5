"""Benchmark of the data loader: clips per second, CPU time by stage, remedies, and the GPUs that it feeds.

Example:
    python tools/bench_data.py FOLDER_OF_VIDEOS --workers 1 --workers 2 --repeats 1 --repeats 4 --gop 8
        --peer videomae=../VideoMAE --gpu-rate "vit_base on an H100=900" --json data.json

Every cell of the table is measured once per round, one cell after the other, so that other load on the
machine affects all cells equally. Medians are over rounds; ratios to the peer are taken within a round.
CPU time covers the rank and its workers, and stays meaningful even if other programs share the machine; the
gains of remedies leave out the time in which workers waited for a core (Linux only).

With `--workers 1 --workers 2 --repeats 1 --repeats 4 --gop 8`, the gains of these remedies that
`everest-ds doctor --data` predicts stand beside the measured ones.
"""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import active_children
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peer_loaders import videomae_loader

from everest_ds.cli.options import JsonFile
from everest_ds.cli.program import run_program
from everest_ds.config import BatchPlan, Experiment
from everest_ds.console import print_table, progress_of, write_json
from everest_ds.costs.bottleneck import (
    Change,
    LoadingCost,
    Supply,
    changed_settings,
    find_bottleneck,
    find_remedies,
)
from everest_ds.costs.clip_supply import run_supply
from everest_ds.data.clips import training_batches
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.frames import ClipFrames
from everest_ds.data.ledger import Ledger
from everest_ds.data.maintenance.reencode import Encoding, plan_jobs, reencode_videos
from everest_ds.data.store.index import open_store
from everest_ds.data.store.layout import Packing
from everest_ds.data.store.pack import StorePacker
from everest_ds.data.video_files import VIDEO_SUFFIXES
from everest_ds.data.video_list import Sample, read_manifest
from everest_ds.errors import DataError, UsageError
from everest_ds.launch.local import available_cores
from everest_ds.profiling.faster_copies import FASTER_FORMS, measure_form, representatives
from everest_ds.profiling.loading_stages import StageTimes, measure_stages
from everest_ds.training.run_folder import describe_environment

_GIVEN = "as given"
_STAGES_S = 10.0  # CPU time of measuring the stages of one source, decoder and R
STORE, JPEG = "store", "jpeg"  # name of the source, and of what decodes it, in the tables
_HEADROOM = 1.25  # loader rate over model rate; with less, slow clips make the model wait


@dataclass(frozen=True)
class Cell:
    """One loader configuration, which is one row of the table.

    Attributes:
        source: the files that are read: `as given`, `gop N` or `store`.
        decoder: `data.decoder`, or the peer's name.
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
        batch_size: clips per micro-batch.
        batches: micro-batches per measurement.
        size: height and width of the clips, in pixels.
        peer: clone of VideoMAE's repository, or None.
        scratch: folder for temporary files.
    """

    sources: dict[str, list[Sample]]
    batch_size: int
    batches: int
    size: int
    peer: Path | None
    scratch: Path


def main(
    videos: Annotated[Path, typer.Argument(help="A folder of videos, or a manifest.")],
    decoder: Annotated[list[str], typer.Option(help="data.decoder; repeatable.")] = ["decord", "pyav"],  # noqa: B006
    workers: Annotated[list[int], typer.Option(help="data.num_workers; repeatable.")] = [1],  # noqa: B006
    repeats: Annotated[list[int], typer.Option(help="data.repeats; repeatable.")] = [1, 4],  # noqa: B006
    gop: Annotated[list[int], typer.Option(help="Add copies with this GOP length.")] = [],  # noqa: B006
    store: Annotated[bool, typer.Option("--store", help="Add a frame store of the videos.")] = False,
    short_side: Annotated[int, typer.Option(help="Short side of copies and store, in pixels.")] = 256,
    size: Annotated[int, typer.Option(help="Height and width of the clips, in pixels.")] = 224,
    batch: Annotated[int, typer.Option(help="Clips per micro-batch.")] = 8,
    batches: Annotated[int, typer.Option(help="Micro-batches per measurement.")] = 4,
    rounds: Annotated[int, typer.Option(help="Measurements per table row.")] = 5,
    peer: Annotated[str | None, typer.Option(help="videomae=FOLDER, a clone of its repository.")] = None,
    gpu_rate: Annotated[list[str], typer.Option(help="MODEL=CLIPS_PER_S of one GPU.")] = [],  # noqa: B006
    cores: Annotated[int, typer.Option(help="CPU cores of the node to be fed.")] = os.cpu_count() or 1,
    json_file: JsonFile = None,
) -> None:
    """Measure the data loader, and report how many GPUs it can feed."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        given = find_videos(videos)
        sources = {_GIVEN: given} | {
            f"gop {n}": reencoded(given, Path(folder) / f"gop{n}", Encoding(short_side, n)) for n in gop
        }
        if store:
            sources[STORE] = packed(given, Path(folder) / "store", Packing(short_side))
        bench = Bench(sources, batch, batches, size, parse_peer(peer), Path(folder))
        readers = [(s, d) for s in sources for d in (decoder if s != STORE else [JPEG])]
        cells = [Cell(s, d, w, r) for s, d in readers for w in workers for r in repeats]
        if bench.peer:
            cells += [
                Cell(source, "videomae", w, 0) for source in sources if source != STORE for w in workers
            ]
        found = measure(bench, cells, rounds)
        timed = {
            (s, d, r): measure_stages(sources[s], experiment(Cell(s, d, 0, r), batch, size), None, _STAGES_S)
            for s, d in readers
            for r in repeats
        }
        stages = [stage_row(*key, times.cost) for key, times in timed.items()]
        rows = [row(cell, found, stages) for cell in cells]
        gains = [gain for d in decoder for gain in remedy_rows(bench, found, timed, d, min(workers))]
        fed = feeding(timed, gpu_rate, cores)
        print_table("Clips per second", rows)
        print_table("CPU time per clip by stage, in one process, ms", stages)
        if gains:
            print_table("Remedies: predicted against measured", gains)
        print_table(f"GPUs that {cores} cores feed", fed)
        advice = [line for key in timed for line in advise(bench, *key, timed[key].cost, cores)]
        for line in advice:
            typer.echo(f"- {line}")
    facts = {"environment": describe_environment(1), "videos": [sample.name for sample in given]}
    raw = [{**asdict(cell), "runs": [asdict(run) for run in found[cell]]} for cell in cells]
    tables = {
        "cells": rows,
        "stages": stages,
        "remedies": gains,
        "feeds": fed,
        "advice": advice,
        "measurements": raw,
    }
    write_json(json_file, {**facts, **tables})


def find_videos(place: Path) -> list[Sample]:
    """Return the samples that are long enough for a clip, and print the others with the reason.

    Raises:
        DataError: no sample is long enough.
    """
    if place.is_dir():
        paths = sorted(p for p in place.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
        samples = [Sample(path.absolute(), 0) for path in paths]
    else:
        samples = list(read_manifest(place, root=None, num_classes=None, labelled=False))
    data = experiment(Cell("", "pyav", 0, 1), 8, 224).data
    needed, fit = ClipFrames.of(16, data).needed, []
    for sample in samples:
        try:
            with open_sample(sample, data) as video:
                if video.num_frames < needed:
                    raise DataError(f"{sample.name}: {video.num_frames} frames, but a clip spans {needed}")
            fit.append(sample)
        except DataError as error:
            typer.echo(f"left out: {error}", err=True)
    if not fit:
        raise DataError(f"{place}: no video is long enough for a clip", allowed=f"at least {needed} frames")
    return fit


def reencoded(samples: Sequence[Sample], out: Path, encoding: Encoding) -> list[Sample]:
    """Re-encode the samples, as `everest-ds data reencode` does, and return the copies."""
    out.mkdir()
    root = Path(os.path.commonpath([sample.path.parent for sample in samples]))
    with progress_of(f"re-encoding, GOP {encoding.gop}", len(samples)) as on_progress:
        made = reencode_videos(
            plan_jobs(samples, root, out),
            Ledger.read(out / "ledger"),
            encoding,
            workers=os.cpu_count() or 1,
            on_progress=on_progress,
        )
    if made.failed:
        sample, reason = made.failed[0]
        raise DataError(f"{sample.name}: cannot be re-encoded", given=reason)
    return made.samples


def packed(samples: Sequence[Sample], out: Path, packing: Packing) -> list[Sample]:
    """Pack the samples, as `everest-ds data pack` does, and return those of the store."""
    out.mkdir()
    packer = StorePacker(samples, Path("/"), out, packing, os.cpu_count() or 1)
    with progress_of("packing", len(samples)) as on_progress:
        packer.pack_all(on_progress)
    packer.finish()
    return list(open_store(out))


def parse_peer(text: str | None) -> Path | None:
    """Return the folder in `videomae=FOLDER`, or None if `text` is None."""
    if text is None:
        return None
    name, _, folder = text.partition("=")
    if name != "videomae" or not folder:
        raise UsageError("--peer", given=text, allowed="videomae=FOLDER")
    return Path(folder)


def experiment(cell: Cell, batch_size: int, size: int) -> Experiment:
    """Build a config with VideoMAE's pre-training clips: 16 frames at stride 4, multi-scale crop."""
    return Experiment.model_validate(
        {
            "task": "pretrain",
            "model": {"image_size": size},
            "data": {
                "decoder": "pyav" if cell.decoder == JPEG else cell.decoder,
                "num_workers": cell.workers,
                "repeats": cell.repeats,
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
        seconds, cpu_seconds: time of the pass.
        steady_clips_per_s: clips per second after each worker has delivered its first batch, without the time
            in which the workers waited for a core that another program used.
    """

    clips: int
    seconds: float
    cpu_seconds: float
    steady_clips_per_s: float

    @property
    def clips_per_s(self) -> float:
        """Clips per second of wall-clock time."""
        return self.clips / self.seconds

    @property
    def cpu_ms(self) -> float:
        """CPU time per clip, in milliseconds."""
        return 1000 * self.cpu_seconds / self.clips


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
    start, cpu = time.perf_counter(), _cpu_seconds()
    batches = _peer_batches(bench, cell) if cell.repeats == 0 else _our_batches(bench, cell, number)
    arrivals = [(clips, time.perf_counter() - start - _seconds_without_core()) for clips in batches]
    seconds, first = time.perf_counter() - start, min(max(cell.workers, 1), len(arrivals) - 1)
    return Measurement(
        sum(clips for clips, _ in arrivals),
        seconds,
        _cpu_seconds() - cpu,
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


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of the workers that have ended, in seconds."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _our_batches(bench: Bench, cell: Cell, number: int) -> Iterator[int]:
    config = experiment(cell, bench.batch_size, bench.size)
    plan = BatchPlan(bench.batch_size, 1, 1, cell.repeats)
    samples = enough(bench.sources[cell.source], plan.samples_per_step * bench.batches)
    steps = range(number * bench.batches, (number + 1) * bench.batches)
    for batch in training_batches(samples, config, plan, 0, steps, False, _refuse):
        yield len(batch.clip)


def _peer_batches(bench: Bench, cell: Cell) -> Iterator[int]:
    assert bench.peer is not None
    videos = [s.path for s in enough(bench.sources[cell.source], bench.batch_size * bench.batches)]
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


def stage_row(source: str, decoder: str, repeats: int, cost: LoadingCost) -> dict[str, Any]:
    """Return the CPU time per clip of each loading stage, in milliseconds."""
    times = {"decode": cost.decode_ms / repeats, "crop": cost.crop_ms, "collate": cost.collate_ms}
    times["total"] = cost.clip_ms(repeats, packs=False)
    facts = {"source": source, "decoder": decoder, "repeats": repeats}
    return facts | {name: round(value, 2) for name, value in times.items()}


def remedy_rows(
    bench: Bench,
    found: dict[Cell, list[Measurement]],
    timed: dict[tuple[str, str, int], StageTimes],
    decoder: str,
    workers: int,
) -> list[dict[str, Any]]:
    """Compare the predicted gain of each remedy with the gain between two measured cells.

    The predictions are those of `everest-ds doctor --data`: from the files as given without repeats, and for
    other forms of the data from copies of a few of the videos.
    """
    base = Cell(_GIVEN, decoder, workers, 1)
    if base not in found:
        return []
    stages = timed[_GIVEN, decoder, 1]
    config = experiment(base, bench.batch_size, bench.size)
    supply = run_supply(config, available_cores(), 1, None)
    changes = {
        cell: Change(_difference(base, cell), "", stages.cost, changed)
        for cell in found
        if cell.decoder == decoder and cell.source == _GIVEN and cell != base
        if base in (replace(cell, workers=workers), replace(cell, repeats=1))
        for changed in [replace(supply, workers=cell.workers, repeats=cell.repeats)]
    }
    forms = {
        "reencode": replace(base, source=f"gop {Encoding().gop}"),
        "pack": replace(base, source=STORE, decoder=JPEG),
    }
    for name, cell in forms.items():
        if cell in found:
            few = representatives(stages.decode_ms)
            cost = measure_form(FASTER_FORMS[name], few, config, None)
            changes[cell] = Change(name, "", cost, supply)
    return [
        {"decoder": decoder, **_compare(found[base], found[cell], stages.cost, supply, change)}
        for cell, change in changes.items()
    ]


def _difference(before: Cell, after: Cell) -> str:
    """Name the setting that differs between two cells, such as `workers 1 -> 2`."""
    old, new = asdict(before), asdict(after)
    return ", ".join(f"{name} {old[name]} -> {new[name]}" for name in old if old[name] != new[name])


def _compare(
    before: Sequence[Measurement],
    after: Sequence[Measurement],
    cost: LoadingCost,
    supply: Supply,
    change: Change,
) -> dict[str, Any]:
    """Return predicted and measured gain of one change, each measured gain taken within a round."""
    (remedy,) = find_remedies(cost, supply, [change])
    rounds = list(zip(before, after, strict=True))
    by_rate = statistics.median(b.steady_clips_per_s / a.steady_clips_per_s for a, b in rounds)
    cpu_s = statistics.median((a.cpu_ms / b.cpu_ms) for a, b in rounds)
    by_cpu = cpu_s * change.supply.decoding_cores / supply.decoding_cores
    return {
        "remedy": change.name,
        "predicted_gain": round(remedy.gain, 2),
        "measured_gain": round(by_rate, 2),
        "error_%": round(100 * (remedy.gain / by_rate - 1), 1),
        "gain_by_cpu_time": round(by_cpu, 2),
        "its_error_%": round(100 * (remedy.gain / by_cpu - 1), 1),
        "predicted_clips_per_s": round(remedy.clips_per_s, 2),
        "measured_clips_per_s": round(statistics.median(b.steady_clips_per_s for b in after), 2),
    }


def row(cell: Cell, found: dict[Cell, list[Measurement]], stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Build the row of the table for one cell."""
    own = found[cell]
    their_source = "as given" if cell.source == STORE else cell.source
    peer = found.get(Cell(their_source, "videomae", cell.workers, 0))
    pairs = list(zip(own, peer, strict=True)) if peer else []
    rates = [each.clips_per_s for each in own]
    return {
        **asdict(cell),
        "clips_per_s": round(statistics.median(rates), 2),
        "range": f"{min(rates):.2f}-{max(rates):.2f}",
        "x_peer": _median([a.clips_per_s / b.clips_per_s for a, b in pairs]),
        "cpu_ms": _median([each.cpu_ms for each in own]),
        "stages_ms": next((s["total"] for s in stages if _same(s, cell)), None),
        "cpu_x_peer": _median([b.cpu_ms / a.cpu_ms for a, b in pairs]),
    }


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None


def _same(stage: dict[str, Any], cell: Cell) -> bool:
    return (stage["source"], stage["decoder"], stage["repeats"]) == (cell.source, cell.decoder, cell.repeats)


def feeding(
    timed: dict[tuple[str, str, int], StageTimes], gpu_rates: Sequence[str], cores: int
) -> list[dict[str, Any]]:
    """Estimate for each source, decoder and repeats how many GPUs of each model the cores of a node feed."""
    found = []
    for (source, decoder, repeats), times in timed.items():
        node = 1000 * cores / times.cost.clip_ms(repeats, packs=False)
        facts = {"source": source, "decoder": decoder, "repeats": repeats}
        found.append({**facts, "data_bound_above_clips_per_s": round(node, 1)})
        for text in gpu_rates:
            model, _, rate = text.rpartition("=")
            found[-1][f"GPUs of {model}"] = round(node / (float(rate) * _HEADROOM), 2)
    return found


def advise(
    bench: Bench, source: str, decoder: str, repeats: int, cost: LoadingCost, cores: int
) -> Iterator[str]:
    """Yield the rate of one worker, and what more workers or repeats would give."""
    config = experiment(Cell(source, decoder, 1, repeats), bench.batch_size, bench.size)
    supply = replace(run_supply(config, cores, 1, None), basis="measured")
    remedies = find_remedies(cost, supply, changed_settings(cost, supply, can_pack=False))
    said = [find_bottleneck(cost, supply).sentence(), *(f"with {remedy.phrase()}" for remedy in remedies)]
    yield f"{source}, {decoder}, R = {repeats}: {'; '.join(said)}"


if __name__ == "__main__":
    run_program(main)
