"""Queueing of a checked submission with SLURM, and the descriptions of its jobs that are printed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from everest_ds.errors import EverestError, ExitCode, RunFolderError, UsageError
from everest_ds.jobs.chain import dependency_on
from everest_ds.jobs.events import JobEvent, append_event
from everest_ds.jobs.job_checks import Stage
from everest_ds.jobs.job_plan import Submission
from everest_ds.jobs.resubmit import keep_job
from everest_ds.jobs.sbatch import BatchJob, as_shell, sbatch_command
from everest_ds.jobs.slurm import answer, has_slurm, submit_job, test_only
from everest_ds.jobs.slurm_state import JobState, query_jobs
from everest_ds.jobs.sweep import keep_candidates
from everest_ds.jobs.sweep_file import MAX_TASKS, SweepCandidate, expand_array

_POLL_SECONDS = 5.0


def plan_tables(submission: Submission) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the title and the facts of each stage's plan, with the hosts of the first and last rank."""
    placement = {}
    if submission.ranks:
        first, last = submission.ranks[0], submission.ranks[-1]
        placement = {"placement": f"rank 0 on {first.host} ... rank {last.rank} on {last.host}"}
    for stage in submission.stages:
        if stage.facts:
            yield f"Plan: {stage.command}", {**stage.facts, **placement}


def jobs_to_queue(submission: Submission) -> list[dict[str, Any]]:
    """Return the sbatch command of each job, with the start that `sbatch --test-only` expects."""
    return [
        {
            "command": sbatch_command(job),
            "environment": dict(job.environment),
            "says": _expected_start(job),
            "plan": stage.facts,
        }
        for stage, job in zip(submission.stages, submission.jobs, strict=True)
    ]


def queue_all(submission: Submission, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Submit every job with sbatch; if one is refused, cancel those already queued.

    Args:
        submission: the checked jobs.
        report: receives one line for each queued job, and one that says how to watch them.

    Returns:
        The id, the command and the run folder of each job.

    Raises:
        UsageError: if SLURM is not installed, or refuses a job.
        RunFolderError: if a run folder cannot be written.
    """
    if not has_slurm():
        raise UsageError("SLURM is not installed here", fix="add --local to run the job on this machine")
    if submission.swept:
        keep_candidates(submission.stages[0], submission.swept)
    queued: list[dict[str, Any]] = []
    for stage, job in zip(submission.stages, submission.jobs, strict=True):
        after = dependency_on([row["job"] for row in queued], stage.command) or job.dependency
        try:
            tasks = _runs_of(stage, job, submission.swept)
            job_id = _queue(replace(job, dependency=after), stage, tasks)
        except EverestError:
            for row in queued:  # a partial chain is of no use
                answer(["scancel", row["job"]])
            raise
        queued.append({"job": job_id, "command": stage.command, "run": stage.run})
        where = "" if stage.run is None else f" in {as_shell([str(stage.run)])}"
        report(f"{stage.command}: job {job_id}{where}")
    runs = dict.fromkeys(as_shell([str(stage.run)]) for stage in submission.stages if stage.run)
    if runs:
        report(f"watch with: everest-ds jobs {' '.join(runs)}")
    return queued


def wait_until_over(queued: Sequence[Mapping[str, Any]]) -> int:
    """Wait until all queued jobs have ended, and return 0 or the exit code of the first that did not finish.

    Args:
        queued: the jobs as `queue_all` returned them.
    """
    states: dict[str, JobState] = {}
    while True:
        with suppress(UsageError):  # while the controller is away, the jobs may keep running
            found = query_jobs(row["job"] for row in queued)
            states.update(found)
            if all(state.is_over for state in found.values()):
                break
        time.sleep(_POLL_SECONDS)
    for row in queued:  # an array job has several states
        own = (state for job_id, state in states.items() if job_id.partition("_")[0] == row["job"])
        code = next((state.outcome for state in own if state.outcome), ExitCode.OK)
        if code:
            return code
    return ExitCode.OK


def _expected_start(job: BatchJob) -> str:
    if job.dependency is not None:
        return "starts after the job that it depends on"
    return test_only(job) if has_slurm() else "start time unknown: SLURM is not installed here"


def _runs_of(stage: Stage, job: BatchJob, swept: Sequence[SweepCandidate]) -> dict[str, Path]:
    """Map the suffix of each task's job id ("" or "_4") to the run folder that logs the task."""
    if stage.run is None:
        return {}
    if job.array is None:
        return {"": stage.run}
    tasks = expand_array(job.array, len(swept) or MAX_TASKS)
    return {f"_{task}": stage.run / swept[task].name if swept else stage.run for task in tasks}


def _queue(job: BatchJob, stage: Stage, runs: Mapping[str, Path]) -> str:
    """Submit a job, record it in its run folders, and return its id."""
    try:
        for folder in [*runs.values(), *([job.logs] if job.logs else [])]:
            folder.mkdir(parents=True, exist_ok=True)
        if stage.run is not None:
            keep_job(stage.run, stage.command, job)
    except OSError as error:
        raise RunFolderError("the run folder cannot be written", given=str(error)) from None
    seconds = time.time()  # taken now, because the job may start and log events before sbatch returns
    job_id = submit_job(job)
    for suffix, run in runs.items():
        append_event(run, JobEvent("submitted", f"{job_id}{suffix}", task=stage.command, seconds=seconds))
    return job_id
