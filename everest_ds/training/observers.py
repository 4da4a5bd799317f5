"""Observers that report on a run without affecting it, and the pictures that they receive.

Only rank 0 has observers: the metrics file, TensorBoard and the console.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from everest_ds.data.clips import Batch
from everest_ds.durable_files import append_row
from everest_ds.log import logger
from everest_ds.models.watch import Seen, Watch
from everest_ds.parallel.engine import Engine
from everest_ds.reports.clip_pictures import draw_clip
from everest_ds.units import format_bytes


@dataclass(frozen=True)
class StepReport:
    """The figures of one logged optimiser step.

    Attributes:
        step: optimiser steps done so far, including this one.
        epoch: epochs done so far, as a fraction.
        loss: mean over all clips of the step; None if the step was skipped.
        lr: learning rate of the step.
        grad_norm: global norm before clipping; None if DeepSpeed does not report it or the step was skipped.
        clips_per_s: clips of all ranks per second since the last report.
        data_wait_pct: share of that time spent waiting for the loader.
        replaced_videos: unreadable videos of this epoch so far, each replaced by another one.
        memory_bytes: peak of this rank since the last report: allocated on a GPU, resident on a CPU.
        tflops_per_s: useful TFLOP/s per rank, waiting time included; None if the cost of a clip is unknown.
        mfu_pct: `tflops_per_s` in percent of the device's peak rate; None for an unknown device.
    """

    step: int
    epoch: float
    loss: float | None
    lr: float
    grad_norm: float | None
    clips_per_s: float
    data_wait_pct: float
    replaced_videos: int
    memory_bytes: int
    tflops_per_s: float | None
    mfu_pct: float | None


@dataclass(frozen=True)
class ValidationReport:
    """The figures of one validation, over the videos that could be read.

    Attributes:
        step: optimiser steps done so far.
        epoch: epochs done so far, as a fraction.
        val_loss: mean loss.
        val_top1: top-1 accuracy in percent.
        val_top5: top-5 accuracy in percent.
        val_missing: number of unreadable videos, which are not replaced.
    """

    step: int
    epoch: float
    val_loss: float
    val_top1: float
    val_top5: float
    val_missing: int


class Observer(Protocol):
    """Interface of objects that are notified of a run's events."""

    def on_step(self, report: StepReport) -> None:
        """Receive the report of a logged step."""

    def on_validation(self, report: ValidationReport) -> None:
        """Receive the report of a validation."""

    def on_picture(self, step: int, name: str, picture: Tensor) -> None:
        """Receive a picture: uint8 (row, column, colour)."""

    def close(self) -> None:
        """Release all resources at the end of the run."""


class MetricsFile:
    """An observer that appends every report to `metrics.jsonl`."""

    def __init__(self, file: Path) -> None:
        self._path = file

    def on_step(self, report: StepReport) -> None:
        """Append the report as a line."""
        self._write(asdict(report))

    def on_validation(self, report: ValidationReport) -> None:
        """Append the report as a line."""
        self._write(asdict(report))

    def on_picture(self, step: int, name: str, picture: Tensor) -> None:
        """Ignore the picture."""

    def close(self) -> None:
        """Do nothing, because every line is written at once."""

    def _write(self, row: dict[str, Any]) -> None:
        append_row(self._path, row)


class TensorBoard:
    """An observer that writes TensorBoard events, and the latest picture of each name as a PNG file."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported here because it is slow to import

        self._folder = folder
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def on_step(self, report: StepReport) -> None:
        """Write the report's figures as scalars of the group `train`."""
        self._scalars("train", asdict(report))

    def on_validation(self, report: ValidationReport) -> None:
        """Write the report's figures as scalars of the group `val`."""
        self._scalars("val", asdict(report))

    def on_picture(self, step: int, name: str, picture: Tensor) -> None:
        """Write the picture as an event and as a PNG file."""
        from matplotlib.image import imsave  # imported here because it is slow to import

        self._writer.add_image(name, picture.numpy(), step, dataformats="HWC")
        imsave(self._folder / f"{name}.png", picture.numpy())

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def _scalars(self, group: str, values: dict[str, Any]) -> None:
        step = values.pop("step")
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)


class ProgressBar:
    """An observer for the console: a live progress bar in a terminal, one line per report elsewhere."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("step", total=total_steps, completed=first_step, status="")
        self._total = total_steps
        self._bar.start()

    def on_step(self, report: StepReport) -> None:
        """Update the bar, or log the report if there is no terminal."""
        norm = "" if report.grad_norm is None else f" |g| {report.grad_norm:.2f}"
        mfu = "" if report.mfu_pct is None else f" MFU {report.mfu_pct:.1f}%"
        loss = "skipped" if report.loss is None else f"{report.loss:.4f}"
        status = (
            f"loss {loss} lr {report.lr:.2e}{norm} {report.clips_per_s:.1f} clips/s"
            f" wait {report.data_wait_pct:.0f}% mem {format_bytes(report.memory_bytes)}{mfu}"
            + (f" replaced videos {report.replaced_videos}" if report.replaced_videos else "")
        )
        if self._bar.disable:
            logger.info("step %d/%d epoch %.2f %s", report.step, self._total, report.epoch, status)
        else:
            self._bar.update(self._task, completed=report.step, status=status)

    def on_validation(self, report: ValidationReport) -> None:
        """Log the report."""
        text = f"val loss {report.val_loss:.4f} top-1 {report.val_top1:.2f}% top-5 {report.val_top5:.2f}%"
        text += f", {report.val_missing} videos missing" if report.val_missing else ""
        logger.info("epoch %.0f %s", report.epoch, text)

    def on_picture(self, step: int, name: str, picture: Tensor) -> None:
        """Ignore the picture."""

    def close(self) -> None:
        """Stop the bar, leaving its last state in the terminal."""
        self._bar.stop()


def watch(engine: Engine, batch: Batch) -> Seen:
    """Run a batch through the engine again and record the tensors of its first clip.

    Call on every rank, because the weights may be sharded.

    Args:
        engine: the engine that runs the batch, on whose module the recording hooks are set.
        batch: a prepared batch on the device.
    """
    # Eager, because compiled blocks would not call the hooks that record.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), Watch(engine.module) as watched:
        output = engine(*batch.arguments)
    return watched.seen(output)


def draw_pictures(seen: Seen) -> dict[str, Tensor]:
    """Draw the pictures of the first clip, by name: uint8 (row, column, colour)."""
    arrays = [None if tensor is None else tensor[0].numpy() for tensor in seen]
    return {name: torch.from_numpy(picture) for name, picture in draw_clip(*arrays).items()}  # type: ignore[arg-type]
