"""Recipes by name: a YAML file holds one recipe, or a family of recipes.

A family file holds the settings that all its members share and, under `variants`, the settings that differ:

    variants:
      backbone: {vit_small: {...}, vit_base: {...}}    # `k400_pretrain_vit_small`, `k400_pretrain_vit_base`
      method: {everest: {...}, videomae: {...}}        # the first adds no suffix, the second adds `_videomae`
      pair: {vit_small_videomae: {...}}                # settings of this combination only
      frames: {64f: {...}}                             # optional: adds members with the suffix `_64f`

These parts are merged over the shared settings in this order. In a string, `{variant}` is replaced by the
part of the recipe name that follows the family name, and `{model}` by the same part without the frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from everest_ds.config.yaml_tree import ConfigTree, merge, read_yaml
from everest_ds.errors import ConfigError

RECIPES = Path(__file__).parents[1] / "recipes"
VARIANTS = "variants"


class ConfigSource(NamedTuple):
    """The location of a config: a file and a variant name in it (empty if the file holds a single config)."""

    path: Path
    variant: str = ""


def recipe_names() -> list[str]:
    """Return the names of the recipes shipped with the package."""
    return [name for path in sorted(RECIPES.glob("*.yaml")) for name in _names(path)]


def find_recipe(name: str) -> ConfigSource | None:
    """Return the file and variant of the recipe called `name`, or None if no recipe has this name."""
    for path in RECIPES.glob("*.yaml"):
        if name == path.stem or name.startswith(f"{path.stem}_"):
            if name in _names(path):
                return ConfigSource(path, name.removeprefix(path.stem).removeprefix("_"))
    return None


def choose(tree: ConfigTree, source: ConfigSource) -> ConfigTree:
    """Return the settings of the variant that `source` names, merged over the family's shared settings.

    Raises:
        ConfigError: if the file holds a family that has no such variant.
    """
    variants = tree.pop(VARIANTS, None)
    if variants is None:
        return tree
    members = _members(variants)
    if source.variant not in members:
        raise ConfigError(
            f"{source.path}: holds several recipes, and none of them was chosen",
            allowed=", ".join(members),
            fix=f"name one, such as {source.path.stem}_{next(iter(members))}",
        )
    chosen = members[source.variant]
    for part, choice in chosen:
        tree = merge(tree, variants[part].get(choice) or {})
    frames = dict(chosen).get("frames")
    model = source.variant.removesuffix(f"_{frames}")
    return _fill(tree, {"{variant}": source.variant, "{model}": model})


def _names(path: Path) -> list[str]:
    variants = _inherited_variants(path)
    return [f"{path.stem}_{member}" for member in _members(variants)] if variants else [path.stem]


def _inherited_variants(path: Path) -> ConfigTree:
    """Return the `variants` of a family file, merged over those of its base.

    Only a base given as a relative path is followed: a base given by recipe name is a single recipe.
    """
    tree = read_yaml(path)
    base = path.parent / str(tree.get("base"))
    inherited = _inherited_variants(base) if base.is_file() else {}
    return merge(inherited, tree.get(VARIANTS, {}))


def _members(variants: ConfigTree) -> dict[str, list[tuple[str, str]]]:
    """Map the name of each family member to its (axis, choice) pairs, in the order of merging."""
    return dict(_combine(variants))


def _combine(variants: ConfigTree) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    unnamed = next(iter(variants["method"]))
    for backbone in variants["backbone"]:
        for method in variants["method"]:
            pair = f"{backbone}_{method}"
            parts = [("backbone", backbone), ("method", method)]
            if pair in variants.get("pair", {}):
                parts.append(("pair", pair))
            name = backbone if method == unnamed else pair
            yield name, parts
            for frames in variants.get("frames", {}):
                yield f"{name}_{frames}", [*parts, ("frames", frames)]


def _fill(value: Any, names: dict[str, str]) -> Any:
    """Replace the placeholders `names` in all strings of a tree."""
    if isinstance(value, dict):
        return {key: _fill(below, names) for key, below in value.items()}
    if isinstance(value, str):
        for placeholder, name in names.items():
            value = value.replace(placeholder, name)
    return value
