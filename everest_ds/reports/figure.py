"""Matplotlib figures without a screen and without global state."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of the given size in inches, with one pair of axes."""
    from matplotlib.figure import Figure  # heavy

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def new_panels(width: float, height: float, count: int) -> tuple[Figure, list[Axes]]:
    """A figure of the given size in inches, with several pairs of axes side by side on one scale."""
    from matplotlib.figure import Figure  # heavy

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element: sharp at any size, to stand inside an HTML page or in a file."""
    from matplotlib import rc_context  # heavy

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "everest-ds"}):  # equal figures give equal files
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
