"""A run of the signal matrix: its config, the moment of each phase, and what must hold after a stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from everest_ds.checkpoints.names import newest_step
from everest_ds.config import dump_experiment
from everest_ds.data.synthetic import SyntheticSpec, synthesize
from tests.signals.cases import PHASES, Case
from tests.signals.report import Row
from tests.training.runs import experiment, losses, metrics

LAUNCHER = ("-m", "everest_ds")
_STEPS_PER_EPOCH = 3
_PATIENCE_S = 120.0
# No healthy video is accused, no memory is said to be short, and no traceback greets a user who stops a run.
_ACCUSATIONS = re.compile("crashes the video|workers? (was|are) killed|out of memory|Traceback|counts as")
# The kind of run in which each phase lasts long enough to be met. Runs of one kind have the same losses.
KINDS = dict(zip(PHASES, ("plain", "plain", "reading", "plain", "validating"), strict=True))


def write_recipe(data: Path, folder: Path, kind: str, accumulation: int) -> Path:
    """Write the config of a run whose phases of `kind` are long; return its path."""
    val = data / "long-val.txt"
    if kind == "validating":
        val.write_text((data / "val.txt").read_text() * 10)
    config = experiment(
        data,
        folder / "run",
        "finetune",
        model={"image_size": 16, "patch_size": 8},
        data={"val": str(val) if kind == "validating" else None},
        batch={"micro_batch_size": 4 // accumulation, "global_batch_size": 8},
        schedule={"epochs": 4000, "warmup_epochs": 1},
        run={"save_every_steps": 1 if kind == "plain" else 10, "hang_timeout_s": 60, "keep_checkpoints": 2},
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(dump_experiment(config))
    return file


def make_data(folder: Path, kind: str) -> Path:
    """Create the videos of a run: large ones, which keep the workers busy, for the phase of reading."""
    spec = SyntheticSpec(num_frames=20, size=320 if kind == "reading" else 32)
    synthesize(folder, {"train": 24, "val": 12, "test": 1}, spec, workers=2)
    return folder


@dataclass
class Start:
    """One start of a run: the step from which it resumed, and the file times before it."""

    path: Path
    first_step: int
    began: float

    @classmethod
    def now(cls, path: Path) -> Start:
        """Note the state of the run at `path` just before a start."""
        return cls(path, newest_step(path), time.time())

    def wait_for(self, phase: str, alive: Callable[[], object]) -> None:
        """Wait until the run is in `phase`; `alive` raises an error if it has ended."""
        if phase != "before the first step":
            self.until(partial(self.passed, self.first_step + 1), alive)
        moments: dict[str, Callable[[], object]] = {
            "before the first step": self._claimed,
            "saving": lambda: any((self.path / "checkpoints").glob(".saving-*")),
            "validating": self._validates,
        }
        if phase in moments:
            self.until(moments[phase], alive)

    def measure(self, case: Case, text: str, resumable: bool, stopped_s: float) -> Row:
        """Return the effect of a stop on the run, whose output was `text`; print it if it did harm."""
        logs = "".join(
            file.read_text() for file in (self.path / "logs").glob("rank-*.*") if _mtime(file) >= self.began
        )
        accusations = len(_ACCUSATIONS.findall(text + logs)) + (self.path / "broken.jsonl").exists()
        row = Row(case, self.step() - newest_step(self.path), accusations, resumable, stopped_s)
        if not row.harmless:
            print(row, text, logs, sep="\n")
        return row

    def _claimed(self) -> bool:
        return _mtime(self.path / "config.yaml") > self.began

    def _validates(self) -> bool:
        rows = metrics(self.path)
        return "loss" in rows[-1] and rows[-1]["step"] % _STEPS_PER_EPOCH == 0

    def step(self) -> int:
        """Return the last step that the run has logged."""
        return max(losses(self.path), default=0) if (self.path / "metrics.jsonl").exists() else 0

    def passed(self, step: int) -> bool:
        """Return whether the run has logged a step after `step`."""
        return self.step() > step

    @staticmethod
    def until(moment: Callable[[], object], alive: Callable[[], object]) -> None:
        """Wait for a moment of the run; `alive` raises an error if the run has ended."""
        deadline = time.monotonic() + _PATIENCE_S
        while not moment():
            alive()
            assert time.monotonic() < deadline, "the phase did not come"
            time.sleep(0.002)


def launch(
    recipe: Path, workers: int, program: Sequence[str] = LAUNCHER, stderr: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start two ranks of a run in their own process group."""
    arguments = ["finetune", str(recipe), f"data.num_workers={workers}"]
    return subprocess.Popen(
        [sys.executable, *program, *arguments, *(["--nproc", "2"] if program is LAUNCHER else [])],
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@contextmanager
def ended(run: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A context at whose end no process of the run is left."""
    try:
        yield run
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


def check_alive(run: subprocess.Popen[str]) -> None:
    """Raise an error if the run has ended."""
    if run.poll() is not None:
        raise AssertionError(f"the run has ended with {run.returncode}: {run.communicate()[1] or run.args!r}")


def undisturbed(recipe: Path, num_steps: int) -> dict[int, float]:
    """Return the losses of the first `num_steps` steps of a recipe in a run that is not disturbed."""
    folder = recipe.parent / "whole"
    whole = recipe.with_name("whole.yaml")
    whole.write_text(recipe.read_text().replace(str(recipe.parent / "run"), str(folder)))
    start = Start.now(folder)
    # Nobody reads the output of a run that may be long, and a full pipe would stop it.
    with ended(launch(whole, workers=1, stderr=subprocess.DEVNULL)) as run:
        while (step := start.step()) < num_steps:  # a step, not the whole run, has to come in time
            start.until(partial(start.passed, step), lambda: check_alive(run))
        (folder / "kill").touch()
        run.wait(timeout=120)
    return {step: loss for step, loss in losses(folder).items() if step <= num_steps}


def rank_process(setting: str, run: Path) -> int:
    """Return the process id of the rank with `setting`, such as RANK=1, in its environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if setting.encode() in environ and os.fsencode(run.parent) in command:
            found[int(folder.name)] = parent
    (rank,) = (pid for pid, parent in found.items() if parent not in found)
    return rank


def _mtime(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0
