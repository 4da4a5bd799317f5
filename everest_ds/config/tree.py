"""YAML files as trees of settings: reading, inheriting by `base:`, merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from everest_ds.errors import ConfigError

Tree = dict[str, Any]


def read_yaml(path: Path) -> Tree:
    """The mapping in a file; an empty file is an empty one.

    Raises:
        ConfigError: it cannot be read, or is not a mapping.
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


def merge(base: Tree, top: Tree) -> Tree:
    """`top` over `base`, section by section."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged
