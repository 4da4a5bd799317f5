"""Loading of a recipe or YAML file, with `key.path=value` overrides, into a validated `Experiment`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from everest_ds.config.key_names import is_text, suggest_keys
from everest_ds.config.recipes import ConfigSource, choose, find_recipe, recipe_names
from everest_ds.config.schema import Experiment
from everest_ds.config.yaml_tree import ConfigTree, merge, parse_yaml, read_yaml
from everest_ds.errors import ConfigError, UsageError, nearest

if TYPE_CHECKING:
    from everest_ds.config import Experiment

_NOTHING = ("", "~", "null", "Null", "NULL")  # YAML's spellings of a key without a value


def load_experiment(source: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Load a config: resolve its `base:` inheritance, apply the overrides and validate the result.

    Args:
        source: a recipe name, a YAML file, or a run folder (its `config.yaml`).
        overrides: `key.path=value` strings; values are YAML, except for those of paths and names, which are
            taken as they are unless they are in quotes.

    Raises:
        ConfigError: if a file, key or value is invalid; the message names it and the allowed values.
    """
    found = find_config(source)
    tree = choose(_read_with_bases(found, ()), found)
    if Path(source).is_dir():  # the run folder may have been moved since its config was written
        _apply_override(tree, f"run.dir={json.dumps(str(source))}")
    return build_experiment(tree, overrides, found.path if Path(source).exists() else source)


def build_experiment(tree: ConfigTree, overrides: Sequence[str], origin: str | Path) -> Experiment:
    """Apply `key.path=value` overrides to a tree of settings, then validate.

    Args:
        tree: nested settings, as read from YAML; the overrides are written into it.
        overrides: `key.path=value` strings, as in `load_experiment`.
        origin: file or recipe that the tree was read from, for error messages about keys that are not
            overridden.

    Raises:
        ConfigError: if a key or value is invalid; the message names it and the allowed values.
    """
    for text in overrides:
        _apply_override(tree, text)
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, origin, overrides) from None


def dump_experiment(config: Experiment) -> str:
    """Return the complete resolved config as YAML, in the form that a run folder stores."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def find_config(source: str | Path) -> ConfigSource:
    """Find the config file of a recipe name, a YAML file or a run folder.

    Raises:
        ConfigError: if `source` is none of the three.
    """
    path = Path(source)
    if path.is_dir() and (path / "config.yaml").is_file():
        return ConfigSource(path / "config.yaml")
    if path.is_file():
        return ConfigSource(path)
    recipe = find_recipe(str(source))
    if recipe is not None:
        return recipe
    if path.is_dir():
        raise ConfigError(
            f"{source}: this folder is not a run, because it holds no config.yaml",
            fix="name the folder of a run that has started, or a recipe (`everest-ds recipes` lists them)",
        )
    raise ConfigError(
        "no such recipe, YAML file or run folder",
        given=repr(str(source)),
        allowed=nearest(str(source), [*recipe_names(), *_configs_in(path.parent)]),
        fix="`everest-ds recipes` lists the recipes",
    )


def _configs_in(folder: Path) -> list[str]:
    """Return the run folders and YAML files in a folder, for the hint of an error."""
    beside = [*folder.glob("*/config.yaml"), *folder.glob("[!.]*.yaml")] if folder.is_dir() else []
    return [str(file.parent if file.name == "config.yaml" else file) for file in beside]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf with its dotted path: `{"a": {"b": 1}}` yields `("a.b", 1)`."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nested(flat: Mapping[str, Any]) -> ConfigTree:
    """Return the tree of leaves with dotted paths: the inverse of `flatten`."""
    tree: ConfigTree = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        node = tree
        for name in sections:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def _read_with_bases(source: ConfigSource, seen: tuple[Path, ...]) -> ConfigTree:
    path = source.path
    if path.resolve() in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise ConfigError(f"{path}: `base` inherits from itself", given=chain)
    tree = read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    below = _find_base(str(base), path)
    inherited = _read_with_bases(below, (*seen, path.resolve()))
    return merge(choose(inherited, below) if below.variant else inherited, tree)


def _find_base(base: str, path: Path) -> ConfigSource:
    beside = path.parent / base
    try:
        return ConfigSource(beside) if beside.is_file() else find_config(base)
    except ConfigError as error:
        raise ConfigError(f"{path}: `base`: {error}") from None


def _apply_override(tree: ConfigTree, text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError("override without a key or without `=`", given=repr(text), allowed="key.path=value")
    value = _value_of(key, raw)
    *sections, leaf = key.split(".")
    node = tree
    for name in sections:
        child = node.get(name)
        node[name] = dict(child) if isinstance(child, dict) else {}
        node = node[name]
    node[leaf] = value


def _value_of(key: str, raw: str) -> Any:
    """Return the value of an override: text as it was typed for a path or name, otherwise YAML."""
    quoted = raw[:1] in ("'", '"')
    if not quoted and raw.strip() not in _NOTHING and is_text(key):
        return raw
    try:
        return parse_yaml(raw)
    except yaml.YAMLError:
        return raw


def _explain(error: ValidationError, origin: str | Path, overrides: Sequence[str]) -> ConfigError:
    first, *others = error.errors()
    location = [str(part) for part in first["loc"]]
    key, unknown = ".".join(location), first["type"] == "extra_forbidden"
    typed = _typed_override(location, overrides, unknown)
    origin, more = typed or origin, f" (and {len(others)} more)" if others else ""
    if unknown:
        name = key if typed is None else typed.partition("=")[0]
        return ConfigError(f"{origin}: unknown config key `{name}`{more}", allowed=suggest_keys(name))
    if first["type"] == "missing":
        return ConfigError(f"{origin}: config key `{key}` is missing{more}", fix=f"add `{key}:`")
    subject, message = f"{origin}: {key or 'config'}{more}", first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return ConfigError(f"{subject}: {message}")
    return ConfigError(subject, given=repr(first["input"]), allowed=message.removeprefix("Input should be "))


def _typed_override(location: Sequence[str], overrides: Sequence[str], unknown: bool) -> str | None:
    """Return the override that set the key at `location`, or a key below it if that section is unknown."""
    for text in reversed(overrides):
        key = text.partition("=")[0].split(".")
        shared = min(len(key), len(location)) if unknown else len(key)
        if key[:shared] == list(location[:shared]):
            return text
    return None


def load_task(command: str, source: str, overrides: Sequence[str]) -> Experiment:
    """Load the config of a run for the command `pretrain`, `finetune` or `evaluate`.

    Raises:
        ConfigError: if the config cannot be read.
        UsageError: if the config is for another task.
    """
    config = load_experiment(source, overrides)
    if config.task == ("finetune" if command == "evaluate" else command):
        return config
    if config.task == "finetune":
        fix = f"`everest-ds finetune {source}`, or choose one of `everest-ds recipes pretrain`"
    else:
        fix = f"fine-tune it first: `everest-ds finetune RECIPE model.init_from={config.run.dir}`"
    raise UsageError(
        f"{source}: this config is for task {config.task}",
        given=f"everest-ds {command}",
        allowed="a config for task pretrain" if command == "pretrain" else "a config for task finetune",
        fix=fix,
    )
