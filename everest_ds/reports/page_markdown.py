"""Pages rendered as Markdown, with the plots in separate files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from everest_ds.reports.page import Page, PageSection


def render_page_markdown(page: Page) -> str:
    """Render a page as Markdown that links to the plots as `plots/NAME.svg`; pictures are left out."""
    parts = [f"# {page.title}", page.lead, markdown_table([page.figures]) if page.figures else ""]
    parts += [part for section in page.sections for part in _section(section)]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Render rows as a Markdown table with their keys as columns and numbers right-aligned."""
    names = list(rows[0])
    numeric = [all(isinstance(row[name], int | float) for row in rows) for name in names]
    lines = [names, ["--:" if right else "---" for right in numeric], *(row.values() for row in rows)]
    return "\n".join(_line(cells) for cells in lines)


def _section(section: PageSection) -> Iterator[str]:
    yield f"## {section.title}"
    yield section.text
    yield from (f"![{plot.caption}](plots/{plot.name}.svg)" for plot in section.plots)
    yield markdown_table(section.rows) if section.rows else ""


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("_", " ").replace("|", r"\|") for cell in cells) + " |"
