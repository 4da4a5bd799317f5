"""Reading of a DeepSpeed JSON file: strict JSON, and every key and value checked at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from everest_ds.config.deepspeed_keys import AUTO, DEEPSPEED_KEYS, SECTIONS, ZERO, DeepSpeedKey, is_off
from everest_ds.config.schema import Experiment
from everest_ds.errors import ConfigError, nearest
from everest_ds.shipped import shipped

_OPTIMIZERS, _SCHEDULES = ("adam", "adamw"), ("warmuplr", "warmupdecaylr", "warmupcosinelr")
# Sections whose `type` decides which other keys they take.
_TYPED = {
    "optimizer": (_OPTIMIZERS, "a run trains with AdamW; write AdamW, or remove `optimizer`"),
    "scheduler": (
        _SCHEDULES,
        "a run warms up linearly and decays by a cosine; write WarmupCosineLR, or remove `scheduler`",
    ),
}
_MOST_SHOWN = 60  # characters of a value in an error


@dataclass(frozen=True)
class DeepSpeedFile:
    """The content of a DeepSpeed JSON file, sorted by what a run does with it.

    Attributes:
        path: the file.
        raw: the whole JSON object.
        settings: value by dotted key, for the keys that DeepSpeed reads or the run config decides.
        automatic: dotted keys with the value `auto` or `null`.
        ignored: dotted keys that have no effect on a run.
        faults: human-readable reasons why the file cannot be used; each names its key.
    """

    path: Path
    raw: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    automatic: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def check(self, contradictions: Iterable[str] = (), fix: str | None = None) -> None:
        """Raise an error that names every fault of the file.

        Args:
            contradictions: faults that the file has beside its own.
            fix: the action that removes the contradictions.

        Raises:
            ConfigError: if there are faults.
        """
        found = [*self.faults, *contradictions]
        if found:
            count = "1 entry" if len(found) == 1 else f"{len(found)} entries"
            given = (
                found[0] if len(found) == 1 else ", ".join(f"({n}) {one}" for n, one in enumerate(found, 1))
            )
            raise ConfigError(
                f"{self.path}: {count} of this DeepSpeed file cannot be used", given=given, fix=fix
            )


def ds_config_path(config: Experiment) -> Path:
    """Return the DeepSpeed file of a run: the user's, or the shipped file of its ZeRO stage."""
    parallelism = config.parallelism
    offload = "_offload" if parallelism.offload_to_cpu else "_nvme" if parallelism.offload_to_nvme else ""
    return parallelism.ds_config or _shipped_file(parallelism.zero_stage, offload)


def _shipped_file(stage: int, offload: str = "") -> Path:
    return shipped("ds_configs") / f"zero{stage}{offload}.json"


def read_deepspeed_file(config: Experiment) -> DeepSpeedFile:
    """Read the DeepSpeed file of a run and sort its keys; `check` raises the faults that were found.

    Raises:
        ConfigError: if the file cannot be read, or is not a JSON object.
    """
    path = ds_config_path(config)
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise ConfigError(
            "parallelism.ds_config: this DeepSpeed file cannot be read",
            given=f"{path}: {error.strerror}",
            fix="name a JSON file, or leave the key out to use a shipped file",
        ) from None


def zero_values(file: DeepSpeedFile, stage: int) -> dict[str, Any]:
    """Return the `zero_optimization` of a file by dotted key, where `auto` means the shipped file's value.

    A key that the shipped file of the stage lacks keeps DeepSpeed's default. A file without the section gets
    that of the shipped file.
    """
    shipped_values = _read(_shipped_file(stage), 0).settings
    open_keys = [*file.automatic, *([] if ZERO in file.raw else [ZERO])]
    default = {key: value for key, value in shipped_values.items() if _is_under(key, open_keys)}
    return {key: value for key, value in (default | file.settings).items() if _is_under(key, [ZERO])}


def _is_under(key: str, names: Iterable[str]) -> bool:
    """Return whether a dotted key is one of `names`, or below one of them."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


@lru_cache(maxsize=64)
def _read(path: Path, changed_ns: int) -> DeepSpeedFile:
    """Read a file; `changed_ns` makes the cache miss when the file is rewritten."""
    tree = _parse(path)
    file = DeepSpeedFile(path, tree)
    _sort(tree, "", file)
    return file


def _sort(tree: Mapping[str, Any], prefix: str, file: DeepSpeedFile) -> None:
    """Sort the keys of a section into the lists of `file`."""
    for name, value in tree.items():
        path = prefix + name
        key = DEEPSPEED_KEYS.get(path)
        if key is not None:
            _sort_key(path, key, value, file)
        elif path not in SECTIONS:
            known = nearest(name, _names_in(prefix))
            file.faults.append(f"`{path}` is not a key of DeepSpeed ({known})")
        elif value is None or value == AUTO:
            file.automatic.append(path)
        elif not isinstance(value, dict):
            file.faults.append(f"`{path}` is {_shown(value)}, not an object in braces")
        elif path in _TYPED and not _has_known_type(value, path):
            file.faults.append(f"`{path}.type` is {_shown(value['type'])}: {_TYPED[path][1]}")
        else:
            _sort(value, f"{path}.", file)


def _sort_key(path: str, key: DeepSpeedKey, value: Any, file: DeepSpeedFile) -> None:
    if value is None or value == AUTO:
        file.automatic.append(path)
    elif key.use == "refused":
        if not key.asks_for_nothing(value):
            file.faults.append(f"`{path}` is {_shown(value)}: {key.reason}")
    elif not key.kind.holds(value):
        file.faults.append(f"`{path}` is {_shown(value)}, not {key.kind.name}")
    elif key.use == "ignored":
        if not is_off(value):
            file.ignored.append(path)
    else:
        is_whole = isinstance(value, float) and value == int(value)
        file.settings[path] = (
            int(value) if is_whole else value
        )  # 5e8 is a float, and DeepSpeed's sizes are not


def _has_known_type(section: Mapping[str, Any], path: str) -> bool:
    """Return whether the `type` of a section is one with which a run can be compared, or is not given."""
    kind = section.get("type")
    return kind in (None, AUTO) or (isinstance(kind, str) and kind.lower() in _TYPED[path][0])


def _names_in(prefix: str) -> set[str]:
    """Return the names of the keys and sections of a section, without keys that are refused."""
    usable = [key for key, row in DEEPSPEED_KEYS.items() if row.use != "refused"]
    below = [key.removeprefix(prefix) for key in usable if key.startswith(prefix)]
    return {name.partition(".")[0] for name in below}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _parse(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, in which no key may be given twice.

    Raises:
        OSError: if the file cannot be read.
        ConfigError: if the file is not JSON, or holds no object; the message names the line or key.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")  # Windows editors write a byte order mark
        tree = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise _damaged(path, f"line {error.lineno}, column {error.colno}: {_reason(error)}") from None
    except RecursionError:
        raise _damaged(path, "its objects and lists are nested too deeply") from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(tree, dict):
        raise _damaged(path, f"{_shown(tree)}, not an object in braces")
    return tree


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"key `{key}` is given twice")
        tree[key] = value
    return tree


def _reason(error: json.JSONDecodeError) -> str:
    """Return a human-readable reason for the faults that hand-written files have most often."""
    here, before = error.doc[error.pos :].lstrip(), error.doc[: error.pos].rstrip()
    if here.startswith(("//", "/*", "#")):
        return "JSON has no comments; remove it"
    if here[:1] in ("}", "]") and before.endswith(","):
        return "the comma after the last entry is not allowed; remove it"
    if here.startswith("'"):
        return "text is in double quotes in JSON"
    return error.msg[0].lower() + error.msg[1:]


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path}: not readable as DeepSpeed JSON", given=reason)
