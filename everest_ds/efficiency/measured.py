"""Results of `everest-ds profile --measure`: measured, stored as JSON and read back for reports."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from everest_ds.config.schema import Experiment
from everest_ds.efficiency.published import Cell
from everest_ds.efficiency.systems import SYSTEMS, Figure, OwnModel
from everest_ds.efficiency.tables import ComparisonRow, make_row
from everest_ds.errors import OutOfMemoryError, UsageError
from everest_ds.profiling.step_measurement import measure_step
from everest_ds.profiling.step_phases import TrainingStep
from everest_ds.units import format_bytes, format_duration

PROFILE_FORMAT = "everest-ds profile, format 2"  # the number increases when the meaning of a key changes
_K400_CLIPS = 240_000  # clips per epoch in the published tables
_NODE_GPUS = 8
# (table, column) -> training phase that the column's figures describe
_PHASES = {
    ("pretraining_cost", "pt_time"): "pretrain",
    ("pretraining_cost", "memory_gb"): "pretrain",
    ("k400", "memory_gb"): "pretrain",
    ("k400_finetuning_of_other_mvas", "memory_gb"): "finetune",
}


@dataclass(frozen=True)
class Measured:
    """A measured training step of one GPU (or CPU).

    Attributes:
        subject: name of the measured experiment.
        config: configuration of the measured experiment.
        device: name that the device's driver reports.
        dtype: `fp32`, `tf32`, `fp16` or `bf16`.
        torch_version: version of PyTorch.
        commit: commit of this project; None outside a checkout.
        phases_ms: median milliseconds of forward (on a CPU including augmentation), backward and optimizer.
        step_ms: quartiles of the whole step without data wait: first, median, third, in milliseconds.
        clips_per_s: clips per second, without data wait.
        tflops_per_s: useful floating-point operations per second, in 10^12.
        mfu_pct: model FLOPs utilisation; None on a device whose peak rate is unknown.
        peak_memory_bytes: the allocator's peak; None on a CPU.
    """

    subject: str
    config: Experiment
    device: str
    dtype: str
    torch_version: str
    commit: str | None
    phases_ms: dict[str, float]
    step_ms: tuple[float, float, float]
    clips_per_s: float
    tflops_per_s: float
    mfu_pct: float | None
    peak_memory_bytes: int | None

    @property
    def where(self) -> str:
        """Device, dtype, PyTorch version and commit, as one phrase."""
        commit = f", commit {self.commit[:7]}" if self.commit else ""
        return f"{self.device}, {self.dtype}, torch {self.torch_version}{commit}"

    @property
    def label(self) -> str:
        """Short description of the measurement: subject, clips per micro-batch and dtype."""
        return f"{self.subject}, {self.config.batch.micro_batch_size} clips, {self.dtype}"

    def facts(self) -> dict[str, str]:
        """Return the measurement in human-readable form: name -> text with unit."""
        low, middle, high = self.step_ms
        peak = (
            "unknown: no peak rate is listed for this device and dtype"
            if self.mfu_pct is None
            else f"{self.mfu_pct:.1f} %"
        )
        return {
            "where": self.where,
            "step": f"{middle:.1f} ms (quartiles {low:.1f} to {high:.1f}), without data wait",
            **{name: f"{milliseconds:.1f} ms" for name, milliseconds in self.phases_ms.items()},
            "clips per second": f"{self.clips_per_s:.2f}",
            "useful TFLOP/s": f"{self.tflops_per_s:.2f}",
            "MFU": peak,
            "peak memory": "not measured on a CPU"
            if self.peak_memory_bytes is None
            else format_bytes(self.peak_memory_bytes),
        }

    def as_json(self) -> dict[str, Any]:
        """Return the value of the `measured` key in a profile's JSON file."""
        return {**asdict(self), "config": self.config.model_dump(mode="json")}


def measure_experiment(
    subject: str,
    config: Experiment,
    build: AbstractContextManager[TrainingStep],
    device: torch.device,
    commit: str | None,
) -> Measured:
    """Time training steps of an experiment on one device.

    Args:
        subject: name of the experiment.
        config: configuration of the experiment.
        build: context manager that builds the step on entry and frees it on exit; its micro-batches are
            already in memory.
        device: the device that runs the step.
        commit: commit of the running code.

    Raises:
        OutOfMemoryError: the step does not fit on the device.
    """
    on_gpu = device.type == "cuda"
    gc.collect()  # free what an earlier engine left behind
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with build as step:
            found = measure_step(step, config, device, commit=commit)
    except torch.OutOfMemoryError:
        raise OutOfMemoryError(
            f"{subject}: a training step does not fit on {device}",
            given=f"batch.micro_batch_size={config.batch.micro_batch_size}",
            fix="lower batch.micro_batch_size, or set recompute.mode",
        ) from None
    times = found.times
    phases = {"forward": times.forward, "backward": times.backward, "optimizer": times.optimizer}
    whole = times.step
    return Measured(
        subject=subject,
        config=config,
        device=found.device,
        dtype=found.dtype,
        torch_version=found.torch_version,
        commit=found.commit,
        phases_ms={name: 1e3 * spread.median_s for name, spread in phases.items()},
        step_ms=(1e3 * whole.quartile_1_s, 1e3 * whole.median_s, 1e3 * whole.quartile_3_s),
        clips_per_s=found.clips_per_s,
        tflops_per_s=found.flops_per_s / 1e12,
        mfu_pct=found.mfu_pct,
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
    )


def read_measured(file: Path) -> Measured:
    """Read the measurement in a file written by `everest-ds profile --measure --json FILE`.

    Raises:
        UsageError: the file cannot be read, has another format version, or holds no measurement.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read as JSON", given=str(error)) from None
    again = "run everest-ds profile SUBJECT --measure --json FILE"
    found = content.get("format") if isinstance(content, dict) else None
    if found != PROFILE_FORMAT:
        raise UsageError(
            f"{file}: not a measurement in this version's format",
            given=f"format {found!r}",
            allowed=repr(PROFILE_FORMAT),
            fix=again,
        )
    if content["measured"] is None:
        raise UsageError(f"{file}: holds no measurement", fix=again)
    stored = content["measured"]
    try:
        config = Experiment.model_validate(stored["config"])
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UsageError(f"{file}: its config was written by another version", given=reason) from None
    return Measured(**{**stored, "config": config, "step_ms": tuple(stored["step_ms"])})


def measured_rows(cells: Sequence[Cell], measurements: Sequence[Measured]) -> list[ComparisonRow]:
    """Return a row for each pair of a published cell and a measurement with the same tokens and backbone."""
    return [row for cell in cells for one in measurements for row in _rows(cell, one)]


def _rows(cell: Cell, one: Measured) -> list[ComparisonRow]:
    """Return the rows that compare a measurement with a published cell; none if they do not correspond."""
    phase = _PHASES.get((cell.table, cell.column))
    if phase is None:
        return []
    model = getattr(SYSTEMS[cell.method, cell.backbone], phase)
    if not isinstance(model, OwnModel) or _identity(one.config) != _identity(model.config):
        return []  # not the computation behind the published figure
    clips = one.config.batch.micro_batch_size
    note = f"{_NODE_GPUS} x one {one.where}; {clips} clips per GPU, {one.config.model.attention} attention"
    if cell.column == "pt_time":
        epoch = format_duration(_K400_CLIPS / (_NODE_GPUS * one.clips_per_s))
        how = f"{note}; {_K400_CLIPS:,} clips at {one.clips_per_s:.0f}/s per GPU, without data wait"
        # No gap is given, because the published time was measured on another device.
        return [replace(make_row(cell, None, how), value=epoch, kind="measured")]
    if one.peak_memory_bytes is None:
        return []
    return [make_row(cell, Figure(_NODE_GPUS * one.peak_memory_bytes / 1e9, "measured", note))]


def _identity(config: Experiment) -> tuple[object, ...]:
    """Return a key that is equal for experiments that do the same computation per clip."""
    model = config.model
    return config.task, model.backbone, model.geometry, config.tokens.selection, config.token_counts
