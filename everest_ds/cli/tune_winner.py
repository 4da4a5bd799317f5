"""The files of the tuner's winner, which are loaded, resolved and dry-run as soon as they are written."""

from __future__ import annotations

import os
from pathlib import Path

from everest_ds.cli.train import check_plan
from everest_ds.config import find_config, load_experiment, plan_ranks
from everest_ds.config.recipes import RECIPES
from everest_ds.errors import UsageError
from everest_ds.parallel.ds_config import check_by_deepspeed, resolve_ds_config
from everest_ds.tuning.search import Candidate, Cluster
from everest_ds.tuning.winner import deepspeed_file, run_config

CONFIG_NAME, DEEPSPEED_NAME = "winner.yaml", "deepspeed.json"


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
    text = run_config(candidate, recipe, _base(source, folder), ds_file, note)
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
    check_by_deepspeed(resolve_ds_config(config, plan_ranks(config, num_ranks)))
    check_plan(config, num_ranks, planned=True)  # planned: the data may be missing on the machine that tunes


def next_command(task: str, file: Path, cluster: Cluster) -> str:
    """Return the command that queues the winner, or that runs it here if its ranks are on CPUs."""
    if not cluster.machine.asynchronous:
        return f"everest-ds {task} {file} --nproc {cluster.num_ranks}"
    nodes = -(-cluster.num_ranks // cluster.machine.ranks_per_node)
    a_node = cluster.num_ranks // nodes
    return f"everest-ds submit {task} {file} --nodes {nodes} --gpus-per-node {a_node}"


def default_folder(source: str) -> Path:
    """Return the default output folder: `tuned/` and the name of the recipe, file or run folder."""
    return Path("tuned") / Path(source).stem


def _base(source: str, folder: Path) -> str:
    """Return `base` for a config in `folder`: a recipe's name, or the relative path of any other source."""
    found = find_config(source)
    return source if found.path.parent == RECIPES else os.path.relpath(found.path, folder)
