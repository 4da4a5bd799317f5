"""The efficiency report as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from everest_ds.efficiency.arrange import ReportTable
from everest_ds.reports.page import Page, Plot, render_template


def render_efficiency_page(
    title: str,
    lead: str,
    figures: Mapping[str, str],
    grids: Sequence[ReportTable],
    plots: Sequence[Plot],
    own_method: str,
    provenance: str,
) -> str:
    """Render HTML with inline style and plots: headline figures, plots, then every table with its notes.

    Args:
        title: title of the page.
        lead: introduction below the title.
        figures: label -> headline figure.
        grids: tables in print order.
        plots: plots in print order.
        own_method: the method whose lines are highlighted.
        provenance: text of the footer that names the version and commit behind the page.
    """
    page = Page(title, lead, figures, sections=())
    return render_template(
        "efficiency.html", page=page, grids=grids, plots=plots, own_method=own_method, provenance=provenance
    )
