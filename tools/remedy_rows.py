"""The table of remedies of `bench_data.py`: predicted and measured gains."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import typer
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
)

from everest_ds.costs.bottleneck import Change, LoadingCost, Supply, cached_tokens, find_remedies
from everest_ds.costs.clip_supply import run_supply
from everest_ds.data.maintenance.reencode import Encoding
from everest_ds.launch.local import available_cores
from everest_ds.profiling.cache_reading import measure_cache
from everest_ds.profiling.cold_reading import measure_cold
from everest_ds.profiling.faster_copies import FASTER_FORMS, measure_form, representatives
from everest_ds.profiling.loading_stages import StageTimes
from everest_ds.profiling.storage_rates import disk_rate
from everest_ds.tuning.diagnosis import staged_samples


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
    base = Cell(GIVEN, decoder, workers, 1)
    if base not in found:
        return []
    stages = timed[GIVEN, decoder, 1]
    config = experiment(base, bench.batch_size, bench.size)
    supply = run_supply(config, available_cores(), 1, None)
    changes = {
        cell: Change(_difference(base, cell), "", stages.cost, changed)
        for cell in found
        if cell.decoder == decoder and cell.source == GIVEN and cell != base
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
    cached = replace(base, source=CACHE, decoder=TOKENS)
    if cached in found:
        changes[cached] = cached_tokens(measure_cache(config), supply, "")
    return [
        {"decoder": decoder, **_compare(found[base], found[cell], stages.cost, supply, change)}
        for cell, change in changes.items()
    ]


def staging_rows(
    bench: Bench, found: dict[Cell, list[Measurement]], stages: StageTimes
) -> Iterator[dict[str, Any]]:
    """Compare the predicted gain of staging a store from the slow disk with the measured one.

    Args:
        bench: the settings, with a store on a slow disk and a copy of its shards.
        found: the measurements, with both for several numbers of workers.
        stages: CPU time of loading a clip from the store, and bytes that its decoder asks for.
    """
    disk = disk_rate(dict.fromkeys(sample.file for sample in bench.sources[SLOW]))
    if disk is None or not disk.cold:
        typer.echo("no row for staging: the files of the slow folder are not read from a disk", err=True)
        return
    config = experiment(Cell(SLOW, JPEG, 0, 1), bench.batch_size, bench.size)
    cost = measure_cold(stages.cost, representatives(stages.decode_ms), config)
    for before in (cell for cell in found if cell.source == SLOW):
        supply = run_supply(experiment(before, bench.batch_size, bench.size), available_cores(), 1, None)
        supply = replace(supply, disk_bytes_per_s=disk.bytes_per_s)
        for change in staged_samples(stages, supply, config):
            named = change._replace(name=f"stage, workers {before.workers}")
            after = found[replace(before, source=STAGED)]
            yield {"decoder": JPEG, **_compare(found[before], after, cost, supply, named)}


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
    cpu_s = statistics.median(a.loading_cpu_ms / b.loading_cpu_ms for a, b in rounds)
    by_cpu = cpu_s * change.supply.decoding_cores / supply.decoding_cores
    waits = supply.disk_bytes_per_s is not None  # which is no CPU time
    return {
        "remedy": change.name,
        "predicted_gain": round(remedy.gain, 2),
        "measured_gain": round(by_rate, 2),
        "error_%": round(100 * (remedy.gain / by_rate - 1), 1),
        "gain_by_cpu_time": None if waits else round(by_cpu, 2),
        "its_error_%": None if waits else round(100 * (remedy.gain / by_cpu - 1), 1),
        "predicted_clips_per_s": round(remedy.clips_per_s, 2),
        "measured_clips_per_s": round(statistics.median(b.steady_clips_per_s for b in after), 2),
    }
