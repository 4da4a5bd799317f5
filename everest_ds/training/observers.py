"""Observers that report on a run without affecting it, and the pictures that they receive.

Only rank 0 has observers: the metrics file, TensorBoard and the console.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text
from torch import Tensor

from everest_ds.console import stderr_console
from everest_ds.data.clip_batches import Batch
from everest_ds.durable_files import append_row
from everest_ds.log import ON_LIVE_LINE, logger
from everest_ds.models.watch import Seen, Watch
from everest_ds.parallel.engine import Engine
from everest_ds.probing.scores import ProbeScores
from everest_ds.reports.clip_pictures import draw_clip
from everest_ds.units import format_bytes, format_duration

_NEVER_CUT = 3  # figures of the live line: step, loss and remaining time


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
        val_top5: top-5 accuracy in percent; None for up to five classes.
        val_missing: number of unreadable videos, which are not replaced.
    """

    step: int
    epoch: float
    val_loss: float
    val_top1: float
    val_top5: float | None
    val_missing: int


@dataclass(frozen=True)
class ProbeReport:
    """The figures of the probes of the frozen encoder, over the videos that could be read.

    Attributes:
        step: optimiser steps done so far.
        epoch: epochs done so far, as a fraction.
        probe_linear_top1: top-1 accuracy of the linear probe, in percent.
        probe_knn_top1: top-1 accuracy of the nearest neighbours, in percent.
        probe_rankme: effective rank of the features.
        probe_missing: number of unreadable videos.
    """

    step: int
    epoch: float
    probe_linear_top1: float
    probe_knn_top1: float
    probe_rankme: float
    probe_missing: int

    @classmethod
    def of(cls, scores: ProbeScores, step: int, epoch: float, num_missing: int) -> ProbeReport:
        """Return the report of the cheap probes after `step`."""
        return cls(step, epoch, scores.linear.pct, scores.knn.pct, scores.rankme, num_missing)


class Observer(Protocol):
    """Interface of objects that are notified of a run's events."""

    def on_step(self, report: StepReport) -> None:
        """Receive the report of a logged step."""

    def on_validation(self, report: ValidationReport) -> None:
        """Receive the report of a validation."""

    def on_probe(self, report: ProbeReport) -> None:
        """Receive the report of the probes."""

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

    def on_probe(self, report: ProbeReport) -> None:
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

    def on_probe(self, report: ProbeReport) -> None:
        """Write the report's figures as scalars of the group `probe`."""
        self._scalars("probe", asdict(report))

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


class _LiveLine:
    """A renderable of one line: the figures of the latest report, as many as the terminal has room for."""

    def __init__(self) -> None:
        self.figures: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = " ".join(self.figures[:_NEVER_CUT])
        for figure in self.figures[_NEVER_CUT:]:
            if len(shown) + 1 + len(figure) > options.max_width:
                break
            shown += f" {figure}"
        yield Text(shown, no_wrap=True, overflow="crop")


class ProgressLine:
    """An observer that logs every report; in a terminal, the console shows a live line instead of the log.

    Step, loss and remaining time come first, and the other figures follow in the order of their worth.
    """

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total, self._first = total_steps, first_step
        self._started = time.monotonic()
        self._line = _LiveLine()
        self._line.figures = (f"step {first_step}/{total_steps}", "waiting for the first report")
        self._live = None
        if (console := stderr_console()).is_interactive:
            out = sys.stdout.isatty()  # what is printed to a file or a pipe must stay there
            self._live = Live(self._line, console=console, redirect_stdout=out)
            self._live.start()

    def on_step(self, report: StepReport) -> None:
        """Log the report, and show it in the live line."""
        self._line.figures = figures = self._figures(report)
        rest, shown = " ".join(figures[1:]), {ON_LIVE_LINE: self._live}
        logger.info("%s epoch %.2f %s", figures[0], report.epoch, rest, extra=shown)

    def on_validation(self, report: ValidationReport) -> None:
        """Log the report."""
        text = f"val loss {report.val_loss:.4f} top-1 {report.val_top1:.2f}%"
        text += "" if report.val_top5 is None else f" top-5 {report.val_top5:.2f}%"
        text += f", {report.val_missing} videos missing" if report.val_missing else ""
        logger.info("epoch %.4g %s", report.epoch, text)

    def on_probe(self, report: ProbeReport) -> None:
        """Log the report."""
        text = f"probes: linear {report.probe_linear_top1:.2f}% kNN {report.probe_knn_top1:.2f}%"
        text += f" RankMe {report.probe_rankme:.1f}"
        text += f", {report.probe_missing} videos missing" if report.probe_missing else ""
        logger.info("epoch %.4g %s", report.epoch, text)

    def on_picture(self, step: int, name: str, picture: Tensor) -> None:
        """Ignore the picture."""

    def close(self) -> None:
        """End the live line, leaving its last state in the terminal."""
        if self._live is not None:
            with suppress(OSError):  # the terminal is gone
                self._live.stop()

    def _figures(self, report: StepReport) -> list[str]:
        """Return the figures of a report, the most important ones first."""
        step_s = (time.monotonic() - self._started) / (report.step - self._first)
        remaining = format_duration(step_s * (self._total - report.step))
        optional = {
            "replaced videos {}": report.replaced_videos or None,
            "{:.1f} clips/s": report.clips_per_s,
            "mem {}": format_bytes(report.memory_bytes),
            "wait {:.0f}%": report.data_wait_pct,
            "MFU {:.1f}%": report.mfu_pct,
            "lr {:.2e}": report.lr,
            "|g| {:.2f}": report.grad_norm,
        }
        return [
            f"step {report.step}/{self._total}",
            "loss skipped" if report.loss is None else f"loss {report.loss:.4f}",
            f"ETA {remaining}",
            *(text.format(value) for text, value in optional.items() if value is not None),
        ]


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
