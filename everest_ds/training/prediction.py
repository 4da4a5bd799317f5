"""The predicted memory and time of a run on GPUs that need not be present, printed by `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from everest_ds.config import Experiment, plan_ranks
from everest_ds.config.checks import can_pack_tokens
from everest_ds.costs.bottleneck import (
    changed_data,
    changed_settings,
    find_bottleneck,
    find_remedies,
    store_speedup,
    usual_share,
)
from everest_ds.costs.clip_supply import loading_cost
from everest_ds.costs.hardware.data_sheet import machine_from_sheet
from everest_ds.costs.hardware.gpus import DEVICES, find_product
from everest_ds.costs.hardware.machine import Machine
from everest_ds.costs.memory import MemoryPrediction, predict_memory
from everest_ds.costs.step_time import StepPrediction, predict_step, supply_of_step
from everest_ds.data.store.index import is_store
from everest_ds.profiling.loading_record import knowing_data
from everest_ds.units import format_bytes, format_duration

REFERENCE = "8xA100-80GB"  # the largest machine of the paper
_WORTHWHILE = 1.05  # gain from which a remedy is named


@dataclass(frozen=True)
class Gpus:
    """A number of GPUs of one product, with one rank on each GPU."""

    count: int
    product: str

    def __str__(self) -> str:
        return f"{self.count} x {self.product}"


def parse_gpus(text: str) -> Gpus:
    """Parse a number of GPUs and their name, such as `8xA100-80GB`, or `H100` for one GPU.

    Raises:
        UsageError: if the GPU or the number is unknown.
    """
    count, times, name = text.partition("x")
    if times and count.isdigit() and int(count):
        return Gpus(int(count), find_product(name.strip()))
    return Gpus(1, find_product(text))


def memory_text(needed: MemoryPrediction) -> str:
    """Describe the predicted peak memory of one rank in words."""
    return f"{format_bytes(needed.peak_bytes)} per rank at the peak (predicted; {needed.peak_at})"


def describe_prediction(config: Experiment, gpus: Gpus, num_samples: int | None) -> dict[str, Any]:
    """Predict the memory and time of training on `gpus` as the rows of a table.

    Args:
        config: config of the run.
        gpus: number and product of the GPUs.
        num_samples: samples in an epoch; None if unknown.

    Raises:
        ConfigError: if the batch cannot be divided among the ranks, or the GPUs do not support the precision.
    """
    device = DEVICES[gpus.product]
    plan, needed = plan_ranks(config, gpus.count), predict_memory(config, gpus.count)
    share = needed.peak_bytes / device.memory_bytes
    memory = f"a GPU's {device.memory_gib} GB"
    fits = f"{100 * share:.0f} % of {memory}" if share <= 1 else f"does NOT fit into {memory}"
    machine = knowing_data(machine_from_sheet(gpus.product, device), config)
    step = predict_step(config, gpus.count, machine)
    run = {}
    if num_samples is not None:
        steps, epochs = num_samples // plan.samples_per_step, config.schedule.epochs
        num_steps = min(config.run.max_steps or steps * epochs, steps * epochs)
        span = f"{epochs} epochs" if num_steps == steps * epochs else f"{num_steps} steps (run.max_steps)"
        run = {
            "epoch": f"{format_duration(steps * step.step_s)} in {steps} steps",
            "training": f"{format_duration(num_steps * step.step_s)} in {span}, without validation",
        }
    return {
        "on": f"{gpus}: {machine.source}",
        "memory": f"{memory_text(needed)}, {fits}",
        "step": _step(step),
        "data": describe_supply(step, config, gpus.count, machine),
        **run,
    }


def describe_supply(step: StepPrediction, config: Experiment, num_ranks: int, machine: Machine) -> str:
    """Say which resource limits a rank whose predicted step is `step`, by how much, and what would help."""
    cost, supply = loading_cost(config, machine), supply_of_step(step, config, num_ranks, machine)
    can_pack, train = can_pack_tokens(config), config.data.train
    stored = train is not None and is_store(train)
    usual = 1 / store_speedup(config.data.frame_stride) if machine.loading is None else usual_share("pack")
    changes = [
        *changed_settings(cost, supply, can_pack),
        *changed_data(cost, supply, None if stored or config.tokens.reads_motion else usual, can_pack),
    ]
    remedies = find_remedies(cost, supply, changes)
    helpful = [f"with {remedy.phrase()}" for remedy in remedies if remedy.gain >= _WORTHWHILE]
    form = "a frame store" if stored else "videos as `everest-ds data reencode` writes them"
    source = f"The loader's rate is that of {form}; `everest-ds doctor --data` measures yours"
    if machine.loading is not None:
        source = f"The loader was measured {machine.loading.place}"
    said = [find_bottleneck(cost, supply).sentence(), *helpful]
    return f"{'; '.join(said)}. {source}."


def _step(step: StepPrediction) -> str:
    parts = [f"{name} {1000 * seconds:.0f}" for name, seconds in step.split().items() if seconds >= 5e-4]
    mfu = "" if step.mfu_pct is None else f", MFU {step.mfu_pct:.0f} %"
    return f"{1000 * step.step_s:.0f} ms ({', '.join(parts)}), {step.clips_per_s:.0f} clips/s{mfu}"
