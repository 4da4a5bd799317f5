"""`everest-ds job begin | end`: internal commands that slurm/common.sh runs around a job's ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from everest_ds.cli.options import JsonFile, Overrides, RecipeArg
from everest_ds.config.load import load_for_task
from everest_ds.errors import UsageError

if TYPE_CHECKING:
    from everest_ds.jobs.requeue import SlurmJob

Command = Annotated[
    Literal["pretrain", "finetune", "evaluate"],
    typer.Argument(help="The command that the ranks run; its arguments follow."),
]


def begin(
    command: Command, source: RecipeArg, overrides: Overrides = None, json_file: JsonFile = None
) -> None:
    """Check the config, and refuse to start a job that must not start again."""
    from everest_ds.checkpoints.names import newest_step
    from everest_ds.jobs import requeue as job

    here, run = _here(), _run(command, source, overrides)
    run.mkdir(parents=True, exist_ok=True)
    job.record_start(here, run, newest_step(run))


def end(
    code: int,
    state: str,
    command: Command,
    source: RecipeArg,
    overrides: Overrides = None,
    json_file: JsonFile = None,
) -> None:
    """Print `requeue`, followed by any faulty nodes, or `stop`; print the reason on stderr."""
    from everest_ds.jobs import requeue as job

    verdict = job.record_end(_here(), _run(command, source, overrides), code, state)
    typer.echo(f"everest-ds: {verdict.reason}", err=True)
    typer.echo(f"requeue {verdict.bad_nodes or ''}" if verdict.requeue else "stop")


def _here() -> SlurmJob:
    from everest_ds.jobs.requeue import current_job

    job = current_job()
    if job is None:
        raise UsageError("not in a SLURM job", fix="this command is for the scripts in slurm/")
    return job


def _run(command: str, source: str, overrides: list[str] | None) -> Path:
    task = "finetune" if command == "evaluate" else command
    return load_for_task(task, source, overrides or []).run.dir
