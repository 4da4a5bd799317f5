"""Benchmark of the data loader: clips per second, CPU time by stage, remedies, and the GPUs that it feeds.

Example:
    python tools/bench_data.py FOLDER_OF_VIDEOS --workers 1 --workers 2 --repeats 1 --repeats 4 --gop 8
        --peer videomae=../VideoMAE --gpu-rate "vit_base on an H100=900" --json data.json

Every cell of the table is measured once per round, one cell after the other, so that other load on the
machine affects all cells equally. Medians are over rounds; ratios to the peer are taken within a round.
CPU time covers the rank and its workers, and stays meaningful even if other programs share the machine; the
gains of remedies leave out the time in which workers waited for a core (Linux only).

With `--workers 1 --workers 2 --repeats 1 --repeats 4 --gop 8 --store --cache --slow-folder FOLDER`, the gains
of these remedies that `everest-ds doctor --data` predicts stand beside the measured ones. FOLDER lies on a
slow disk, such as a parallel file system: a frame store there is compared with a staged copy of it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_sources import distinct, filled_cache, find_videos, packed, reencoded, staged
from loader_cells import (
    CACHE,
    GIVEN,
    JPEG,
    SLOW,
    STAGED,
    STORE,
    TOKENS,
    Bench,
    Cell,
    Measurement,
    experiment,
    measure,
)
from remedy_rows import remedy_rows, staging_rows

from everest_ds.cli.options import JsonFile
from everest_ds.cli.program import run_program
from everest_ds.console import print_table, write_json
from everest_ds.costs.bottleneck import LoadingCost, changed_settings, find_bottleneck, find_remedies
from everest_ds.costs.clip_supply import run_supply
from everest_ds.data.maintenance.reencode import Encoding
from everest_ds.data.store.layout import Packing
from everest_ds.errors import UsageError
from everest_ds.profiling.loading_stages import StageTimes, measure_stages
from everest_ds.training.run_folder import describe_environment

_STAGES_S = 10.0  # CPU time of measuring the stages of one source, decoder and R
_DECODERS = {STORE: JPEG, SLOW: JPEG, STAGED: JPEG, CACHE: TOKENS}  # of sources that are no videos
_HEADROOM = 1.25  # loader rate over model rate; with less, slow clips make the model wait


def main(
    videos: Annotated[Path, typer.Argument(help="A folder of videos, or a manifest.")],
    decoder: Annotated[list[str], typer.Option(help="data.decoder; repeatable.")] = ["decord", "pyav"],  # noqa: B006
    workers: Annotated[list[int], typer.Option(help="data.num_workers; repeatable.")] = [1],  # noqa: B006
    repeats: Annotated[list[int], typer.Option(help="data.repeats; repeatable.")] = [1, 4],  # noqa: B006
    gop: Annotated[list[int], typer.Option(help="Add copies with this GOP length.")] = [],  # noqa: B006
    store: Annotated[bool, typer.Option("--store", help="Add a frame store of the videos.")] = False,
    cache: Annotated[bool, typer.Option("--cache", help="Add a token cache of the videos.")] = False,
    slow_folder: Annotated[
        Path | None,
        typer.Option(
            help="Add a frame store in this folder of a slow disk, and a staged copy.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
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
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        given = find_videos(videos)
        bench = Bench({GIVEN: given}, None, batch, batches, size, parse_peer(peer), scratch)
        for n in gop:
            bench.sources[f"gop {n}"] = reencoded(given, scratch / f"gop{n}", Encoding(short_side, n))
        if store:
            bench.sources[STORE] = packed(given, scratch / "store", Packing(short_side))
        if cache:
            bench = with_cache(bench)
        if slow_folder is not None:
            slow = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=slow_folder)))
            add_slow_store(bench, slow / "store", Packing(short_side))
        tables = tables_of(bench, decoder, workers, repeats, rounds, gpu_rate, cores)
    facts = {"environment": describe_environment(1), "videos": [sample.name for sample in given]}
    write_json(json_file, {**facts, **tables})


def with_cache(bench: Bench) -> Bench:
    """Add a token cache that holds as many samples as a measurement reads."""
    folder = bench.scratch / "cached"
    folder.mkdir()
    samples = distinct(bench.sources[GIVEN], bench.num_clips, folder)
    cache = filled_cache(samples, bench.scratch / "cache", bench.batch_size, bench.size)
    return replace(bench, sources=bench.sources | {CACHE: samples}, cache=cache)


def add_slow_store(bench: Bench, out: Path, packing: Packing) -> None:
    """Add a store with as many samples as a measurement reads, and a copy of its shards on the local disk."""
    folder = bench.scratch / "stored"
    folder.mkdir()
    slow = packed(distinct(bench.sources[GIVEN], bench.num_clips, folder), out, packing)
    bench.sources[SLOW] = slow
    bench.sources[STAGED] = staged(slow, bench.scratch / "stage")


def tables_of(
    bench: Bench,
    decoders: Sequence[str],
    workers: Sequence[int],
    repeats: Sequence[int],
    rounds: int,
    gpu_rates: Sequence[str],
    cores: int,
) -> dict[str, Any]:
    """Measure all configurations, print the tables, and return them for programs."""
    ways = [way for source in bench.sources for way in ways_to_read(source, decoders, repeats)]
    cells = [Cell(s, d, w, r) for s, d, r in ways for w in workers]
    if bench.peer:
        cells += [Cell(s, "videomae", w, 0) for s in bench.sources if s not in _DECODERS for w in workers]
    found = measure(bench, cells, rounds)
    timed = {way: stages_of(bench, *way) for way in ways if way[0] not in (CACHE, STAGED)}
    stages = [stage_row(*key, times.cost) for key, times in timed.items()]
    known = {way: times for way, times in timed.items() if way[0] != SLOW}  # whose disk does not bind
    gains = [gain for d in decoders for gain in remedy_rows(bench, found, timed, d, min(workers))]
    if SLOW in bench.sources:
        gains += staging_rows(bench, found, timed[SLOW, JPEG, 1])
    tables = {
        "cells": [row(cell, found, stages) for cell in cells],
        "stages": stages,
        "remedies": gains,
        "feeds": feeding(known, gpu_rates, cores),
    }
    print_table("Clips per second", tables["cells"])
    print_table("CPU time per clip by stage, in one process, ms", stages)
    if gains:
        print_table("Remedies: predicted against measured", gains)
    print_table(f"GPUs that {cores} cores feed", tables["feeds"])
    advice = [line for key in known for line in advise(bench, *key, known[key].cost, cores)]
    for line in advice:
        typer.echo(f"- {line}")
    raw = [{**asdict(cell), "runs": [asdict(run) for run in found[cell]]} for cell in cells]
    return {**tables, "advice": advice, "measurements": raw}


def stages_of(bench: Bench, source: str, decoder: str, repeats: int) -> StageTimes:
    """Measure the stages of loading a clip in this process."""
    config = experiment(Cell(source, decoder, 0, repeats), bench.batch_size, bench.size)
    return measure_stages(bench.sources[source], config, None, _STAGES_S)


def ways_to_read(source: str, decoders: Sequence[str], repeats: Sequence[int]) -> list[tuple[str, str, int]]:
    """Return source, decoder and repeats of each way in which a source is read."""
    if source in (CACHE, SLOW, STAGED):
        return [(source, _DECODERS[source], 1)]
    return [(source, d, r) for d in ([JPEG] if source == STORE else decoders) for r in repeats]


def parse_peer(text: str | None) -> Path | None:
    """Return the folder in `videomae=FOLDER`, or None if `text` is None."""
    if text is None:
        return None
    name, _, folder = text.partition("=")
    if name != "videomae" or not folder:
        raise UsageError("--peer", given=text, allowed="videomae=FOLDER")
    return Path(folder)


def stage_row(source: str, decoder: str, repeats: int, cost: LoadingCost) -> dict[str, Any]:
    """Return the CPU time per clip of each loading stage, in milliseconds."""
    times = {"decode": cost.decode_ms / repeats, "crop": cost.crop_ms, "collate": cost.collate_ms}
    times["total"] = cost.clip_ms(repeats, packs=False)
    facts = {"source": source, "decoder": decoder, "repeats": repeats}
    return facts | {name: round(value, 2) for name, value in times.items()}


def row(cell: Cell, found: dict[Cell, list[Measurement]], stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Build the row of the table for one cell."""
    own = found[cell]
    their_source = GIVEN if cell.source in _DECODERS else cell.source
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
