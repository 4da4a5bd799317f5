"""The checks of a job before it queues: its config, ranks, files and memory."""

from __future__ import annotations

import os
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from everest_ds.config import Experiment, load_experiment, plan_ranks
from everest_ds.config.load import load_task
from everest_ds.config.mesh_shape import check_nodes_of_job
from everest_ds.costs.hardware.gpus import DEVICES, find_product
from everest_ds.costs.memory import predict_memory
from everest_ds.errors import CheckpointError, ConfigError, UsageError
from everest_ds.jobs.sbatch import JobShape
from everest_ds.parallel.ds_config import resolve_ds_config
from everest_ds.training.input_files import (
    check_evaluation_inputs,
    check_initial_weights_exist,
    check_initial_weights_fit,
    manifest_of,
    splits_of,
)
from everest_ds.training.plan import describe_plan, describe_staging
from everest_ds.training.prediction import memory_text
from everest_ds.training.run_folder import RunFolder
from everest_ds.units import format_bytes


@dataclass(frozen=True)
class Stage:
    """One job of a submission: an `everest-ds` command that has a script of the same name in slurm/.

    Attributes:
        arguments: the arguments of the command.
        run: the run folder, which holds the job's event log; None if the job has none.
        facts: the checked plan, in human-readable form.
    """

    command: str
    arguments: tuple[str, ...]
    run: Path | None
    shape: JobShape
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """The hardware that the jobs will run on, and whether their initial weights exist yet.

    Attributes:
        gpu: name of the GPU to check predicted memory against; None to skip the check.
        inputs_follow: the job depends on another job, which may still have to write the initial weights.
    """

    shape: JobShape
    gpu: str | None = None
    inputs_follow: bool = False


def plan_command(command: str, source: str, overrides: Sequence[str], target: Target) -> Stage:
    """Plan a job of one run: pretrain, finetune or evaluate.

    Raises:
        EverestError: if the job would fail at its start, or would run out of memory.
    """
    config = load_task(command, source, overrides)
    facts = check_run(command, config, target)
    return Stage(command, (source, *overrides), config.run.dir, target.shape, facts)


def plan_profile(source: str, overrides: Sequence[str], target: Target) -> Stage:
    """Plan a job that profiles a recipe on one GPU, without a run folder."""
    load_experiment(source, overrides)
    if target.shape.num_ranks > 1:
        raise UsageError(
            f"{target.shape.num_ranks} ranks were asked for, but profile measures one rank",
            fix="give --nodes 1 --gpus-per-node 1",
        )
    return Stage("profile", (source, *overrides), None, target.shape)


def check_run(command: str, config: Experiment, target: Target) -> dict[str, Any]:
    """Check all that can be checked before a run has nodes; return its human-readable plan."""
    shape = target.shape
    check_nodes_of_job(config, shape.ranks_per_node)
    _check_files(command, config)
    # The shipped DeepSpeed files are known to be valid, and need not suit this machine.
    if command != "evaluate" and config.parallelism.ds_config is not None:
        resolve_ds_config(config, shape.num_ranks)
    _check_weights(command, config, target.inputs_follow)
    staging = describe_staging(config, command)
    if command == "evaluate":
        return {"run": str(config.run.dir), "ranks": str(shape.num_ranks), **staging}
    RunFolder(config.run.dir).check_same_config(config)
    plan_ranks(config, shape.num_ranks)
    memory = _check_memory(config, target)
    plan = describe_plan(config, shape.num_ranks, ranks_per_node=shape.ranks_per_node)
    return {"run": str(config.run.dir), **plan, **staging, "memory": memory}


def _check_files(command: str, config: Experiment) -> None:
    for split in splits_of(command, config):
        manifest_of(config, split)
    check_evaluation_inputs(config)


def _check_weights(command: str, config: Experiment, follow: bool) -> None:
    if command != "evaluate" and not follow:
        check_initial_weights_exist(config)
        check_initial_weights_fit(config)
    if command == "evaluate" and not follow and not config.run.dir.exists():
        raise CheckpointError(
            "run.dir: no weights found",
            given=str(config.run.dir.absolute()),
            fix="name the folder of a finished run, or give the job that will write it with --dependency",
        )
    folder = config.run.dir
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise UsageError(
            "run.dir: this folder cannot be written", given=str(folder), fix="choose another run.dir"
        )


def _check_memory(config: Experiment, target: Target) -> str:
    needed = predict_memory(config, target.shape.num_ranks)
    text = memory_text(needed)
    if target.gpu is None:
        return f"{text}; give --gpu NAME to check it against a GPU"
    device = DEVICES[find_product(target.gpu)]
    if needed.peak_bytes > device.memory_bytes:
        raise ConfigError(
            f"a training step does not fit on GPU {target.gpu}",
            given=f"{text}, batch.micro_batch_size={config.batch.micro_batch_size}",
            allowed=format_bytes(device.memory_bytes),
            fix=_what_fits(config, target.shape.num_ranks, device.memory_bytes),
        )
    return f"{text}, {100 * needed.peak_bytes / device.memory_bytes:.0f} % of the memory of {target.gpu}"


def _what_fits(config: Experiment, num_ranks: int, memory_bytes: int) -> str:
    """Suggest the largest micro-batch with which a step fits, or else the least recomputation."""
    batches = [
        config.batch.model_copy(update={"micro_batch_size": clips})
        for clips in range(1, config.batch.micro_batch_size)
    ]
    smaller = [config.model_copy(update={"batch": batch}) for batch in batches]
    possible = [one for one in smaller if _runs(one, num_ranks)]
    num_fitting = bisect(possible, False, key=lambda one: not _fits(one, num_ranks, memory_bytes))
    if num_fitting:
        clips = possible[num_fitting - 1].batch.micro_batch_size
        return f"batch.micro_batch_size={clips}, or recompute.mode=attention|full"
    for mode in ("gelu", "attention", "mlp", "full"):
        recompute = config.recompute.model_copy(update={"mode": mode})
        if _fits(config.model_copy(update={"recompute": recompute}), num_ranks, memory_bytes):
            return f"recompute.mode={mode}"
    return "parallelism.zero_stage=3, parallelism.tensor, more ranks, or a larger GPU"


def _runs(config: Experiment, num_ranks: int) -> bool:
    try:
        plan_ranks(config, num_ranks)
    except ConfigError:
        return False
    return True


def _fits(config: Experiment, num_ranks: int, memory_bytes: int) -> bool:
    return predict_memory(config, num_ranks).peak_bytes <= memory_bytes


def without_gpus(target: Target) -> Target:
    """Return `target` reduced to one rank on one node without GPUs, for a job that computes nothing."""
    return replace(target, shape=JobShape(), gpu=None)
