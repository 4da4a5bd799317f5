"""Benchmark of the data loader: clips per second, CPU time by stage, and the number of GPUs that it feeds.

Example:
    python tools/bench_data.py FOLDER_OF_VIDEOS --workers 1 --workers 2 --repeats 1 --repeats 4 --gop 8
        --peer videomae=../VideoMAE --gpu-rate "vit_base on an H100=900" --json data.json

Every cell of the table is measured once per round, one cell after the other, so that other load on the
machine affects all cells equally. Medians are over rounds; ratios to the peer are taken within a round.
CPU time covers the rank and its workers, and stays meaningful even if other programs share the machine.
"""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peer_loaders import videomae_loader
from torch.utils.data import default_collate

from everest_ds.cli.options import JsonFile
from everest_ds.cli.program import run_program
from everest_ds.config import BatchPlan, Experiment
from everest_ds.console import print_table, progress_of, write_json
from everest_ds.data.clips import TrainingClips, training_batches
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.frames import ClipFrames
from everest_ds.data.ledger import Ledger
from everest_ds.data.maintenance.reencode import Encoding, plan_jobs, reencode_videos
from everest_ds.data.order import Visit
from everest_ds.data.store.index import open_store
from everest_ds.data.store.layout import Packing
from everest_ds.data.store.pack import StorePacker
from everest_ds.data.video_files import VIDEO_SUFFIXES
from everest_ds.data.video_list import Sample, read_manifest
from everest_ds.errors import DataError, UsageError
from everest_ds.training.run_folder import describe_environment

_STAGES = ("open", "decode", "crop", "collate")
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
        sources = {"as given": given} | {
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
        stages = [stage_times(bench, s, d, r) for s, d in readers for r in repeats]
        rows = [row(cell, found, stages) for cell in cells]
        fed = feeding(stages, gpu_rate, cores)
        print_table("Clips per second", rows)
        print_table("CPU time per clip by stage, in one process, ms", stages)
        if fed:
            print_table(f"GPUs that {cores} cores feed", fed)
        advice = advise(rows, stages)
        for line in advice:
            typer.echo(f"- {line}")
    facts = {"environment": describe_environment(1), "videos": [sample.name for sample in given]}
    raw = [{**asdict(cell), "runs": [asdict(run) for run in found[cell]]} for cell in cells]
    tables = {"cells": rows, "stages": stages, "feeds": fed, "advice": advice, "measurements": raw}
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
    """One timed pass over a few batches, from the start of the workers to their end."""

    clips: int
    seconds: float
    cpu_seconds: float

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
    clips = sum(_peer_batches(bench, cell) if cell.repeats == 0 else _our_batches(bench, cell, number))
    return Measurement(clips, time.perf_counter() - start, _cpu_seconds() - cpu)


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


def stage_times(bench: Bench, source: str, decoder: str, repeats: int) -> dict[str, Any]:
    """Measure the CPU time per clip of each loading stage, in this process, in milliseconds."""
    config = experiment(Cell(source, decoder, 0, repeats), bench.batch_size, bench.size)
    samples = bench.sources[source]
    clips = TrainingClips(samples, config)
    spent = dict.fromkeys(_STAGES, 0.0)

    def timed(stage: str, act: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = act()
        spent[stage] += time.process_time() - start
        return result

    visits = [Visit(epoch, index) for epoch in range(3) for index in range(len(samples))]
    for visit in visits:
        video = timed("open", lambda: open_sample(samples[visit.sample], config.data))  # noqa: B023
        with video:
            indices = clips.choose(visit, video.num_frames)
            need = partial(clips.need, visit)
            frames = timed("decode", lambda: video.read_needed(indices, need))  # noqa: B023
        cut = timed("crop", lambda: clips.crops(frames, visit, visit.sample))  # noqa: B023
        timed("collate", lambda: default_collate(cut))  # noqa: B023
    per_clip = {stage: 1000 * s / (len(visits) * repeats) for stage, s in spent.items()}
    facts = {"source": source, "decoder": decoder, "repeats": repeats}
    total = sum(per_clip.values())
    return {**facts, **{k: round(v, 2) for k, v in per_clip.items()}, "total": round(total, 2)}


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


def feeding(stages: Sequence[dict[str, Any]], gpu_rates: Sequence[str], cores: int) -> list[dict[str, Any]]:
    """Estimate for each source, decoder and repeats how many GPUs of each model the cores of a node feed."""
    found = []
    for stage in stages:
        node = cores * 1000 / stage["total"]
        facts = {name: stage[name] for name in ("source", "decoder", "repeats")}
        found.append({**facts, "data_bound_above_clips_per_s": round(node, 1)})
        for text in gpu_rates:
            model, _, rate = text.rpartition("=")
            found[-1][f"GPUs of {model}"] = round(node / (float(rate) * _HEADROOM), 2)
    return found


def advise(rows: Sequence[dict[str, Any]], stages: Sequence[dict[str, Any]]) -> list[str]:
    """Derive advice on the loader's settings from the measurements."""
    ours = [row for row in rows if row["repeats"]]
    best = max((row for row in ours if row["repeats"] == 1), key=lambda row: row["clips_per_s"], default=None)
    lines = ["data.num_workers: the number of cores of the node divided by its number of GPUs"]
    if best:
        lines.append(f"fastest without repeats: data.decoder={best['decoder']}, source {best['source']}")
    for stage in stages:
        if stage["source"] == "as given" and stage["repeats"] == 1 and stage["decode"] > stage["total"] / 2:
            share = 100 * (stage["open"] + stage["decode"]) / stage["total"]
            lines.append(
                f"{stage['decoder']}: decoding takes {share:.0f} % of the time per clip; use"
                " `everest-ds data reencode` (short GOP, short side 256) or data.repeats above 1"
            )
    return lines


if __name__ == "__main__":
    run_program(main)
