"""Reading of YAML files as trees of settings, and merging of one tree over another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from everest_ds.errors import ConfigError

ConfigTree = dict[str, Any]


def read_yaml(path: Path) -> ConfigTree:
    """Read the mapping in a YAML file; an empty file gives an empty mapping.

    Raises:
        ConfigError: if the file cannot be read or does not hold a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not readable as YAML", given=reason) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: not a config", given=type(tree).__name__, allowed="a mapping of sections")
    return tree


def merge(base: ConfigTree, top: ConfigTree) -> ConfigTree:
    """Merge `top` over `base`, recursing into the sections that both hold."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged
