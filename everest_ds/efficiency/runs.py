"""Run folders as rows of a report: their compute, memory, throughput and accuracy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from everest_ds.config import Experiment, load_experiment
from everest_ds.costs.compute import count_parameters, predict_macs
from everest_ds.costs.memory import predict_memory
from everest_ds.efficiency.arrange import Heading
from everest_ds.efficiency.tables import ComparisonRow, FigureKind
from everest_ds.errors import RunFolderError
from everest_ds.training.run_folder import EVALUATION_FILE, read_metrics
from everest_ds.units import GIB

RUNS_TABLE = "runs"
RUNS_HEADING = Heading(
    title="Runs",
    text="Compute of one clip, memory of one rank and throughput of all ranks together, as the median of the"
    " logged steps. Predicted memory is allocated memory; a run on a CPU measures resident memory.",
    columns={
        "parameters_m": "parameters, M",
        "training_gmacs": "training GMACs",
        "memory_gib": "memory, GiB",
        "clips_per_s": "clips/s",
        "mfu_pct": "MFU, %",
        "data_wait_pct": "data wait, %",
        "loss": "last loss",
        "top1": "top-1, %",
    },
    methods="run",
)


@dataclass(frozen=True)
class Run:
    """The contents of a run folder.

    Attributes:
        name: name of the run in the report.
        config: resolved config of the run.
        metrics: rows of metrics.jsonl.
        environment: contents of environment.json.
        tested_top1: top-1 accuracy of `everest-ds evaluate`, in percent; None if it has not run.
        pictures: PNG files of the last clip that was drawn, by name.
    """

    name: str
    config: Experiment
    metrics: list[dict[str, Any]]
    environment: dict[str, Any]
    tested_top1: float | None
    pictures: dict[str, bytes]

    @property
    def top1(self) -> float | None:
        """The top-1 accuracy of the test, or of the best validation if there was no test, in percent."""
        validated = [row["val_top1"] for row in self.metrics if "val_top1" in row]
        return max(validated, default=None) if self.tested_top1 is None else self.tested_top1

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of `metrics` that belong to training steps."""
        return [row for row in self.metrics if row.get("loss") is not None]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders; a run is named after its folder, or after its path if two folder names are equal.

    Raises:
        RunFolderError: if a folder is not a run folder, or has no logged training step.
    """
    names = [folder.resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    return [
        _read_run(folder, name if unique else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def run_rows(run: Run) -> list[ComparisonRow]:
    """Return a run's rows of table `runs`: predicted and measured figures, in the units of `RUNS_HEADING`."""
    world_size, versions = run.environment["world_size"], run.environment["packages"]
    commit = (run.environment["git"] or {}).get("commit", "unknown")[:7]
    ran = f"{world_size} ranks, torch {versions['torch']}, commit {commit}"
    predicted = {
        "parameters_m": count_parameters(run.config) / 1e6,
        "training_gmacs": predict_macs(run.config).training_macs / 1e9,
        "memory_gib": predict_memory(run.config, num_ranks=world_size).peak_bytes / GIB,
    }
    rows = [_row(run, *figure, "predicted", "") for figure in predicted.items()]
    return rows + [_row(run, *figure, "measured", ran) for figure in _measured(run)]


def _read_run(folder: Path, name: str) -> Run:
    metrics = read_metrics(folder)
    environment, tested = folder / "environment.json", folder / EVALUATION_FILE
    if not environment.is_file():
        raise RunFolderError(
            f"{folder}: {environment.name} is missing", fix="give the folder of a run that has trained"
        )
    top1 = json.loads(tested.read_text())["top1"] if tested.is_file() else None
    pictures = {file.stem: file.read_bytes() for file in (folder / "tensorboard").glob("*.png")}
    run = Run(name, load_experiment(folder), metrics, json.loads(environment.read_text()), top1, pictures)
    if not run.steps:
        raise RunFolderError(
            f"{folder}: no training step is logged yet", fix="wait for the first step, or leave this run out"
        )
    return run


def _measured(run: Run) -> list[tuple[str, float]]:
    steady = run.steps[1:] or run.steps  # the first logged steps are warm-up
    known_mfu = [row["mfu_pct"] for row in steady if row.get("mfu_pct") is not None]
    figures = {
        "memory_gib": max(row["memory_bytes"] for row in run.steps) / GIB,
        "clips_per_s": median(row["clips_per_s"] for row in steady),
        "mfu_pct": median(known_mfu) if known_mfu else None,
        "data_wait_pct": median(row["data_wait_pct"] for row in steady),
        "loss": run.steps[-1]["loss"],
        "top1": run.top1,
    }
    return [(column, value) for column, value in figures.items() if value is not None]


def _row(run: Run, column: str, value: float, kind: FigureKind, note: str) -> ComparisonRow:
    backbone = run.config.model.backbone
    return ComparisonRow(RUNS_TABLE, run.name, backbone, column, None, round(value, 3), kind, None, note)
