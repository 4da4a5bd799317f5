"""Handles for the SLURM tests: a local cluster, its jobs, and the run folders that the jobs write."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everest_ds.jobs.events import JobEvent, read_events
from tests.training.runs import losses

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "slurm"
TOOL = REPOSITORY / "tools" / "local_slurm"
# A start takes 10 s on two idle cores; on busy ones it took two minutes.
PATIENCE_SECONDS = 300.0
_POLL_SECONDS = 0.1
FINAL_STATES = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"})


def wait_for(what: Callable[[], Any], description: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """Call `what` until its result is true; return that result.

    Polls are counted instead of time, because a shared machine may pause this process and the cluster for
    minutes; such a pause then costs one poll.
    """
    for _ in range(int(seconds / _POLL_SECONDS)):
        if value := what():
            return value
        time.sleep(_POLL_SECONDS)
    raise AssertionError(f"waited {seconds:.0f} s in vain for: {description}")


@dataclass(frozen=True)
class LocalCluster:
    """A running cluster whose files are in `folder`."""

    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        """The environment of the cluster's clients, which use this Python and this checkout."""
        return {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "EVEREST_PYTHON": sys.executable,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }

    def tool(self, *arguments: str) -> str:
        """Run tools/local_slurm on this cluster and return its output."""
        return run([str(TOOL), *arguments, "--dir", str(self.folder)], self.variables)

    def slurm(self, *command: str) -> str:
        """Run a SLURM client such as scontrol and return its output."""
        return run(command, self.variables)

    def submit(
        self, script: Path | str, *arguments: str, options: tuple[str, ...] = (), **variables: str
    ) -> Job:
        """Submit a script, by default on two nodes; its output goes to the current folder."""
        command = ["sbatch", "--parsable", "--nodes=2", *options, str(script), *arguments]
        return Job(self, run(command, {**self.variables, **variables}).strip())

    def calm(self) -> None:
        """Wait until all nodes are up and idle."""
        wait_for(lambda: self._states() == {"idle"}, "all nodes idle", 60)

    def cancel_all(self) -> None:
        """Cancel every job of this user, and wait until none is left in the queue."""
        self.slurm("scancel", f"--user={getpass.getuser()}")
        wait_for(lambda: not self.slurm("squeue", "--noheader"), "an empty queue", 60)

    def records(self) -> Iterator[tuple[str, str]]:
        """Yield the path and the newest lines of each daemon's log and of each recent job's output."""
        for file in sorted((self.folder / "log").glob("*.log")):
            yield str(file), _newest_lines(file)
        for output in re.findall(r"StdOut=(\S+)", self.slurm("scontrol", "show", "job"))[-3:]:
            yield output, _newest_lines(Path(output))

    def _states(self) -> set[str]:
        return set(self.slurm("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split())


@dataclass(frozen=True)
class Job:
    """A job that was submitted to the local cluster."""

    cluster: LocalCluster
    number: str

    def show(self, *fields: str) -> list[str]:
        """Return the named fields of `scontrol show job`."""
        words = self.cluster.slurm("scontrol", "-o", "show", "job", self.number).split()
        facts = dict(word.split("=", 1) for word in words if "=" in word)
        return [facts[name] for name in fields]

    @property
    def state(self) -> str:
        return self.show("JobState")[0]

    @property
    def restarts(self) -> int:
        return int(self.show("Restarts")[0])

    @property
    def nodes(self) -> list[str]:
        """The nodes of a running job, the batch host first."""
        host, nodelist = self.show("BatchHost", "NodeList")
        names = self.cluster.slurm("scontrol", "show", "hostnames", nodelist).split()
        return [host, *(name for name in names if name != host)]

    @property
    def output(self) -> str:
        return Path(self.show("StdOut")[0]).read_text()

    def wait(self, *states: str, seconds: float = PATIENCE_SECONDS) -> str:
        """Wait until the job is in one of `states`; fail if it reaches any other final state first."""
        final = FINAL_STATES.union(states)
        state: str = wait_for(lambda: state if (state := self.state) in final else "", f"{states}", seconds)
        assert state in states, f"{state}\n{self.output}"
        return state

    def cancel(self) -> None:
        self.cluster.slurm("scancel", self.number)

    def environments(self) -> Iterator[tuple[int, set[bytes]]]:
        """Yield the process id and environment of each process of the job, on all nodes."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                settings = set((folder / "environ").read_bytes().split(b"\0"))
                if f"SLURM_JOB_ID={self.number}".encode() in settings and (folder / "cmdline").read_bytes():
                    yield int(folder.name), settings

    def processes(self, restarts: int | None = None) -> list[int]:
        """Return the process ids of all starts of the job, or of one start."""
        return [pid for pid, found in self.environments() if restarts in (None, _restart_count(found))]

    def ended_everywhere(self, restarts: int | None = None) -> None:
        """Wait until no process of the job is left on any node."""
        wait_for(lambda: not self.processes(restarts), f"no process left of job {self.number}", 60)


def _newest_lines(file: Path) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-60:]) if file.is_file() else ""


def _restart_count(settings: set[bytes]) -> int:
    found = [s for s in settings if s.startswith(b"SLURM_RESTART_COUNT=")]
    return int(found[0].partition(b"=")[2]) if found else 0


@dataclass
class Run:
    """A run folder that jobs write to, with its steps and events."""

    path: Path

    @property
    def step(self) -> int:
        return max(losses(self.path), default=0) if (self.path / "metrics.jsonl").exists() else 0

    def events(self, job: Job, kind: str | None = None) -> list[JobEvent]:
        return [e for e in read_events(self.path) if e.job_id == job.number and kind in (None, e.event)]

    def steps_beyond(self, job: Job, restarts: int, count: int = 1) -> tuple[float, int]:
        """Wait for `count` steps of one start; return the time of the first and the step resumed from.

        Fails if the job ends before.
        """
        started = wait_for(lambda: self._started(job, restarts), f"start {restarts} of job {job.number}")
        seen: list[float] = []

        def trains() -> bool:
            state = job.state
            fresh = self._written_since(started.seconds) and self.step > started.step
            seen.extend([time.time()] if fresh else [])
            enough = bool(fresh) and self.step >= started.step + count
            assert enough or state not in FINAL_STATES, f"{state} after step {self.step}\n{job.output}"
            return enough

        wait_for(trains, f"steps after {started.step} of job {job.number}")
        return seen[0], started.step

    def _started(self, job: Job, restarts: int) -> JobEvent | None:
        return next((e for e in self.events(job, "started") if e.restarts == restarts), None)

    def _written_since(self, seconds: float) -> bool:
        metrics = self.path / "metrics.jsonl"
        return metrics.exists() and metrics.stat().st_mtime > seconds


def run(command: list[str] | tuple[str, ...], variables: dict[str, str]) -> str:
    """Run a command that must succeed; return its output."""
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=90)
    assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
    return done.stdout


def evaluation(run_folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((run_folder / "evaluation.json").read_text())
    return tree
