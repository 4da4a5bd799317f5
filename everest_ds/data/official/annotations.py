"""The content of official annotations, and readers of the text, JSON and CSV files that hold them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from everest_ds.errors import DataError, nearest


class AnnotatedVideo(NamedTuple):
    """A video that an annotation file lists.

    Attributes:
        names: the names that its file may have, without suffix, preferred first: `CLASS/VIDEO` or `VIDEO`.
        label: index of its class; None if the annotation gives none.
        parent: the name of a longer video that contains it.
        span: its frames within the parent, as `Sample.span`.
    """

    names: tuple[str, ...]
    label: int | None
    parent: str | None = None
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Annotations:
    """The complete annotation of a data set.

    Attributes:
        classes: class names, in label order.
        splits: the listed videos, by split (`train`, `val`, `test`).
    """

    classes: list[str]
    splits: dict[str, list[AnnotatedVideo]]


def find_file(folder: Path, *names: str) -> Path | None:
    """Return the first of `names` that is a file in `folder`, or None."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def need_file(folder: Path, *names: str) -> Path:
    """Return the first of `names` that is a file in `folder`.

    Raises:
        DataError: if `folder` holds none of these files.
    """
    file = find_file(folder, *names)
    if file is None:
        raise DataError(f"{folder}: an annotation file is missing", allowed=" or ".join(names))
    return file


def read_text(file: Path) -> str:
    """Read the text of an annotation file.

    Raises:
        DataError: if the file cannot be read as UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot read the annotation", given=str(error)) from None


def read_json(file: Path) -> Any:
    """Parse a JSON file.

    Raises:
        DataError: if the file is not JSON.
    """
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: not JSON", given=str(error)) from None


def read_rows(file: Path, *columns: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file with a header.

    Raises:
        DataError: if the file, or one of its rows, lacks one of `columns`.
    """
    rows = csv.DictReader(read_text(file).splitlines())
    for row in rows:
        lacking = [column for column in columns if row.get(column) in (None, "")]
        if lacking:
            given = ", ".join(rows.fieldnames or ())
            raise DataError(
                f"{file}:{rows.line_num}: no {' and no '.join(lacking)}", given=f"columns {given}"
            )
        yield row


def label_of(name: str, classes: dict[str, int], file: Path) -> int:
    """Return the label of class `name`.

    Raises:
        DataError: if there is no such class.
    """
    if name not in classes:
        raise DataError(f"{file}: no such class", given=repr(name), allowed=nearest(name, classes))
    return classes[name]
