"""The jobs of a submission run on this machine, one after another and without SLURM."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import call

from everest_ds.errors import ExitCode
from everest_ds.jobs.chain import needs_success
from everest_ds.jobs.events import EventKind, JobEvent, append_event
from everest_ds.jobs.job_checks import Stage
from everest_ds.jobs.job_plan import Submission
from everest_ds.jobs.status import LOCAL, explain_exit_code
from everest_ds.jobs.sweep import keep_candidates
from everest_ds.jobs.sweep_file import SweepCandidate

_OUTCOME: dict[int, EventKind] = {ExitCode.OK: "finished", ExitCode.STOPPED: "stopped"}


def run_locally(submission: Submission) -> int:
    """Run the jobs of a submission on this machine, and return an exit code for all of them.

    A chain ends when a job fails whose success the next job needs, and the exit code of the last job that
    failed is returned. A sweep continues after a run that fails, and 0 is returned. A stop skips the
    remaining jobs or runs, and its code is returned.
    """
    if submission.swept:
        return _run_sweep(submission.stages[0], submission.swept)
    code: int = ExitCode.OK
    for stage in submission.stages:
        if code == ExitCode.STOPPED or (code and needs_success(stage.command)):
            return code
        code = _run(stage.command, stage.arguments, stage.shape.num_ranks, stage.run) or code
    return code


def _run_sweep(stage: Stage, swept: Sequence[SweepCandidate]) -> int:
    assert stage.run is not None
    keep_candidates(stage, swept)
    for candidate in swept:
        run = stage.run / candidate.name
        code = _run(candidate.task, (candidate.recipe, *candidate.overrides), stage.shape.num_ranks, run)
        if code == ExitCode.STOPPED:
            return code
    return ExitCode.OK


def _run(command: str, arguments: Sequence[str], num_ranks: int, run: Path | None) -> int:
    ranks = [] if command in ("profile", "report") else ["--nproc", str(num_ranks)]
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
        append_event(run, JobEvent("started", LOCAL, task=command))
    code = call([sys.executable, "-m", "everest_ds", command, *arguments, *ranks])
    if run is not None:
        reason = None if code == ExitCode.OK else explain_exit_code(code)
        outcome = _OUTCOME.get(code, "failed")
        append_event(run, JobEvent(outcome, LOCAL, task=command, reason=reason, code=code))
    return code
