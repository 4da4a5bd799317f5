"""Self-contained HTML pages made of sections of text, figures, tables and pictures."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Plot:
    """A rendered plot; `name` is its file name without suffix, and a `wide` plot spans the page."""

    name: str
    caption: str
    svg: str
    wide: bool = False


@dataclass(frozen=True)
class PageSection:
    """A section of a page; empty parts are left out.

    Attributes:
        title: heading of the section.
        text: paragraph below the heading.
        pictures: caption -> PNG bytes.
        plots: plots in print order.
        rows: rows of a table whose columns are the keys of the first row.
    """

    title: str
    text: str = ""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    plots: Sequence[Plot] = ()
    rows: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Page:
    """A page of headline figures followed by sections.

    Attributes:
        title: title of the page.
        lead: introduction below the title.
        figures: label -> value of each headline figure.
        sections: sections in print order.
    """

    title: str
    lead: str
    figures: Mapping[str, str]
    sections: Sequence[PageSection]


def render_page(page: Page) -> str:
    """Render a page as one HTML file with inline style and pictures."""
    return render_template("page.html", page=page)


def label_svg(svg: str, label: str) -> Any:
    """Give an SVG element the role and label of a picture, for screen readers."""
    from markupsafe import Markup, escape

    text = label.replace("`", "")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(text)}"', 1))


def prose_html(text: str) -> Any:
    """Escape a text, and turn the parts between backticks into code."""
    from markupsafe import Markup, escape

    parts = (
        f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(escape(text).split("`"))
    )
    return Markup("".join(parts))


def render_template(name: str, **values: object) -> str:
    """Render a template of this package with escaped values."""
    from jinja2 import Environment, FileSystemLoader  # slow to import

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "data_url": lambda png: "data:image/png;base64," + base64.b64encode(png).decode(),
        "labelled": label_svg,
        "prose": prose_html,
    }
    return environment.get_template(name).render(**values)
