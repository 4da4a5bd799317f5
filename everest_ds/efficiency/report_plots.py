"""The plots of a report, drawn from its rows, its runs and its measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from everest_ds.config import Experiment
from everest_ds.costs.hardware.gpus import DEVICES
from everest_ds.efficiency.measured import Measured
from everest_ds.efficiency.runs import Run
from everest_ds.efficiency.systems import (
    BACKBONES,
    METHODS,
    NUM_RANKS,
    SYSTEMS,
    memory_at,
    memory_by_batch,
    trained_configs,
)
from everest_ds.efficiency.tables import ComparisonRow
from everest_ds.reports.charts import Bubble, Curve, draw_bubbles, draw_lines, draw_stacks
from everest_ds.reports.clip_pictures import CAPTIONS
from everest_ds.reports.figure import png_as_svg
from everest_ds.reports.page import Plot
from everest_ds.units import GIB

_CLIPS = 32  # clips per GPU in the plot of memory by category
_BATCH_SIZES = range(4, 97, 4)
_LIMITS = ("A6000", "H100 SXM")
_LOSSES = {
    "pretrain": ("pre-training", "mean squared error of pixels"),
    "finetune": ("fine-tuning", "cross-entropy"),
}
_AUGMENTED = " The clip is shown as the model was trained on it, with changed colours and mixed clips."
_OUR_TRAINING = f"bf16, ZeRO-2 on {NUM_RANKS} ranks, fused attention, no recomputation"


def draw_plots(
    rows: Sequence[ComparisonRow], runs: Sequence[Run], measured: Sequence[Measured]
) -> list[Plot]:
    """Draw every plot for which the report has data."""
    return list(chain(_accuracy(rows), _memory(rows), _step_times(measured), _losses(runs), _clips(runs)))


def _accuracy(rows: Sequence[ComparisonRow]) -> Iterator[Plot]:
    values = {(row.method, row.backbone, row.column): row for row in rows if row.table == "k400"}
    systems = [key for key in SYSTEMS if {(*key, "ft_gflops"), (*key, "top1")} <= set(values)]
    bubbles = {
        (method, backbone): Bubble(
            method,
            backbone,
            float(values[method, backbone, "ft_gflops"].value or 0),
            float(values[method, backbone, "top1"].published or 0),
            model.parameters().value / 1e6 if (model := SYSTEMS[method, backbone].finetune) else 0.0,
        )
        for method, backbone in systems
    }
    links = [
        (bubbles["VideoMAE", backbone], bubbles["EVEREST", backbone])
        for method, backbone in systems
        if method == "EVEREST" and ("VideoMAE", backbone) in bubbles
    ]
    if bubbles:
        caption = (
            "Kinetics-400: published accuracy over our GFLOPs. The area of a circle shows the number of"
            " parameters; an arrow leads from VideoMAE to EVEREST."
        )
        yield Plot("accuracy_over_gflops", caption, draw_bubbles(list(bubbles.values()), links), wide=True)


def _memory(rows: Sequence[ComparisonRow]) -> Iterator[Plot]:
    chosen = {(row.method, row.backbone) for row in rows}
    backbones = [backbone for backbone in BACKBONES if chosen & {(method, backbone) for method in METHODS}]
    if not backbones:
        return
    largest = backbones[-1]
    trained = {
        (method, phase): config
        for method in METHODS
        if (method, largest) in chosen
        for phase, config in trained_configs(method, largest).items()
    }
    training = f"{largest}, {_OUR_TRAINING}"
    yield Plot("memory_over_batch", f"Peak memory over batch size: {training}.", _draw_batches(trained))
    caption = f"Memory by category at {_CLIPS} clips per GPU: {training}."
    yield Plot("memory_by_category", caption, _draw_categories(trained))


def _draw_batches(trained: Mapping[tuple[str, str], Experiment]) -> str:
    lines = [
        Curve(
            method,
            f"{method}, {phase}",
            [(clips, size / GIB) for clips, size in memory_by_batch(config, _BATCH_SIZES)],
            dashed=phase == "pre-training",
        )
        for (method, phase), config in trained.items()
    ]
    limits = {name: float(DEVICES[name].memory_gib) for name in _LIMITS}
    return draw_lines(lines, "clips per GPU", "peak memory of a GPU, GiB (predicted)", limits)


def _draw_categories(trained: Mapping[tuple[str, str], Experiment]) -> str:
    stacks = {
        f"{method}, {phase}": {part: size / GIB for part, size in memory_at(config, _CLIPS).parts().items()}
        for (method, phase), config in trained.items()
    }
    return draw_stacks(stacks, "GiB of a GPU (predicted)")


def _step_times(measured: Sequence[Measured]) -> Iterator[Plot]:
    if measured:
        stacks = {f"{one.label}\n{one.device}": one.phases_ms for one in measured}
        caption = "Duration of the phases of a training step: medians, without waiting for data."
        yield Plot("step_time", caption, draw_stacks(stacks, "ms (measured)"))


def _losses(runs: Sequence[Run]) -> Iterator[Plot]:
    for task, (phase, measure) in _LOSSES.items():
        own = [run for run in runs if run.config.task == task]
        lines = [_curve(run, "loss") for run in own] + [_curve(run, "val_loss") for run in own]
        if own:
            caption = f"Loss of {phase}" + (", dashed: of the validation." if task == "finetune" else ".")
            svg = draw_lines(
                [line for line in lines if line.points], "optimiser step", f"{measure} (measured)"
            )
            yield Plot(f"{task}_loss", caption, svg)
    validated = [curve for run in runs if (curve := _curve(run, "val_top1")).points]
    if validated:
        svg = draw_lines(validated, "optimiser step", "top-1 of the validation, % (measured)")
        yield Plot("validation", "Accuracy of the validations, each on one clip per video.", svg)
    rates = [
        Curve(run.name, run.name, [(row["step"], row["clips_per_s"]) for row in run.steps]) for run in runs
    ]
    if rates:
        svg = draw_lines(rates, "optimiser step", "clips/s of all ranks (measured)")
        yield Plot("throughput", "Throughput.", svg)


def _curve(run: Run, column: str) -> Curve:
    """Return a column of a run's metrics over its steps; curves of validations are dashed."""
    points = [(row["step"], row[column]) for row in run.metrics if row.get(column) is not None]
    validates = column == "val_loss"
    return Curve(run.name, f"{run.name}, validation" if validates else run.name, points, dashed=validates)


def _clips(runs: Sequence[Run]) -> Iterator[Plot]:
    """Yield the pictures of the last clip of each run, without a picture that another one includes.

    A reconstruction also shows the kept tokens, so their separate picture is left out.
    """
    for run in runs:
        for name, caption in CAPTIONS.items():
            if name in run.pictures and not (name == "kept_tokens" and "reconstruction" in run.pictures):
                png = png_as_svg(run.pictures[name])
                text = f"{run.name}: {caption}" + (_AUGMENTED if run.config.augment.changes else "")
                yield Plot(f"{Path(run.name).name}_{name}", text, png, name != "slots")
