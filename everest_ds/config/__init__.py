"""The validated config of a run, read from YAML, recipes and dotted overrides. Does not import torch."""

from everest_ds.config.batch import BatchPlan, plan_batch, plan_ranks
from everest_ds.config.load import (
    build_experiment,
    dump_experiment,
    find_config,
    flatten,
    load_experiment,
)
from everest_ds.config.recipes import recipe_names
from everest_ds.config.schema import DataConfig, Experiment
from everest_ds.config.shared_memory import BATCHES_AHEAD, batch_bytes, shared_batches, shared_memory_bytes

__all__ = [
    "BATCHES_AHEAD",
    "BatchPlan",
    "DataConfig",
    "Experiment",
    "batch_bytes",
    "build_experiment",
    "dump_experiment",
    "find_config",
    "flatten",
    "load_experiment",
    "plan_batch",
    "plan_ranks",
    "recipe_names",
    "shared_batches",
    "shared_memory_bytes",
]
