"""The baselines of a tuning run: plain data parallelism, and the recipe with ZeRO-2."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everest_ds.config import Experiment, plan_ranks
from everest_ds.errors import ConfigError
from everest_ds.tuning.batches import check_agreement, keep_global_batch, with_micro_batch
from everest_ds.tuning.knobs import ZERO_STAGE, plain_settings

Load = Callable[[Sequence[str]], Experiment]
_SHIPPED_FILE = {"parallelism.ds_config": None}


@dataclass(frozen=True)
class Baseline:
    """A config for comparison; `note` says how it differs from what its name promises."""

    name: str
    config: Experiment
    note: str = ""


def natural_baselines(load: Load, num_ranks: int, global_batch: int) -> list[Baseline]:
    """Return the baselines that are possible for a recipe.

    Args:
        load: returns the recipe's config under overrides; raises ConfigError for an invalid config.
        num_ranks: number of ranks.
        global_batch: clips per step of all ranks.
    """
    plain = [{**one, "parallelism.offload_to_nvme": None, **_SHIPPED_FILE} for one in plain_settings()]
    zero2: list[dict[str, Any]] = [{ZERO_STAGE.key: 2, **_SHIPPED_FILE}]
    found = []
    for name, choices in (("plain data parallelism", plain), ("ZeRO-2", zero2)):
        config, note = _first_valid(load, choices)
        split = config and _split(config, num_ranks, global_batch)
        if split:
            found.append(Baseline(name, split, note))
    return found


def _first_valid(load: Load, choices: Sequence[Mapping[str, Any]]) -> tuple[Experiment | None, str]:
    """Return the config of the first valid choice, and why the choice before it is invalid."""
    reason = ""
    for choice in choices:
        try:
            return load([f"{key}={json.dumps(value)}" for key, value in choice.items()]), reason
        except ConfigError as error:
            reason = str(error).partition("config: ")[2] or str(error)
    return None, reason


def _split(config: Experiment, num_ranks: int, global_batch: int) -> Experiment | None:
    """Return the config with the largest micro-batch, up to its own, that divides the global batch."""
    for micro in range(config.batch.micro_batch_size, 0, -1):
        one = with_micro_batch(keep_global_batch(config, num_ranks, global_batch), micro)
        try:
            check_agreement(one)
            plan_ranks(one, num_ranks)
        except ConfigError:
            continue
        return one
    return None
