"""The real command on real video files: clip rate, data wait, saving, stopping and resuming."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everest_ds.data.synthetic import SyntheticSpec, synthesize
from everest_ds.errors import ExitCode, RunFolderError
from everest_ds.launch.local import available_cores
from everest_ds.training.run_folder import read_metrics
from everest_ds.training.stop import GRACE_FILE
from gpu_check.record import Record, Row

_EVERY = (
    "run.log_every_steps=2",
    "run.save_every_steps=16",
    "run.keep_checkpoints=1",
    "run.image_every_steps=1000000",
)
_LONG = ("schedule.epochs=1000", "schedule.warmup_epochs=0")  # long enough to end only by a request to stop
_POLL_S = 0.1
_WARM_UP_STEPS = 6  # the first batches wait for workers to start


@dataclass(frozen=True)
class _Plan:
    """A training run: its recipe, its videos and its number of steps."""

    recipe: str
    videos: int
    spec: SyntheticSpec
    steps: int
    overrides: tuple[str, ...]


_PLAN = _Plan(
    "ucf101_pretrain_vit_large",
    64,  # an epoch of one step; a clip spans 64 frames
    SyntheticSpec(num_frames=66, size=256, kind="busy"),
    40,
    ("batch.micro_batch_size=64", "batch.global_batch_size=64"),
)
_TINY = _Plan("demo_pretrain", 16, SyntheticSpec(num_frames=20, size=32), 20, ("batch.micro_batch_size=4",))


def run(record: Record) -> None:
    """Write videos, train on them, stop and resume; then train with four clips per decoded video."""
    plan = _TINY if record.session.tiny else _PLAN
    with tempfile.TemporaryDirectory(prefix="everest-ds-") as name:
        folder = Path(name)
        record.measure("write videos", lambda: _write_videos(plan, folder))
        run_dir = folder / "run"
        record.measure("train from video files", lambda: _train(record, plan, folder, run_dir, plan.steps))
        record.measure("resume", lambda: _resume(record, plan, folder, run_dir), needs_s=25)
        more = ("data.repeats=4",)
        record.measure(
            "four clips per decoded video",
            lambda: _train(record, plan, folder, folder / "repeats", plan.steps, *more),
            needs_s=40,
        )


def _write_videos(plan: _Plan, folder: Path) -> Row:
    started = time.perf_counter()
    synthesize(folder, {"train": plan.videos}, plan.spec, workers=available_cores())
    return {"videos": plan.videos, "seconds": time.perf_counter() - started}


def _train(record: Record, plan: _Plan, folder: Path, run_dir: Path, steps: int, *overrides: str) -> Row:
    """Train for `steps` steps, ask the run to stop, and return a row of its metrics."""
    started = time.perf_counter()
    with _training(plan, folder, run_dir, overrides) as process:
        first_s = _wait(record, process, lambda: _last_step(run_dir) > 0) - started
        _wait(record, process, lambda: _last_step(run_dir) >= steps)
        stop_s = _stop(record, process, run_dir)
    rows = [row for row in read_metrics(run_dir) if "clips_per_s" in row]
    steady = [row for row in rows if row["step"] > _WARM_UP_STEPS] or rows
    row: Row = {
        name: _median(steady, name) for name in ("clips_per_s", "data_wait_pct", "mfu_pct", "memory_bytes")
    }
    row |= {"workers": _workers(), "steps": rows[-1]["step"], "last_loss": rows[-1]["loss"]}
    row |= {"first_report_s": first_s, "stop_and_save_s": stop_s}
    return row | {"slowest_save_s": json.loads((run_dir / GRACE_FILE).read_text())["slowest_save_s"]}


def _resume(record: Record, plan: _Plan, folder: Path, run_dir: Path) -> Row:
    """Start the same command again, wait for its first step and stop it; return a row of times."""
    before, started = _last_step(run_dir), time.perf_counter()
    with _training(plan, folder, run_dir, ()) as process:
        first_s = _wait(record, process, lambda: _last_step(run_dir) > before) - started
        stop_s = _stop(record, process, run_dir)
    return {"from_step": before, "first_report_s": first_s, "stop_and_save_s": stop_s}


@contextmanager
def _training(
    plan: _Plan, folder: Path, run_dir: Path, overrides: tuple[str, ...]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command as a user types it, and end the process on leaving the context."""
    data = (f"data.train={folder / 'train.txt'}", f"data.num_workers={_workers()}", f"run.dir={run_dir}")
    command = [sys.executable, "-m", "everest_ds", "pretrain", plan.recipe, "--nproc", "1"]
    process = subprocess.Popen([*command, *data, *_LONG, *_EVERY, *plan.overrides, *overrides])
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _stop(record: Record, process: subprocess.Popen[bytes], run_dir: Path) -> float:
    """Stop the run and return the seconds from the request to its end, checkpoint included."""
    asked = time.perf_counter()
    (run_dir / "kill").touch()
    ended = _wait(record, process, lambda: process.poll() is not None)
    if process.returncode != ExitCode.STOPPED:
        raise RuntimeError(f"the run ended with exit code {process.returncode} when it was asked to stop")
    return ended - asked


def _wait(record: Record, process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> float:
    """Wait until `condition` holds and return the time.

    Raises:
        RuntimeError: the process or the session's time ended first.
    """
    while not condition():
        if process.poll() is not None and not condition():
            raise RuntimeError(f"the run ended with exit code {process.returncode}")
        if record.session.left_s < 0:
            raise RuntimeError("the time of the session ran out")
        time.sleep(_POLL_S)
    return time.perf_counter()


def _last_step(run_dir: Path) -> int:
    try:
        return max((row["step"] for row in read_metrics(run_dir) if "clips_per_s" in row), default=0)
    except RunFolderError:  # the run has not started yet
        return 0


def _median(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return statistics.median(values) if values else None


def _workers() -> int:
    return max(1, available_cores() - 1)
