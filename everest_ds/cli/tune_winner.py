"""The winner's files: written, then loaded, resolved and dry-run before anybody relies on them."""

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
        the run config.

    Raises:
        UsageError: the folder cannot be written.
        ConfigError: what DeepSpeed or the trainer would refuse: a bug of the tuner, not of its user.
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
    """Load a run config and hold it against our own checks, DeepSpeed's, and those of a dry run.

    Raises:
        ConfigError: what is refused.
    """
    config = load_experiment(file)
    check_by_deepspeed(resolve_ds_config(config, plan_ranks(config, num_ranks)))
    check_plan(config, num_ranks, planned=True)  # a laptop need not have the data


def next_command(task: str, file: Path, cluster: Cluster) -> str:
    """The command that queues it, or that runs it here: CPU ranks are this machine's."""
    if not cluster.machine.asynchronous:
        return f"everest-ds {task} {file} --nproc {cluster.num_ranks}"
    nodes = -(-cluster.num_ranks // cluster.machine.ranks_per_node)
    a_node = cluster.num_ranks // nodes
    return f"everest-ds submit {task} {file} --nodes {nodes} --gpus-per-node {a_node}"


def default_folder(source: str) -> Path:
    """`tuned/` and the name of a recipe, a file or a run folder."""
    return Path("tuned") / Path(source).stem


def _base(source: str, folder: Path) -> str:
    """`source` as a file in `folder` names it: a recipe by its name, other files from there."""
    found = find_config(source)
    return source if found.path.parent == RECIPES else os.path.relpath(found.path, folder)
