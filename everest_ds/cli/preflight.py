"""The check of a job's nodes, made by `everest-ds preflight` and before each run in a SLURM job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from everest_ds.cli.options import JsonFile, Overrides, RecipeArg
from everest_ds.cli.ranks import in_world
from everest_ds.console import print_facts, write_json
from everest_ds.training.preflight import check_nodes

if TYPE_CHECKING:
    from everest_ds.parallel.world import World


def preflight(source: RecipeArg, overrides: Overrides = None, json_file: JsonFile = None) -> None:
    """Check whether the nodes of a job can train a recipe, without training.

    Start this command with srun, mpirun or torchrun, like the training itself. The nodes must have the same
    code, packages and data; the speed of their network and the disk space for checkpoints are shown.

    Example: srun --nodes=4 --ntasks-per-node=8 python -m everest_ds preflight my.yaml
    """
    from everest_ds.config import load_experiment

    config = load_experiment(source, overrides or [])

    def act(world: World) -> None:
        facts = check_nodes(config, world)
        if world.is_main:
            print_facts("Preflight: these nodes can train the recipe", facts)
            write_json(json_file, facts)

    in_world(config, act, tell_job=False)
