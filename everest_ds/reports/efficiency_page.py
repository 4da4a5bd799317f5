"""The efficiency report as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from everest_ds.reports.efficiency import Grid
from everest_ds.reports.page import Page, Plot, render_template


def render_efficiency_page(
    title: str,
    lead: str,
    figures: Mapping[str, str],
    grids: Sequence[Grid],
    plots: Sequence[Plot],
    own_method: str,
    provenance: str,
) -> str:
    """HTML with style and plots inside: headline figures, plots, then every table with its notes.

    Args:
        figures: label -> headline figure.
        own_method: the method whose lines are set off.
        provenance: what made the page, for its foot.
    """
    page = Page(title, lead, figures, sections=())
    return render_template(
        "efficiency.html", page=page, grids=grids, plots=plots, own_method=own_method, provenance=provenance
    )
