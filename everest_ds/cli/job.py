"""`everest-ds job begin | end | candidate`: internal commands that the scripts in slurm/ run."""

from __future__ import annotations

import os
from base64 import b64encode
from pathlib import Path
from typing import Annotated, Literal

import typer

from everest_ds.checkpoints.names import newest_step
from everest_ds.cli.options import JsonFile, Overrides, RecipeArg
from everest_ds.config.load import load_task
from everest_ds.errors import UsageError
from everest_ds.jobs.requeue import SlurmJob, current_job, record_end, record_start
from everest_ds.jobs.sweep_file import expand_array, read_candidates

Command = Annotated[
    Literal["pretrain", "finetune", "evaluate"],
    typer.Argument(help="The command that the ranks run; its arguments follow."),
]


def begin(
    command: Command, source: RecipeArg, overrides: Overrides = None, json_file: JsonFile = None
) -> None:
    """Check the config, and refuse to start a job that must not start again."""
    job, run = _own_job(), load_task(command, source, overrides or ()).run.dir
    run.mkdir(parents=True, exist_ok=True)
    record_start(job, run, None if command == "evaluate" else newest_step(run))


def end(
    code: int,
    state: str,
    command: Command,
    source: RecipeArg,
    overrides: Overrides = None,
    json_file: JsonFile = None,
) -> None:
    """Answer `requeue` and any faulty nodes, or `stop`; print the reason on stderr."""
    run = load_task(command, source, overrides or ()).run.dir
    decision = record_end(_own_job(), run, code, state)
    typer.echo(f"everest-ds: {decision.reason}", err=True)
    _answer("requeue" if decision.requeue else "stop", decision.bad_nodes or "")


def candidate(file: Path, number: int) -> None:
    """Answer the command and the arguments of one candidate, for slurm/sweep.sbatch."""
    swept = read_candidates(file)
    chosen = swept[expand_array(str(number), len(swept))[0]]
    _answer(chosen.task, chosen.recipe, *chosen.overrides)


def _answer(*words: str) -> None:
    """Print words for slurm/common.sh on a line of their own, whose mark tells it from any greeting.

    The words are NUL-terminated, because no name contains NUL, and encoded, because a name may contain a line
    end.
    """
    packed = b"".join(os.fsencode(word) + b"\0" for word in words)
    typer.echo(f"\neverest-ds answers: {b64encode(packed).decode()}")


def _own_job() -> SlurmJob:
    job = current_job()
    if job is None:
        raise UsageError("not in a SLURM job", fix="this command is for the scripts in slurm/")
    return job
