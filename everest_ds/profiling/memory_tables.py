"""The memory of one model as tables: predicted for a rank, counted on a traced step, and over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.config.schema import Experiment
from everest_ds.costs.memory import predict_memory
from everest_ds.data.clip_batches import blank_batch
from everest_ds.models import build_model
from everest_ds.profiling.compute_tables import Table
from everest_ds.profiling.memory_trace import CATEGORIES, MemoryTrace, trace_memory
from everest_ds.units import format_bytes

MIB = 1024**2
PEAK = "peak"
# bfloat16 is traced as float16, which has the same size, because CPUs use an attention path of their own for
# bfloat16 and GPUs do not.
_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.float16, "fp16": torch.float16}
_BARS, _BARS_PER_LINE = " ▁▂▃▄▅▆▇█", 48
_MOMENTS = 240  # rows of the table over time: about as many as a plot can show


def memory_of_experiment(
    config: Experiment, num_ranks: int, prepare: Callable[[nn.Module], object]
) -> dict[str, Table]:
    """Return tables `memory`, `memory_peak_at` and `memory_over_time` of one micro-batch's training step.

    Predicted figures are for one rank under ZeRO and tensor parallelism, counted figures for a single rank
    without either.

    Args:
        config: the experiment.
        num_ranks: number of all ranks.
        prepare: changes the model before it is traced, for example its recomputation.

    Raises:
        ConfigError: parallelism.tensor does not divide the number of ranks.
    """
    predicted = predict_memory(config, num_ranks)
    traced = trace_experiment(config, prepare)
    tables = traced_tables({"predicted_mib": {**predicted.parts(), PEAK: predicted.peak_bytes}}, traced)
    tables["memory_peak_at"].insert(0, {"kind": "predicted", "peak_at": predicted.peak_at})
    return tables


def traced_tables(predicted: dict[str, dict[str, int]], traced: MemoryTrace) -> dict[str, Table]:
    """Return the tables of a traced step, with predicted columns next to the counted one."""
    peak = traced.peak
    columns = {**predicted, "counted_mib": {**peak.live_bytes, PEAK: traced.peak_bytes}}
    categories = dict.fromkeys(
        category for sizes in columns.values() for category in sizes if category != PEAK
    )
    return {
        "memory": [
            {"category": category, **{name: sizes.get(category, 0) / MIB for name, sizes in columns.items()}}
            for category in (*categories, PEAK)
        ],
        "memory_peak_at": [{"kind": "counted", "peak_at": f"{peak.phase}, {peak.operator}"}],
        "memory_over_time": over_time(traced),
    }


def trace_experiment(config: Experiment, prepare: Callable[[nn.Module], object]) -> MemoryTrace:
    """Trace a training step of an experiment's model, with weights in its precision and AdamW in float32."""

    def build() -> nn.Module:
        model = build_model(config).to(_DTYPES[config.precision])
        prepare(model)
        return model

    def inputs() -> Sequence[Tensor]:
        batch = blank_batch(config, config.batch.micro_batch_size)
        return batch.label, *batch.arguments

    def loss(model: nn.Module, label_B: Tensor, *arguments: Tensor) -> Tensor:
        output = model(*arguments)
        return output.loss if config.task == "pretrain" else F.cross_entropy(output.float(), label_B)

    return trace_memory(build, inputs, loss)


def over_time(traced: MemoryTrace) -> Table:
    """Return at most `_MOMENTS` rows of live bytes by category, each the highest moment of an interval."""
    timeline = traced.timeline
    stride = -(-len(timeline) // _MOMENTS)
    intervals = (timeline[start : start + stride] for start in range(0, len(timeline), stride))
    highest = [max(interval, key=attrgetter("total_bytes")) for interval in intervals]
    return [
        {"phase": m.phase, "operator": m.operator, **{c: m.live_bytes[c] for c in CATEGORIES}}
        for m in highest
    ]


def timeline_bars(timeline: Table) -> Table:
    """Draw the rows of `over_time` as a line of bars per phase, scaled to the peak of the step."""
    phases: dict[str, list[int]] = {}
    for row in timeline:
        phases.setdefault(row["phase"], []).append(sum(row[category] for category in CATEGORIES))
    peak = max(max(totals) for totals in phases.values())
    rows = []
    for phase, totals in phases.items():
        stride = -(-len(totals) // _BARS_PER_LINE)  # neighbours that share a bar
        heights = [max(totals[i : i + stride]) for i in range(0, len(totals), stride)]
        bars = "".join(_BARS[(len(_BARS) - 1) * height // peak] for height in heights)
        rows.append({"phase": phase, "live_memory": bars, "highest": format_bytes(max(totals))})
    return rows


def sum_of_tensors(model: nn.Module, *inputs: Tensor) -> Tensor:
    """Return the sum of a model's output, as the loss of a traced step."""
    output: Tensor = model(*inputs)
    return output.sum()
