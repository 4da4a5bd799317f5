"""The files of a chosen candidate, as text: its run config, and its own DeepSpeed file if it needs one."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from everest_ds.config import find_config, load_experiment
from everest_ds.config.load import flatten, nested
from everest_ds.config.recipes import RECIPES
from everest_ds.config.schema import Experiment
from everest_ds.errors import UsageError
from everest_ds.output_paths import refuse_input
from everest_ds.parallel.ds_config import check_by_deepspeed, resolve_ds_config
from everest_ds.training.plan import check_plan
from everest_ds.tuning.candidate import Candidate
from everest_ds.tuning.cluster import Cluster
from everest_ds.tuning.own_file import deepspeed_file, needs_own_file

CONFIG_NAME, DEEPSPEED_NAME = "winner.yaml", "deepspeed.json"


def run_config(candidate: Candidate, recipe: Experiment, base: str, ds_config: Path | None, note: str) -> str:
    """Return the run config as YAML: `base`, and the keys that differ from it.

    Args:
        candidate: the chosen candidate.
        recipe: the config that `base` names.
        base: path or name of the recipe, as written in the file.
        ds_config: path of the candidate's DeepSpeed file, if it needs one.
        note: human-readable comment of one line.
    """
    own = candidate.config.model_dump(mode="json")
    if needs_own_file(candidate):
        own["parallelism"]["ds_config"] = str(ds_config)
    given = dict(flatten(recipe.model_dump(mode="json")))
    changed = {key: value for key, value in flatten(own) if given[key] != value}
    return f"# {note}\n" + yaml.safe_dump({"base": base, **nested(changed)}, sort_keys=False)


def write_winner(candidate: Candidate, source: str, cluster: Cluster, folder: Path) -> Path:
    """Write the run config of `candidate` and its DeepSpeed JSON into `folder`, and check them.

    Returns:
        The path of the run config.

    Raises:
        UsageError: the folder cannot be written.
        ConfigError: DeepSpeed or the trainer would refuse the files, which is a bug in the tuner.
    """
    recipe, ds_file = load_experiment(source), folder / DEEPSPEED_NAME
    note = f"everest-ds tune {source}: {candidate.sharding} on {cluster.num_ranks} x {cluster.machine.device}"
    origin = find_config(source).path  # a recipe is named; any other source is given by its relative path
    base = source if origin.parent == RECIPES else os.path.relpath(origin, folder)
    text = run_config(candidate, recipe, base, ds_file, note)
    inputs = {file.resolve() for file in (origin, recipe.parallelism.ds_config) if file is not None}
    for file in (ds_file, folder / CONFIG_NAME):
        refuse_input(file, inputs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ds_file.write_text(deepspeed_file(candidate))
        (folder / CONFIG_NAME).write_text(text)
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot be written", given=str(error)) from None
    check_written(folder / CONFIG_NAME, cluster.num_ranks)
    return folder / CONFIG_NAME


def check_written(file: Path, num_ranks: int) -> None:
    """Load a run config and pass it through our own checks, DeepSpeed's checks and those of a dry run.

    Raises:
        ConfigError: a check fails.
    """
    config = load_experiment(file)
    check_by_deepspeed(resolve_ds_config(config, num_ranks))
    check_plan(config, num_ranks, planned=True)  # planned: the data may be missing on the machine that tunes


def next_command(task: str, file: Path, cluster: Cluster, num_workers: int | None) -> str:
    """Return the command that queues the winner, or that runs it here if its ranks are on CPUs.

    A long command is continued on a second line, because a terminal would break it within a word.

    Args:
        task: task of the winner.
        file: its run config.
        cluster: the cluster that it was tuned for.
        num_workers: loader workers per rank, if another number than that of the config is of use.
    """
    run = f"{task} {file}" + ("" if num_workers is None else f" data.num_workers={num_workers}")
    if not cluster.machine.asynchronous:
        return f"everest-ds {run} --nproc {cluster.num_ranks}"
    ranks = f"--nodes {cluster.nodes} --gpus-per-node {cluster.ranks_per_node}"
    return f"everest-ds submit {run} \\\n      {ranks}"


def default_folder(source: str) -> Path:
    """Return the default output folder: `tuned/` and the name of the recipe, file or run folder."""
    return Path("tuned") / Path(source).stem
