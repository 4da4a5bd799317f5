"""The published efficiency tables as data, the reference for the figures of `everest-ds report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from everest_ds.errors import UsageError, nearest

_FILE = Path(__file__).with_name("published.yaml")
FULL_TOKEN = "full-token"


@dataclass(frozen=True)
class Cell:
    """One figure of a published table.

    Attributes:
        table: name of the table.
        method: name of the system.
        backbone: name of the backbone.
        column: name of the column.
        published: the figure as printed, a number or a duration as text; None where nothing was published.
    """

    table: str
    method: str
    backbone: str
    column: str
    published: float | str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Names that select this cell: the method, its parts if joined (`MVD + EVEREST`), the backbone."""
        parts = [part for part in self.method.split(" + ") if part != FULL_TOKEN]
        return (self.method, *parts, self.backbone)


@dataclass(frozen=True)
class PublishedTable:
    """A published table with its title, description and source.

    Attributes:
        name: key of the table in published.yaml.
        title: heading of the table.
        text: description of the setting.
        source: publication that printed the table.
        columns: column -> heading, in print order.
        cells: all figures, row by row.
    """

    name: str
    title: str
    text: str
    source: str
    columns: dict[str, str]
    cells: tuple[Cell, ...]


@cache
def published_tables() -> dict[str, PublishedTable]:
    """Return all tables by name, in the order of published.yaml."""
    return {name: _read_table(name, table) for name, table in yaml.safe_load(_FILE.read_text()).items()}


def select_cells(tables: Sequence[str] = (), models: Sequence[str] = ()) -> list[Cell]:
    """Return the cells of `tables` whose method or backbone is among `models`; an empty list selects all.

    Raises:
        UsageError: a name is in no table (the nearest names are listed), or no cell matches.
    """
    known = published_tables()
    for name in tables:
        if name not in known:
            raise UsageError("no such table", given=repr(name), allowed=nearest(name, known))
    everything = [cell for table in known.values() for cell in table.cells]
    wanted = [_find_name(model, {name for cell in everything for name in cell.names}) for model in models]
    cells = [cell for cell in everything if not tables or cell.table in tables]
    cells = [cell for cell in cells if not wanted or set(wanted) & set(cell.names)]
    if not cells:
        raise UsageError(f"no row of {', '.join(tables)} matches {', '.join(models)}")
    return cells


def _read_table(name: str, table: dict[str, Any]) -> PublishedTable:
    cells = tuple(
        Cell(name, row["method"], row["backbone"], column, row[column])
        for row in table["rows"]
        for column in table["columns"]
        if column in row
    )
    return PublishedTable(name, table["title"], table["text"], table["source"], table["columns"], cells)


def _find_name(given: str, known: set[str]) -> str:
    """Return the name as the tables spell it, ignoring case."""
    by_lower = {name.lower(): name for name in known}
    if given.lower() not in by_lower:
        close = nearest(given.lower(), by_lower)
        raise UsageError("no such system or backbone", given=repr(given), allowed=close)
    return by_lower[given.lower()]
