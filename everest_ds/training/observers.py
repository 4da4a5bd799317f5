"""What watches a run without taking part in it: metrics file, TensorBoard, console. Rank 0 only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from everest_ds.log import logger
from everest_ds.units import format_bytes


@dataclass(frozen=True)
class StepReport:
    """One logged optimiser step.

    Attributes:
        step: optimiser steps done so far, this one included.
        epoch: epochs done so far, with its fraction.
        loss: mean over all clips of the step; None if the step was left out.
        grad_norm: global, before clipping; None where DeepSpeed does not tell, or the step was left out.
        clips_per_s: clips of all ranks, over the time since the last report.
        data_wait_pct: share of that time spent waiting for the loader.
        replaced_videos: of this epoch so far, those that could not be read and others stood in for.
        memory_bytes: peak of this rank since the last report: allocated on a GPU, resident on a CPU.
        tflops_per_s: useful TFLOP/s of each rank, waiting included; None if the cost of a clip is not known.
        mfu_pct: share of the device's peak rate that this is; None for an unknown device.
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
    """One validation: mean loss and accuracies in per cent, of the videos that could be read.

    Attributes:
        val_missing: videos that could not; nothing took their place.
    """

    step: int
    epoch: float
    val_loss: float
    val_top1: float
    val_top5: float
    val_missing: int


class Observer(Protocol):
    """Something told what happens."""

    def on_step(self, report: StepReport) -> None:
        """A logged step has ended."""

    def on_validation(self, report: ValidationReport) -> None:
        """A validation has ended."""

    def on_picture(self, step: int, name: str, picture: Tensor) -> None:
        """A picture was drawn: uint8 (row, column, colour)."""

    def close(self) -> None:
        """The run ends."""


class MetricsFile:
    """Appends every report to `metrics.jsonl`."""

    def __init__(self, file: Path) -> None:
        self._file = open(file, "a", buffering=1)  # a line is on disk as soon as it is written

    def on_step(self, report: StepReport) -> None:
        self._write(asdict(report))

    def on_validation(self, report: ValidationReport) -> None:
        self._write(asdict(report))

    def on_picture(self, step: int, name: str, picture: Tensor) -> None:
        pass

    def close(self) -> None:
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")


class TensorBoard:
    """Scalars and pictures as TensorBoard events, the last picture of a name also as a PNG file."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # heavy

        self._folder = folder
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def on_step(self, report: StepReport) -> None:
        self._scalars("train", asdict(report))

    def on_validation(self, report: ValidationReport) -> None:
        self._scalars("val", asdict(report))

    def on_picture(self, step: int, name: str, picture: Tensor) -> None:
        from matplotlib.image import imsave  # heavy

        self._writer.add_image(name, picture.numpy(), step, dataformats="HWC")
        imsave(self._folder / f"{name}.png", picture.numpy())

    def close(self) -> None:
        self._writer.close()

    def _scalars(self, group: str, values: dict[str, Any]) -> None:
        step = values.pop("step")
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)


class ProgressBar:
    """A live bar in a terminal; a line a report elsewhere."""

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
        norm = "" if report.grad_norm is None else f" |g| {report.grad_norm:.2f}"
        mfu = "" if report.mfu_pct is None else f" MFU {report.mfu_pct:.1f}%"
        loss = "left out" if report.loss is None else f"{report.loss:.4f}"
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
        text = f"val loss {report.val_loss:.4f} top-1 {report.val_top1:.2f}% top-5 {report.val_top5:.2f}%"
        text += f", {report.val_missing} videos missing" if report.val_missing else ""
        logger.info("epoch %.0f %s", report.epoch, text)

    def on_picture(self, step: int, name: str, picture: Tensor) -> None:
        pass

    def close(self) -> None:
        self._bar.stop()
