"""A self-contained HTML page out of sections of text, figures, tables and pictures."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Plot:
    """A drawn plot; `name` is that of its file, `wide` takes the whole width of a page."""

    name: str
    caption: str
    svg: str
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it; empty parts are left out.

    Attributes:
        pictures: caption -> PNG bytes.
        rows: a table, its columns the keys of the first row.
    """

    title: str
    text: str = ""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    plots: Sequence[Plot] = ()
    rows: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Page:
    """A page: headline figures first, then sections.

    Attributes:
        figures: label -> value, shown large.
    """

    title: str
    lead: str
    figures: Mapping[str, str]
    sections: Sequence[Section]


def render_page(page: Page) -> str:
    """HTML with its style and pictures inside: one file to open or to send."""
    return render_template("page.html", page=page)


def render_template(name: str, **values: object) -> str:
    """A template of this package, filled in; values are escaped."""
    from jinja2 import Environment, FileSystemLoader  # heavy

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_url"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    return environment.get_template(name).render(**values)
