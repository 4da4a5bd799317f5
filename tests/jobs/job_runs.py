"""Run folders of jobs, written without training."""

from __future__ import annotations

import json
from pathlib import Path

from everest_ds.config import dump_experiment
from everest_ds.jobs.events import JobEvent, append_event
from tests.training.runs import experiment


def make_run(folder: Path, *events: JobEvent, steps: int = 0) -> Path:
    """Write a run folder with events and metrics of `steps` steps; the last line of metrics is cut short."""
    folder.mkdir(parents=True)
    for event in events:
        append_event(folder, event)
    (folder / "config.yaml").write_text(dump_experiment(experiment(Path("data"), folder)))
    rows = [
        {"step": n, "epoch": n / 3, "loss": 1 / n, "clips_per_s": 5.0, "memory_bytes": 2**30}
        for n in range(1, steps + 1)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 9')
    return folder
