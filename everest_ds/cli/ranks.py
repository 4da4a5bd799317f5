"""The commands that run as one rank of the world that a launcher started.

Everything that imports torch is imported within `in_world`, after the handlers of stop signals are set: the
import takes seconds, and a signal in that time must already end the rank in an orderly way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from everest_ds.config import Experiment
from everest_ds.console import print_facts, print_table, write_json
from everest_ds.errors import DataError
from everest_ds.jobs.job_ending import early_stop, logged_end
from everest_ds.jobs.requeue import current_job
from everest_ds.launch.environment import detect_environment
from everest_ds.training.plan import describe_plan
from everest_ds.training.preflight import check_nodes

if TYPE_CHECKING:
    from everest_ds.parallel.world import World


def in_world(config: Experiment, act: Callable[[World], None], *, tell_job: bool = True) -> None:
    """Join the process group as one of its ranks, call `act`, and leave the group.

    In a SLURM job, the way in which this rank ends is logged in the run's event log, unless `tell_job` is
    false.
    """
    job, place = current_job() if tell_job else None, detect_environment()
    os.environ.update(place.as_variables())
    with logged_end(job, config.run.dir, place.rank), early_stop():
        from everest_ds.parallel.world import explained_failures, join_world, leave_world

        world = join_world(timedelta(seconds=config.run.hang_timeout_s))
        with explained_failures(world):
            act(world)
        leave_world()


def train_as_rank(config: Experiment, json_file: Path | None) -> None:
    """Pre-train or fine-tune as one rank; in a SLURM job, check the nodes first."""

    def act(world: World) -> None:
        from everest_ds.training.loop import train
        from everest_ds.training.throughput import clip_cost

        facts = describe_plan(config, world.size, ranks_per_node=world.local_size)
        if world.is_main:
            print_facts(f"{config.task}: {config.run.dir}", facts)
            write_json(json_file, {"plan": facts})
        job = current_job()
        if job is not None:
            checked = check_nodes(config, world)
            if world.is_main:
                print_facts(f"preflight: {job.nodes}", checked)
        signal_s = None if job is None else job.signal_s
        whole = train(config, world, clip_cost(config, world.device), signal_s)
        if world.is_main:
            end = (
                "finished" if whole else f"run.max_steps={config.run.max_steps} reached, saved and resumable"
            )
            typer.echo(f"{end}: {config.run.dir}\nto see the curves: tensorboard --logdir {config.run.dir}")

    in_world(config, act)


def evaluate_as_rank(config: Experiment, json_file: Path | None) -> None:
    """Test a fine-tuned classifier as one rank; rank 0 prints the results, and the videos that they lack."""

    def act(world: World) -> None:
        from everest_ds.training.evaluate import run_test

        result = run_test(config, world)
        if world.is_main:
            print_table("By class", result["classes"])
            listed = ("classes", "missing")
            summary = {k: value for k, value in result.items() if k not in listed and value is not None}
            print_facts(f"evaluate: {config.run.dir}", summary)
            write_json(json_file, result)
        _refuse_missing(config, result, world)

    in_world(config, act)


def _refuse_missing(config: Experiment, result: dict[str, Any], world: World) -> None:
    """Raise a DataError on every rank if the results lack videos, and list these on rank 0."""
    missing = result["missing"]
    if not missing:
        return
    if world.is_main:
        print_table(
            "Missing videos", [{"video": video, "problem": reason} for video, reason in missing.items()]
        )
    asked = result["num_clips"] + len(missing)
    error = DataError(
        f"{config.data.test}: the results lack {len(missing)} of {asked} videos",
        given=f"{next(iter(missing))}: {next(iter(missing.values()))}",
        fix="repair the videos, or remove them from the manifest",
    )
    error.on_every_rank = True
    raise error


def check_nodes_as_rank(config: Experiment, json_file: Path | None) -> None:
    """Check the nodes of a job as one rank, without recording how the rank ends."""

    def act(world: World) -> None:
        facts = check_nodes(config, world)
        if world.is_main:
            print_facts("Preflight: these nodes can train the recipe", facts)
            write_json(json_file, facts)

    in_world(config, act, tell_job=False)
