"""The files of a chosen candidate, as text: its run config, and a DeepSpeed file where it needs its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from everest_ds.config.load import flatten
from everest_ds.config.schema import Experiment
from everest_ds.config.zero_settings import BUCKET_KEYS, ds_config_path
from everest_ds.tuning.search import Candidate


def deepspeed_file(candidate: Candidate) -> str:
    """The DeepSpeed JSON of its stage, with its bucket sizes; what the run config owns stays `auto`."""
    tree = json.loads(ds_config_path(candidate.config).read_text())
    if candidate.own_buckets:
        zero = tree["zero_optimization"]
        sizes = {key: getattr(candidate.zero, attribute) for key, attribute in BUCKET_KEYS.items()}
        zero.update({key: size for key, size in sizes.items() if key in zero})
    return json.dumps(tree, indent=2) + "\n"


def run_config(candidate: Candidate, recipe: Experiment, base: str, ds_config: Path | None, note: str) -> str:
    """The run config: `base`, and only what differs from it.

    Args:
        recipe: what `base` names.
        base: as the written file shall say it.
        ds_config: where the DeepSpeed file will be, if the candidate has buckets of its own.
        note: of a line, for people.
    """
    own = candidate.config.model_dump(mode="json")
    if candidate.own_buckets:
        own["parallelism"]["ds_config"] = str(ds_config)
    given = dict(flatten(recipe.model_dump(mode="json")))
    changed = {key: value for key, value in flatten(own) if given[key] != value}
    return f"# {note}\n" + yaml.safe_dump({"base": base, **_nested(changed)}, sort_keys=False)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        node = tree
        for name in sections:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree
