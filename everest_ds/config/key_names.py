"""The dotted names of all config keys, and the names that a mistyped key may stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from everest_ds.config.schema import Experiment

_SIMILAR = 0.5  # similarity from which a name counts as a misspelling of another
_TIE = 0.15  # difference up to which a name is suggested beside the most similar one
_SUGGESTIONS = 3


def section_class(names: Sequence[int | str]) -> type[BaseModel]:
    """Return the class of the section at a path of names.

    Raises:
        KeyError: if there is no such key.
        StopIteration: if the key is not a section.
    """
    section: type[BaseModel] = Experiment
    for name in names:
        section = next(_sections(section.model_fields[str(name)]))
    return section


def is_text(key: str) -> bool:
    """Return whether a dotted key takes a path or any text."""
    field = dict(config_fields()).get(key)
    return field is not None and any(
        kind in (str, Path) for kind in (field.annotation, *get_args(field.annotation))
    )


def config_fields(prefix: str = "", section: type[BaseModel] = Experiment) -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key that is not a section with its dotted name, in the order of the schema.

    A section that may be null, such as `model.positions_from`, counts as one key.
    """
    for name, field in section.model_fields.items():
        below = next(_sections(field), None)
        if below is None or not field.is_required() and field.default is None:
            yield f"{prefix}{name}", field
        else:
            yield from config_fields(f"{prefix}{name}.", below)


def key_rows() -> list[dict[str, str]]:
    """Return every config key with its allowed values, default and meaning, in the order of the schema."""
    schema, words = Experiment.model_json_schema(), {"None": "null", "True": "true", "False": "false"}
    rows = []
    for name, field in config_fields():
        *sections, leaf = name.split(".")
        section = schema if not sections else schema["$defs"][section_class(sections).__name__]
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        default = "(required)" if field.is_required() else words.get(str(value), str(value))
        values = _values_text(section["properties"][leaf], schema["$defs"])
        rows.append({"key": name, "values": values, "default": default, "meaning": field.description or ""})
    return rows


def _values_text(schema: dict[str, Any], sections: dict[str, Any]) -> str:
    """Describe the values that a JSON schema allows, in words; `sections` has the schemas it refers to."""
    if "anyOf" in schema:
        return " or ".join(_values_text(one, sections) for one in schema["anyOf"])
    if "$ref" in schema:
        return f"section of {' and '.join(sections[schema['$ref'].rpartition('/')[2]]['properties'])}"
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if schema["type"] == "array":
        items = schema["prefixItems"]
        return f"list of {len(items)}: {_values_text(items[0], sections)}"
    if schema["type"] == "string":
        return str(schema.get("format", "text"))
    words = {"integer": "whole number", "number": "number", "boolean": "true, false", "null": "null"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in signs.items() if bound in schema]
    return " ".join([words[schema["type"]], " and ".join(bounds)]).strip()


def suggest_keys(key: str) -> str:
    """Return the keys that a mistyped dotted key may stand for, as the `allowed` text of an error.

    Names are compared by their last part, first within the section that was typed. Without a similar name,
    the text lists the keys of that section.
    """
    section, _, leaf = key.rpartition(".")
    names = [name for name, _ in config_fields()]
    own = [name for name in names if section and name.startswith(f"{section}.")]
    similar = _most_similar(leaf, own) or _most_similar(leaf, [*names, *Experiment.model_fields])
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    return f"one of {', '.join(own or Experiment.model_fields)}"  # a section that does not exist has no keys


def _most_similar(leaf: str, names: Sequence[str]) -> list[str]:
    rated = [(_similarity(leaf, name.rpartition(".")[2]), name) for name in names]
    enough = max(_SIMILAR, max(rate for rate, _ in rated) - _TIE) if rated else _SIMILAR
    rated = [(rate, name) for rate, name in rated if rate >= enough]
    return [name for _, name in sorted(rated, key=lambda pair: -pair[0])[:_SUGGESTIONS]]


def _similarity(typed: str, leaf: str) -> float:
    """Compare two names by their letters; `base_lr` is near to `lr`, because it holds all of its words."""
    if typed == leaf:
        return 1.0
    holds_all = set(typed.split("_")) <= set(leaf.split("_"))
    return 0.95 if holds_all else SequenceMatcher(None, typed, leaf).ratio()


def _sections(field: FieldInfo) -> Iterator[type[BaseModel]]:
    kinds = (field.annotation, *get_args(field.annotation))
    return (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
