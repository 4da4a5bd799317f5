"""Layout of the efficiency report: one line per system, with the published figures next to ours.

A row has the keys table, method, backbone, column, published, value, kind, gap_pct, note.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FigureRow = Mapping[str, Any]
_CLOSE_PCT, _FAIR_PCT = 1.0, 15.0


@dataclass(frozen=True)
class Heading:
    """The title, description and column labels of a table.

    Attributes:
        title: heading of the table.
        text: description of the table.
        columns: column -> label, in print order.
        methods: label of the first column, which names the rows.
    """

    title: str
    text: str
    columns: Mapping[str, str]
    methods: str = "method"


@dataclass(frozen=True)
class TableEntry:
    """One figure of a table, as text.

    Attributes:
        published: the published figure; "" if there is none.
        value: our figure; "" if there is none.
        kind: predicted, counted, measured or published.
        gap: difference of our figure from the published one; a tick if they agree to the printed digit.
        level: exact, close (1 %), fair (15 %) or far; "" if nothing is compared.
        note: number of a note under the table; 0 for none.
    """

    published: str
    value: str
    kind: str
    gap: str
    level: str
    note: int


@dataclass
class SystemLine:
    """The line of one system: column -> figures, several of them if several kinds are known."""

    method: str
    backbone: str
    entries: dict[str, list[TableEntry]] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: key of the column in the rows.
        label: heading of the column.
        parts: the parts that it shows, of `published`, `ours` and `gap`.
        note: number of the note that all its figures share; 0 for none.
    """

    name: str
    label: str
    parts: tuple[str, ...]
    note: int


@dataclass
class ReportTable:
    """A table in human-readable form, with its numbered notes."""

    name: str
    heading: Heading
    columns: list[Column]
    lines: list[SystemLine]
    notes: list[str]

    @property
    def compares(self) -> bool:
        """True if any column of the table shows published figures."""
        return any("published" in column.parts for column in self.columns)


def arrange(rows: Sequence[FigureRow], headings: Mapping[str, Heading]) -> list[ReportTable]:
    """Arrange rows into tables, in the order in which the tables occur in `rows`."""
    names = dict.fromkeys(row["table"] for row in rows)
    return [_arrange_table(name, headings[name], [r for r in rows if r["table"] == name]) for name in names]


# Headline figures of the summary: (part of the columns' names, label, levels that count as agreement).
_BARS = (
    ("gflops", "GFLOPs figures equal to the printed digit", ("exact",)),
    ("gflops", f"GFLOPs figures within {_CLOSE_PCT:g} %", ("exact", "close")),
    ("memory", f"memory figures within {_FAIR_PCT:g} %", ("exact", "close", "fair")),
)


def summarise(rows: Sequence[FigureRow]) -> dict[str, str]:
    """Return how many of our figures agree with the published ones: label -> `17 of 23`.

    Measured figures are left out, and so are percentages that follow from other figures.
    """
    own = [row for row in rows if row["kind"] != "measured" and not _holds_percentages(row)]
    summary = {}
    for part, label, good in _BARS:
        levels = [level for level in (level_of(row) for row in own if part in row["column"]) if level]
        if levels:
            summary[label] = f"{sum(level in good for level in levels)} of {len(levels)}"
    return summary


def level_of(row: FigureRow) -> str:
    """Return how well our figure agrees: exact, close, fair or far; "" if there is nothing to compare."""
    if row["gap_pct"] is None:
        return ""
    if round(row["value"], _decimals(row["published"])) == row["published"]:
        return "exact"
    gap = abs(row["gap_pct"])
    return "close" if gap <= _CLOSE_PCT else "fair" if gap <= _FAIR_PCT else "far"


def _arrange_table(name: str, heading: Heading, rows: Sequence[FigureRow]) -> ReportTable:
    """Arrange the rows of one table into columns, lines and numbered notes."""
    notes, columns = _Footnotes(), []
    for column, label in heading.columns.items():
        mine = [row for row in rows if row["column"] == column]
        if mine:
            texts = {row["note"] for row in mine}
            shared = notes.number(texts.pop()) if len(mine) > 1 and len(texts) == 1 else 0
            columns.append(Column(column, label, _parts(mine, annotated=not shared), shared))
    annotated = {column.name for column in columns if column.note}
    lines: dict[tuple[str, str], SystemLine] = {}
    for row in rows:
        line = lines.setdefault((row["method"], row["backbone"]), SystemLine(row["method"], row["backbone"]))
        note = 0 if row["column"] in annotated else notes.number(row["note"])
        line.entries.setdefault(row["column"], []).append(_entry(row, note))
    return ReportTable(name, heading, columns, list(lines.values()), notes.texts)


def _parts(rows: Sequence[FigureRow], *, annotated: bool) -> tuple[str, ...]:
    """Return the parts among published, ours and gap (which also shows notes) that have any content."""
    shown = {
        "published": any(row["published"] is not None for row in rows),
        "ours": any(row["value"] is not None for row in rows),
        "gap": any(level_of(row) or (annotated and row["note"]) for row in rows),
    }
    return tuple(part for part, there in shown.items() if there)


class _Footnotes:
    """The notes under a table, without repetitions."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        """Return the number of a note, adding it if it is new; 0 for an empty text."""
        if not text:
            return 0
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def _entry(row: FigureRow, note: int) -> TableEntry:
    level = level_of(row)
    unit = "pt" if _holds_percentages(row) else "%"
    gap = "" if not level else "✓" if level == "exact" else f"{row['gap_pct']:+.1f} {unit}"
    published = "" if row["published"] is None else str(row["published"])
    return TableEntry(published, _value(row), row["kind"], gap, level, note)


def _holds_percentages(row: FigureRow) -> bool:
    """Return whether the row's figures are percentages, whose gaps are in percentage points."""
    return str(row["table"]).endswith("_pct")


def _value(row: FigureRow) -> str:
    """Format our figure with one decimal more than the published one, or with one or two if there is none."""
    value, published = row["value"], row["published"]
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(published, int | float):
        return f"{value:.{_decimals(published) + 1}f}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.1f}"


def _decimals(printed: float) -> int:
    return len(str(printed).partition(".")[2])
