"""The files of a chosen candidate, as text: its run config, and its own DeepSpeed file if it needs one."""

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
    """Return the DeepSpeed JSON of a candidate, with its bucket sizes; keys set by the run stay `auto`."""
    tree = json.loads(ds_config_path(candidate.config).read_text())
    if candidate.own_buckets:
        zero = tree["zero_optimization"]
        sizes = {key: getattr(candidate.zero, attribute) for key, attribute in BUCKET_KEYS.items()}
        zero.update({key: size for key, size in sizes.items() if key in zero})
    return json.dumps(tree, indent=2) + "\n"


def run_config(candidate: Candidate, recipe: Experiment, base: str, ds_config: Path | None, note: str) -> str:
    """Return the run config as YAML: `base`, and the keys that differ from it.

    Args:
        candidate: the chosen candidate.
        recipe: the config that `base` names.
        base: path or name of the recipe, as written in the file.
        ds_config: path of the DeepSpeed file, if the candidate has bucket sizes of its own.
        note: human-readable comment of one line.
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
