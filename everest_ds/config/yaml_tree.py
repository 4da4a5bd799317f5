"""Reading of YAML files as trees of settings, and merging of one tree over another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from everest_ds.errors import ConfigError

ConfigTree = dict[str, Any]
_MOST_VALUES = 100_000  # of one document, aliases counted as often as they are used


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document, in which no key of a mapping may be given twice.

    Raises:
        yaml.YAMLError: if the text is not YAML, repeats a key, or unfolds to too many values.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_values(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"its aliases unfold to more than {_MOST_VALUES} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which keeps the last of two equal keys, made strict."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.YAMLError(f"key `{key}` is given twice, the second time in line {mark.line + 1}")
        return super().construct_mapping(node, deep)


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values that a node unfolds to."""
    if id(node) not in known:
        known[id(node)] = 1  # a node that contains itself
        children: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        known[id(node)] = 1 + sum(_num_values(child, known) for child in children)
    return known[id(node)]


def read_yaml(path: Path) -> ConfigTree:
    """Read the mapping in a YAML file; an empty file gives an empty mapping.

    Raises:
        ConfigError: if the file cannot be read or does not hold a mapping.
    """
    try:
        tree = parse_yaml(path.read_text())
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
