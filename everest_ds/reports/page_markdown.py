"""Pages rendered as Markdown, with the plots in separate files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from everest_ds.reports.page import Page


def render_page_markdown(page: Page) -> str:
    """Render a page as Markdown that links to the plots as `plots/NAME.svg`; pictures are left out."""
    parts = [f"# {page.title}", page.lead, markdown_table([page.figures]) if page.figures else ""]
    for section in page.sections:
        plots = [f"![{plot.caption}](plots/{plot.name}.svg)" for plot in section.plots]
        rows = markdown_table(section.rows) if section.rows else ""
        parts += [f"## {section.title}", section.text, *plots, rows]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Render rows as a Markdown table with their keys as columns and numbers right-aligned."""
    names = list(rows[0])
    numeric = [all(isinstance(row[name], int | float) for row in rows) for name in names]
    lines = [names, ["--:" if right else "---" for right in numeric], *(row.values() for row in rows)]
    texts = [[str(cell).replace("_", " ").replace("|", r"\|") for cell in cells] for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in texts)
