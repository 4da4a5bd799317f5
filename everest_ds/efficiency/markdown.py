"""The efficiency report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from everest_ds.efficiency.arrange import ReportTable, TableEntry

_MARKS = {"predicted": "ᵖ", "counted": "ᶜ", "measured": "ᵐ", "published": ""}
LEGEND = (
    "Published / ours (gap): ᵖ predicted by a closed formula, ᶜ counted on the traced model, ᵐ measured on a"
    " device; ✓ equal to the printed digit."
)


def render_markdown(
    title: str, lead: str, grids: Sequence[ReportTable], plots: Sequence[tuple[str, str]]
) -> str:
    """Render a document of all tables, followed by the plots given as (caption, file)."""
    parts = [f"# {title}", lead, LEGEND]
    for grid in grids:
        notes = "\n".join(f"{number}. {note}" for number, note in enumerate(grid.notes, 1))
        parts += [f"## {grid.heading.title}", grid.heading.text, _table(grid), notes]
    parts += [f"![{caption}]({file})" for caption, file in plots]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(grid: ReportTable) -> str:
    labels = [column.label + _note(column.note) for column in grid.columns]
    lines = [_join([grid.heading.methods, "backbone", *labels]), _join(["---"] * (2 + len(labels)))]
    for line in grid.lines:
        cells = ["<br>".join(map(_cell, line.entries.get(column.name, []))) for column in grid.columns]
        lines.append(_join([line.method, line.backbone, *cells]))
    return "\n".join(lines)


def _cell(entry: TableEntry) -> str:
    """Format a figure, such as `35.5 / 35.48ᵖ (✓) [2]`."""
    gap = f" ({entry.gap})" if entry.gap else ""
    ours = f"{entry.value}{_MARKS[entry.kind]}{gap}" if entry.value else ""
    return " / ".join(part for part in (entry.published, ours) if part) + _note(entry.note)


def _note(number: int) -> str:
    return f" [{number}]" if number else ""


def _join(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
