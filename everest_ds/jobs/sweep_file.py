"""The candidates of a sweep, one JSON object per line: task N of an array job runs line N (from 0)."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everest_ds.errors import UsageError

SWEEP_FILE = "sweep.jsonl"
# The largest number of array tasks that SLURM can be configured to allow.
MAX_TASKS = 4_000_001
_ARRAY_ITEM = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?::([1-9][0-9]{0,8}))?)?")


@dataclass(frozen=True)
class SweepCandidate:
    """One run of a sweep.

    Attributes:
        name: name of the run folder within the sweep's folder.
        task: pretrain or finetune.
        recipe: recipe of the run.
        settings: the overrides that distinguish this run from the others, for display.
        overrides: all overrides of the run, including run.dir.
    """

    name: str
    task: str
    recipe: str
    settings: tuple[str, ...]
    overrides: tuple[str, ...]


def write_candidates(file: Path, candidates: Sequence[SweepCandidate]) -> None:
    """Write the candidates to a file, one ASCII line for each."""
    file.write_text("".join(json.dumps(asdict(candidate)) + "\n" for candidate in candidates))


def read_candidates(file: Path) -> list[SweepCandidate]:
    """Read the candidates that `write_candidates` wrote.

    Raises:
        UsageError: if the file is unreadable or does not hold the candidates of a sweep.
    """
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return [SweepCandidate(**{k: _frozen(v) for k, v in row.items()}) for row in rows]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{file}: does not hold the candidates of a sweep", given=str(error)) from None


def read_settings(file: Path) -> list[tuple[str | None, tuple[str, ...]]]:
    """Read candidates from a user or the tuner: `{"name": ..., "overrides": ["key=value", ...]}` per line.

    Returns:
        The name (None if not given) and the overrides of each candidate.

    Raises:
        UsageError: if a line is not a candidate; the error names the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: the file cannot be read", given=str(error)) from None
    return [_settings(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def expand_grid(axes: Sequence[str]) -> list[tuple[str, ...]]:
    """Combine the values of all axes: `["a=1,2", "b=x"]` -> `[("a=1", "b=x"), ("a=2", "b=x")]`.

    Commas in brackets or quotes do not split a value.

    Raises:
        UsageError: if an axis has no key or no value, or a key occurs twice.
    """
    keys = [axis.partition("=")[0] for axis in axes]
    for key, axis in zip(keys, axes, strict=True):
        if not key or "=" not in axis or keys.count(key) > 1:
            raise UsageError(
                "--grid is malformed or repeats a key",
                given=repr(axis),
                allowed="key.path=value,value,... once for each key",
            )
    choices = [
        [f"{key}={value}" for value in split_values(axis.partition("=")[2])]
        for key, axis in zip(keys, axes, strict=True)
    ]
    return list(itertools.product(*choices))


def split_values(text: str) -> list[str]:
    """Split a text at commas outside brackets and quotes: `1,[2,3],"a,b"` -> `['1', '[2,3]', '"a,b"']`."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += not quote and (character in "[{")
        depth -= not quote and (character in "]}")
        if character == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += character
    return values


def expand_array(spec: str, count: int) -> list[int]:
    """Expand a value of sbatch's `--array` to task numbers: `0-6:2,9%3` -> `[0, 2, 4, 6, 9]`.

    Raises:
        UsageError: if the value is malformed, or names a task that is not below `count`.
    """
    tasks: list[int] = []
    for item in spec.partition("%")[0].split(","):
        span = _span(item)
        if not span or span[-1] >= count:
            raise UsageError(
                "--array is malformed or names a task that does not exist",
                given=spec,
                allowed=f"tasks from 0 to {count - 1}, as in 0-3,7 or 0-7%2",
            )
        tasks.extend(span)
    return tasks


def check_candidate_name(name: object) -> str:
    """Return the name of a candidate, if it is a valid folder name.

    Raises:
        UsageError: if no folder can have this name.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UsageError(
            "the name of a candidate is not a folder name",
            given=repr(name),
            allowed='text without "/", other than "." and ".."',
        )
    return name


def _span(item: str) -> range:
    match = _ARRAY_ITEM.fullmatch(item)
    if match is None:
        return range(0)
    first, last, step = match.groups()
    return range(int(first), int(last or first) + 1, int(step or 1))


def _settings(file: Path, number: int, line: str) -> tuple[str | None, tuple[str, ...]]:
    try:
        row: Any = json.loads(line)
        overrides = row["overrides"]
        if isinstance(overrides, dict):
            overrides = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        if not all(isinstance(text, str) for text in overrides):
            raise TypeError("an override is not text")
        return (check_candidate_name(row["name"]) if "name" in row else None), tuple(overrides)
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{file}:{number}: not a candidate",
            given=f"{type(error).__name__}: {error}",
            allowed='{"name": "wide", "overrides": ["key.path=value"]}',
        ) from None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
