"""Matplotlib figures without a screen and without global state."""

from __future__ import annotations

import io
import struct
from base64 import b64encode
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

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


def to_image(figure: Figure) -> NDArray[np.uint8]:
    """The figure as pixels (row, column, colour)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png_as_svg(png: bytes) -> str:
    """A picture as an SVG element that holds it whole: to stand where plots do."""
    width, height = struct.unpack(">II", png[16:24])  # of the header, which comes first
    data = b64encode(png).decode()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
        f'<image width="{width}" height="{height}" href="data:image/png;base64,{data}"/></svg>'
    )


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element: sharp at any size, to stand inside an HTML page or in a file."""
    from matplotlib import rc_context  # heavy

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "everest-ds"}):  # equal figures give equal files
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
