"""Recipes by name: one file each, or one of a family that a file describes.

A family's file holds what all its members share, and `variants`, what sets them apart:

    variants:
      backbone: {vit_small: {...}, vit_base: {...}}     # `k400_pretrain_vit_small`, `k400_pretrain_vit_base`
      method: {everest: {...}, videomae: {...}}         # the first is not named, the other: `..._videomae`
      pair: {vit_small_videomae: {...}}                 # what only these two together have

They are merged in this order over the rest. `{variant}` in a text stands for the name after the family's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from everest_ds.config.tree import Tree, merge, read_yaml
from everest_ds.errors import ConfigError

RECIPES = Path(__file__).parents[1] / "recipes"
VARIANTS = "variants"


class Source(NamedTuple):
    """Where a config is written: a file, and which variant of it (none: the file is one config)."""

    path: Path
    variant: str = ""


def recipe_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    return [name for path in sorted(RECIPES.glob("*.yaml")) for name in _names(path)]


def find_recipe(name: str) -> Source | None:
    """Where the recipe of that name is written; None if there is none."""
    for path in RECIPES.glob("*.yaml"):
        if name == path.stem or name.startswith(f"{path.stem}_"):
            if name in _names(path):
                return Source(path, name.removeprefix(path.stem).removeprefix("_"))
    return None


def choose(tree: Tree, source: Source) -> Tree:
    """The tree of one variant of a family.

    Raises:
        ConfigError: the file describes a family, and not this member.
    """
    variants = tree.pop(VARIANTS, None)
    if variants is None:
        return tree
    members = _members(variants)
    if source.variant not in members:
        raise ConfigError(
            f"{source.path}: describes several recipes",
            allowed=", ".join(members),
            fix=f"name one, such as {source.path.stem}_{next(iter(members))}",
        )
    for part, choice in members[source.variant]:
        tree = merge(tree, variants[part].get(choice) or {})
    return _fill(tree, source.variant)


def _names(path: Path) -> list[str]:
    variants = _inherited_variants(path)
    return [f"{path.stem}_{member}" for member in _members(variants)] if variants else [path.stem]


def _inherited_variants(path: Path) -> Tree:
    """A family's base lies beside it, in a folder of parts; recipes that have names are no families."""
    tree = read_yaml(path)
    base = path.parent / str(tree.get("base"))
    inherited = _inherited_variants(base) if base.is_file() else {}
    return merge(inherited, tree.get(VARIANTS, {}))


def _members(variants: Tree) -> dict[str, list[tuple[str, str]]]:
    """Name of each member -> its (axis, choice) pairs, in the order of merging."""
    return dict(_combine(variants))


def _combine(variants: Tree) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    unnamed = next(iter(variants["method"]))
    for backbone in variants["backbone"]:
        for method in variants["method"]:
            pair = f"{backbone}_{method}"
            parts = [("backbone", backbone), ("method", method)]
            if pair in variants.get("pair", {}):
                parts.append(("pair", pair))
            yield (backbone if method == unnamed else pair), parts


def _fill(value: Any, variant: str) -> Any:
    if isinstance(value, dict):
        return {key: _fill(below, variant) for key, below in value.items()}
    return value.replace("{variant}", variant) if isinstance(value, str) else value
