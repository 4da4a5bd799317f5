"""The DeepSpeed file of a tuning run: checked before the search, and rewritten for a candidate."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

from everest_ds.config import BatchPlan, Experiment
from everest_ds.config.deepspeed_claims import (
    RUN_KEYS,
    STAGE_KEY,
    SUM_DTYPE_KEY,
    check_claims,
    notes_on,
)
from everest_ds.config.deepspeed_file import read_deepspeed_file
from everest_ds.config.deepspeed_keys import AUTO
from everest_ds.config.zero_settings import BUCKET_KEYS
from everest_ds.tuning.candidate import Candidate
from everest_ds.tuning.knobs import PRECISION, SEARCHED, ZERO_STAGE
from everest_ds.tuning.search import Options


def check_own_file(config: Experiment, options: Options, num_samples: int | None) -> list[str]:
    """Check the DeepSpeed file that a recipe names, before a search.

    Args:
        config: the recipe's config with its global batch.
        options: the options of the search; the file may have any value for a key that it changes.
        num_samples: samples per epoch; None if not known.

    Returns:
        Human-readable notes on the keys of the file that a run replaces by its own; none without a file.

    Raises:
        ConfigError: naming every key of the file that cannot be used or contradicts the recipe.
    """
    if config.parallelism.ds_config is None:
        return []
    fixed = {ZERO_STAGE.key} if options.any_precision else {ZERO_STAGE.key, PRECISION.key}
    searched = SEARCHED - fixed - {key for key in options.pinned if not key.startswith("batch.")}
    file = read_deepspeed_file(config)
    kept = {key: value for key, value in file.settings.items() if RUN_KEYS.get(key) not in searched}
    # Only the size of the whole batch is compared, because the search splits it.
    whole = BatchPlan(1, config.batch.global_batch_size or 1, 1, config.data.repeats)
    check_claims(replace(file, settings=kept), config, whole, num_samples)
    return [f"{file.path}: {note}" for note in notes_on(file)]


def deepspeed_file(candidate: Candidate) -> str:
    """Return the DeepSpeed JSON of a candidate: the file that it was predicted with, adapted to it.

    The file keeps the user's entries, but entries that the run config decides become `auto`: the search
    changes some of them, and trials change the schedule. Bucket sizes become those of the candidate.
    """
    config = candidate.config
    file = read_deepspeed_file(config)
    tree = copy.deepcopy(file.raw)
    for key in file.settings:
        if key in RUN_KEYS and key != STAGE_KEY:
            _set(tree, key, AUTO)
    if file.settings.get(SUM_DTYPE_KEY) not in (None, "fp32", config.precision):
        _set(tree, SUM_DTYPE_KEY, AUTO)  # the search has changed the precision
    if candidate.own_buckets:
        sizes = {key: getattr(candidate.zero, attribute) for key, attribute in BUCKET_KEYS.items()}
        zero = tree["zero_optimization"]
        zero.update({key: size for key, size in sizes.items() if key in zero})
    return json.dumps(tree, indent=2) + "\n"


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for name in sections:
        tree = tree[name]
    tree[leaf] = value


def needs_own_file(candidate: Candidate) -> bool:
    """Return whether a candidate runs with a DeepSpeed file of its own, not with a shipped one."""
    return candidate.own_buckets or candidate.config.parallelism.ds_config is not None
