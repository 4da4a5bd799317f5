"""The published efficiency tables, as data: what every figure of ours is set beside."""

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
        published: as printed: a number, or a duration as text; None where only ours is given.
    """

    table: str
    method: str
    backbone: str
    column: str
    published: float | str | None

    @property
    def names(self) -> tuple[str, ...]:
        """What a user may select it by: `VideoMAE + EVEREST` goes by either, and by its backbone."""
        parts = [part for part in self.method.split(" + ") if part != FULL_TOKEN]
        return (self.method, *parts, self.backbone)


@dataclass(frozen=True)
class PublishedTable:
    """A published table and what it says about itself.

    Attributes:
        columns: column -> heading, in print order.
    """

    name: str
    title: str
    text: str
    source: str
    columns: dict[str, str]
    cells: tuple[Cell, ...]


@cache
def published_tables() -> dict[str, PublishedTable]:
    """All tables by name, in the order of the file."""
    return {name: _read_table(name, table) for name, table in yaml.safe_load(_FILE.read_text()).items()}


def select_cells(tables: Sequence[str] = (), models: Sequence[str] = ()) -> list[Cell]:
    """The cells of `tables` whose method or backbone is among `models`; nothing named means all.

    Raises:
        UsageError: for a name that is in no table, with the nearest that are; or if nothing is left.
    """
    known = published_tables()
    _check_names("table", tables, known)
    everything = [cell for table in known.values() for cell in table.cells]
    wanted = [_find_name(model, {name for cell in everything for name in cell.names}) for model in models]
    cells = [cell for cell in everything if not tables or cell.table in tables]
    cells = [cell for cell in cells if not wanted or set(wanted) & set(cell.names)]
    if not cells:
        raise UsageError(f"no row of {', '.join(tables)} is about {', '.join(models)}")
    return cells


def _read_table(name: str, table: dict[str, Any]) -> PublishedTable:
    cells = tuple(
        Cell(name, row["method"], row["backbone"], column, row[column])
        for row in table["rows"]
        for column in table["columns"]
        if column in row
    )
    return PublishedTable(name, table["title"], table["text"], table["source"], table["columns"], cells)


def _check_names(what: str, given: Sequence[str], known: dict[str, PublishedTable]) -> None:
    for name in given:
        if name not in known:
            raise UsageError(f"no such {what}", given=repr(name), allowed=nearest(name, known))


def _find_name(given: str, known: set[str]) -> str:
    """`given` as the tables spell it, whatever its case."""
    by_lower = {name.lower(): name for name in known}
    if given.lower() not in by_lower:
        close = nearest(given.lower(), by_lower)
        raise UsageError("no such system or backbone", given=repr(given), allowed=close)
    return by_lower[given.lower()]
