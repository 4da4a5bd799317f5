"""Submission of checked stages: build their sbatch jobs, print them (--dry-run), or queue them in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from everest_ds.console import print_facts, write_json
from everest_ds.errors import EverestError, UsageError
from everest_ds.jobs.resubmit import queue
from everest_ds.jobs.sbatch import BatchJob, as_shell, job_name, sbatch_command
from everest_ds.jobs.slurm import answer, has_slurm, test_only
from everest_ds.jobs.job_checks import Stage
from everest_ds.jobs.sweep import keep_candidates
from everest_ds.jobs.sweep_file import MAX_TASKS, SweepCandidate, expand_array
from everest_ds.launch.slurm_nodelist import RankPlace
from everest_ds.shipped import shipped

# Placeholder in a chain: --dry-run cannot know the id of the preceding job.
_JOB_BEFORE = "afterok:JOB-BEFORE"


@dataclass(frozen=True)
class Queueing:
    """The sbatch settings of a submission that do not affect its checks."""

    time: str | None
    partition: str | None
    array: str | None
    dependency: str | None
    nodelist: str | None
    options: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Submission:
    """Successive stages and the job of each; `swept` lists the runs if the only job is a sweep."""

    stages: Sequence[Stage]
    swept: Sequence[SweepCandidate]
    jobs: Sequence[BatchJob]


def as_jobs(stages: Sequence[Stage], swept: Sequence[SweepCandidate], queueing: Queueing) -> list[BatchJob]:
    """Build one job per stage; each job waits for the one before it.

    Raises:
        UsageError: `--array` does not suit the kind of job.
    """
    array = _array(queueing.array, stages, swept)
    return [
        BatchJob(
            script=shipped("slurm").resolve() / f"{stage.command}.sbatch",
            arguments=stage.arguments,
            name=job_name(stage.command, stage.run or Path(stage.arguments[0])),
            shape=stage.shape,
            logs=None if stage.run is None else stage.run.absolute() / "logs",
            time=queueing.time,
            partition=queueing.partition,
            array=array,
            dependency=_JOB_BEFORE if number else queueing.dependency,
            nodelist=queueing.nodelist if stage.shape == stages[0].shape else None,
            options=queueing.options,
            environment=queueing.environment,
        )
        for number, stage in enumerate(stages)
    ]


def print_plan(submission: Submission, ranks: Sequence[RankPlace]) -> None:
    """Print the checked plan and, with --nodelist, the hosts of the first and last rank."""
    seats = {}
    if ranks:
        first, last = ranks[0], ranks[-1]
        seats = {"placement": f"rank 0 on {first.host} ... rank {last.rank} on {last.host}"}
    for stage in submission.stages:
        if stage.facts:
            print_facts(f"Plan: {stage.command}", {**stage.facts, **seats})


def show(
    submission: Submission, ranks: Sequence[RankPlace], checked_ms: float, json_file: Path | None
) -> None:
    """Print the sbatch commands, quoted for a shell, with the start that `sbatch --test-only` expects."""
    rows = []
    for stage, job in zip(submission.stages, submission.jobs, strict=True):
        command, environment, says = sbatch_command(job), dict(job.environment), _when(job)
        for name, value in environment.items():
            print(f"export {as_shell([f'{name}={value}'])}")
        print(f"{as_shell(command)}\n# {says}\n")
        rows.append({"command": command, "environment": environment, "says": says, "plan": stage.facts})
    seats = [place._asdict() for place in ranks]
    write_json(json_file, {"jobs": rows, "ranks": seats, "checked_ms": checked_ms})


def queue_all(submission: Submission, json_file: Path | None) -> None:
    """Submit every job with sbatch; if one is refused, cancel those already queued.

    Raises:
        UsageError: SLURM is not installed, or refuses a job.
        RunFolderError: a run folder cannot be written.
    """
    if not has_slurm():
        raise UsageError("SLURM is not installed here", fix="add --local to run the job on this machine")
    if submission.swept:
        keep_candidates(submission.stages[0], submission.swept)
    queued: list[str] = []
    for stage, job in zip(submission.stages, submission.jobs, strict=True):
        after = replace(job, dependency=f"afterok:{queued[-1]}") if queued else job
        try:
            queued.append(queue(after, stage.command, _runs_of(stage, job, submission.swept), stage.run))
        except EverestError:
            for job_id in queued:  # a partial chain is of no use
                answer(["scancel", job_id])
            raise
        where = "" if stage.run is None else f" in {as_shell([str(stage.run)])}"
        print(f"{stage.command}: job {queued[-1]}{where}")
    runs = dict.fromkeys(as_shell([str(stage.run)]) for stage in submission.stages if stage.run)
    if runs:
        print(f"watch with: everest-ds jobs {' '.join(runs)}")
    rows = zip(submission.stages, queued, strict=True)
    write_json(json_file, [{"job": job_id, "command": s.command, "run": s.run} for s, job_id in rows])


def _array(asked: str | None, stages: Sequence[Stage], swept: Sequence[SweepCandidate]) -> str | None:
    if swept:
        every = f"0-{len(swept) - 1}"
        array = every if asked is None else f"{every}{asked}" if asked.startswith("%") else asked
        expand_array(array, len(swept))
        return array
    if asked is not None and (len(stages) > 1 or not asked.endswith("%1")):
        raise UsageError(
            "--array cannot be used with a chain"
            if len(stages) > 1
            else "--array: its tasks would train one run at the same time",
            given=asked,
            allowed="for a single run, tasks one after another, such as 0-9%1",
        )
    return asked


def _when(job: BatchJob) -> str:
    if job.dependency is not None:
        return "starts after the job that it depends on"
    return test_only(job) if has_slurm() else "start time unknown: SLURM is not installed here"


def _runs_of(stage: Stage, job: BatchJob, swept: Sequence[SweepCandidate]) -> dict[str, Path]:
    """Map the suffix of each task's job id to the run folder that logs the task."""
    if stage.run is None:
        return {}
    if job.array is None:
        return {"": stage.run}
    tasks = expand_array(job.array, len(swept) or MAX_TASKS)
    return {f"_{task}": stage.run / swept[task].name if swept else stage.run for task in tasks}
