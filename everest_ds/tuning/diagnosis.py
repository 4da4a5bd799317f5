"""The bottleneck of a data set on this machine: measured loading, the rate of the model, and remedies."""

from __future__ import annotations

import os
import platform
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from everest_ds.config import Experiment
from everest_ds.costs.bottleneck import (
    Bottleneck,
    Change,
    MeasuredLoading,
    Remedy,
    Supply,
    cached_tokens,
    changed_settings,
    find_bottleneck,
    find_remedies,
    usual_share,
)
from everest_ds.costs.clip_supply import run_supply
from everest_ds.costs.hardware.data_sheet import RANKS_PER_NODE, machine_from_sheet
from everest_ds.costs.hardware.gpus import DEVICES, find_product
from everest_ds.costs.hardware.machine import Machine
from everest_ds.costs.step_time import predict_step, supply_of_step
from everest_ds.data.clip_source import Pack
from everest_ds.data.data_set import list_samples, read_data_set
from everest_ds.errors import DataError, UsageError
from everest_ds.launch.local import available_cores
from everest_ds.profiling.cache_reading import measure_cache
from everest_ds.profiling.cold_reading import copies_of_stored, measure_cold
from everest_ds.profiling.device import num_gpus, this_device
from everest_ds.profiling.faster_copies import FASTER_FORMS, measure_form, representatives
from everest_ds.profiling.loading_record import write_loading
from everest_ds.profiling.loading_stages import StageTimes, measure_stages
from everest_ds.profiling.step_measurement import device_name
from everest_ds.profiling.storage_rates import DiskRate, copy_rate, disk_rate
from everest_ds.training.prediction import Gpus
from everest_ds.training.token_packing import possible_packer
from everest_ds.tuning.calibration.local_machine import machine_here
from everest_ds.units import format_bytes

_LOCAL_BYTES = 2**27  # size of the file by which the rate of this machine's own disk is measured
_BUDGET_S = 8.0  # CPU time of reading the videos as they are


@dataclass(frozen=True)
class Ranks:
    """The ranks of a node that are to be supplied with clips.

    Attributes:
        count: ranks of the run.
        per_node: ranks that share a node.
        machine: one rank with its rates; None if they are unknown.
        name: human-readable name.
    """

    count: int
    per_node: int
    machine: Machine | None
    name: str


@dataclass(frozen=True)
class Diagnosis:
    """The measurement of a data set, and its consequences for a run.

    Attributes:
        ranks: the ranks that are supplied.
        stages: measured work of loading a clip.
        disk: measured rate of the disk; None if no file could be read.
        loading: the measurement as it is recorded.
        supply: settings and machine of a rank.
        remedies: predicted results of changes, the largest gain first.
        record: file of the recorded measurement.
    """

    ranks: Ranks
    stages: StageTimes
    disk: DiskRate | None
    loading: MeasuredLoading
    supply: Supply
    remedies: list[Remedy]
    record: Path

    @property
    def bottleneck(self) -> Bottleneck:
        """The resource that binds."""
        return find_bottleneck(self.loading.cost, self.supply)


def diagnose(
    data: Path, config: Experiment, gpus: Gpus | None, cores: int | None, on_progress: Callable[[str], None]
) -> Diagnosis:
    """Measure how fast the clips of a data set are loaded here, and predict what a run waits for.

    Args:
        data: a manifest, a frame store, a video, or a folder of videos.
        config: config of the run.
        gpus: GPUs of the run; None for those of this machine.
        cores: CPU cores of a node; None for those of this machine.
        on_progress: called with a human-readable name of each part that begins.

    Raises:
        ConfigError: if the batch cannot be divided among the ranks.
        DataError: if the data set is missing, or no clip can be cut from it.
    """
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": data})})
    ranks = ranks_here() if gpus is None else _ranks_of(gpus)
    pack = possible_packer(config)
    root = config.data.root
    samples = read_data_set(data, root=root, num_classes=None, labelled=False) if root else list_samples(data)
    on_progress(f"decoding clips for {_BUDGET_S:.0f} s")
    asked = measure_stages(samples, config, pack, _BUDGET_S)
    on_progress("reading the disk")
    stages = asked._replace(cost=measure_cold(asked.cost, representatives(asked.decode_ms), config))
    disk = disk_rate(dict.fromkeys(sample.file for sample in stages.decode_ms))
    place = f"on {platform.node()}, {datetime.now(timezone.utc).date().isoformat()}"
    loading = MeasuredLoading(
        stages.cost, disk.bytes_per_s if disk and disk.cold else None, copy_rate(), place
    )
    supply = _supply(config, ranks, loading, (cores or available_cores()) / ranks.per_node)
    changes = [
        *changed_settings(stages.cost, supply, pack is not None),
        *_other_forms(data, stages, supply, config, pack, on_progress),
        *_cached(supply, config, pack, on_progress),
        *staged_samples(asked, supply, config),
    ]
    remedies = find_remedies(stages.cost, supply, changes)
    return Diagnosis(ranks, stages, disk, loading, supply, remedies, write_loading(data, config, loading))


def ranks_here() -> Ranks:
    """Return one rank per GPU of this machine, or one on its CPU, with the best known rates."""
    count, name = num_gpus(), device_name(this_device())
    number = max(1, count)
    with suppress(UsageError):  # without a calibration, a GPU has a data sheet
        return Ranks(number, number, machine_here(number), f"{number} x {name}")
    with suppress(UsageError):
        return _ranks_of(Gpus(count, find_product(name))) if count else Ranks(1, 1, None, name)
    return Ranks(number, number, None, f"{number} x {name}")


def _ranks_of(gpus: Gpus) -> Ranks:
    per_node = min(RANKS_PER_NODE, gpus.count)
    machine = machine_from_sheet(gpus.product, DEVICES[gpus.product], ranks_per_node=per_node)
    return Ranks(gpus.count, per_node, machine, str(gpus))


def _supply(config: Experiment, ranks: Ranks, loading: MeasuredLoading, cores: float) -> Supply:
    """Return the supply of a rank that has `cores` CPU cores, or those of its calibration on a CPU."""
    if ranks.machine is None:
        supply = run_supply(config, cores, ranks.per_node, None)
        disk, copies = loading.disk_bytes_per_s, loading.copy_bytes_per_s if num_gpus() else None
        return replace(supply, disk_bytes_per_s=disk, copy_bytes_per_s=copies, basis="measured")
    machine = replace(ranks.machine, loading=loading)
    if machine.asynchronous:
        machine = replace(machine, spare_cores=cores)
    return supply_of_step(predict_step(config, ranks.count, machine), config, ranks.count, machine)


def _other_forms(
    data: Path,
    stages: StageTimes,
    supply: Supply,
    config: Experiment,
    pack: Pack | None,
    on_progress: Callable[[str], None],
) -> Iterator[Change]:
    """Yield the change to each form of the data that decodes faster, measured on a few of the videos."""
    few = representatives(stages.decode_ms)
    if few[0].stored is not None:
        return  # a frame store is the fastest form
    for name, form in FASTER_FORMS.items():
        if name == "pack" and config.tokens.reads_motion:
            continue  # a frame store holds no motion vectors
        on_progress(f"trying `{name}` on {len(few)} videos")
        try:
            cost = measure_form(form, few, config, pack)
            note = f"measured on copies of {len(few)} videos"
        except DataError:
            share = usual_share(name)
            cost = replace(stages.cost, decode_ms=share * stages.cost.decode_ms, wait_ms=None)
            note = "the usual share of decoding time (docs/loader.md), because no copy could be made"
        yield Change(name, form.apply.format(data=shlex.quote(str(data))), cost, supply, note)


def _cached(
    supply: Supply, config: Experiment, pack: Pack | None, on_progress: Callable[[str], None]
) -> Iterator[Change]:
    """Yield the change to a token cache, if the run's token score allows one."""
    if pack is not None:
        on_progress("reading random tokens from a cache")
        yield cached_tokens(measure_cache(config), supply, "measured on a cache of random tokens")


def staged_samples(stages: StageTimes, supply: Supply, config: Experiment) -> Iterator[Change]:
    """Yield the change to a copy of the shards on this machine's own disk, measured on a few samples.

    The cost in `stages` counts the bytes that a decoder asks for, as `measure_cold` expects.
    """
    few = representatives(stages.decode_ms)
    if few[0].stored is None or supply.disk_bytes_per_s is None:
        return
    with tempfile.TemporaryDirectory(prefix="everest-ds-") as folder:
        local = replace(stages.cost, wait_ms=0.0)  # of a folder in memory, such as a tmpfs
        local = measure_cold(local, copies_of_stored(few, Path(folder)), config)
        file = Path(folder, "bytes")
        with open(file, "wb") as stream:
            stream.write(os.urandom(_LOCAL_BYTES))
            os.fsync(stream.fileno())
        rate = disk_rate([file])
    if rate is not None:
        there = replace(supply, disk_bytes_per_s=rate.bytes_per_s)
        note = f"measured in {tempfile.gettempdir()}"
        yield Change("stage", f"data.stage={tempfile.gettempdir()}", local, there, note)


def stage_rows(found: Diagnosis) -> list[dict[str, Any]]:
    """Return the measured stages of loading a clip as rows."""
    cost, repeats = found.loading.cost, found.supply.repeats
    times = {"open and decode": cost.decode_ms / repeats, "crop": cost.crop_ms, "collate": cost.collate_ms}
    if found.supply.packs:
        times["select tokens"] = cost.pack_ms
    times["all"] = cost.clip_ms(repeats, found.supply.packs)
    return [
        {"stage": name, "cpu_ms_per_clip": value, "clips/s of a core": 1e3 / value}
        for name, value in times.items()
    ]


def resource_rows(found: Diagnosis) -> list[dict[str, Any]]:
    """Return the rate of every resource as rows, with the figures that it follows from."""
    supply, binding = found.supply, found.bottleneck.binding
    sent = supply.packed_bytes if supply.packs else supply.clip_bytes
    read = found.loading.cost.read_bytes / supply.repeats
    origins = {
        "decoding": f"{supply.workers} workers on {supply.cores:g} cores per rank",
        "disk": f"{format_bytes(read)} per clip at {_speed(supply.disk_bytes_per_s)} per node",
        "copies": f"{format_bytes(sent)} per clip at {_speed(supply.copy_bytes_per_s)}",
        "compute": found.ranks.name,
    }
    return [
        {
            "resource": name,
            "clips/s per rank": rate,
            "basis": "predicted" if name == "compute" else supply.basis,
            "limit": "binds" if name == binding else "",
            "from": origins[name],
        }
        for name, rate in found.bottleneck.rates.items()
    ]


def remedy_rows(found: Diagnosis) -> list[dict[str, Any]]:
    """Return the predicted result of every remedy as rows."""
    return [
        {
            "remedy": remedy.name,
            "clips/s per rank (predicted)": remedy.clips_per_s,
            "gain": f"{remedy.gain:.2f} x",
            "loader alone": remedy.loader_clips_per_s,
            "then binds": remedy.binding,
        }
        for remedy in found.remedies
    ]


def remedy_lines(found: Diagnosis) -> list[str]:
    """Return how each remedy is applied, and where the figures of changed data come from."""
    return [
        f"{remedy.name}: {remedy.apply}" + (f" ({remedy.note})" if remedy.note else "")
        for remedy in found.remedies
    ]


def notes_on_diagnosis(found: Diagnosis) -> list[str]:
    """Return what the figures leave open, in sentences."""
    notes = []
    if found.disk is None or not found.disk.cold:
        notes.append(
            "The disk is not in the table: the files came from the page cache, or this system does not say"
            " where they came from."
        )
    if found.bottleneck.rates.get("compute") is None:
        notes.append(
            f"The model's rate on {found.ranks.name} is unknown: name the GPUs of the run (--on 8xa100-80gb),"
            " or measure this machine once (everest-ds tune --calibrate)."
        )
    return notes


def diagnosis_json(found: Diagnosis) -> dict[str, Any]:
    """Return the diagnosis for programs."""
    bottleneck = found.bottleneck
    return {
        "bottleneck": {
            "binds": bottleneck.binding,
            "clips_per_s": bottleneck.clips_per_s,
            "loader_clips_per_s": bottleneck.loader_clips_per_s,
            "factor": bottleneck.factor,
            "rates": bottleneck.rates,
            "basis": bottleneck.basis,
        },
        "measured": found.loading.as_json(),
        "videos": len(found.stages.decode_ms),
        "clips": found.stages.num_clips,
        "disk": found.disk and found.disk._asdict(),
        "supply": asdict(found.supply),
        "remedies": [remedy._asdict() for remedy in found.remedies],
        "record": str(found.record),
    }


def _speed(bytes_per_s: float | None) -> str:
    return f"{(bytes_per_s or 0) / 1e6:,.0f} MB/s"
