"""Matplotlib figures without a display and without global state."""

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
    """Create a figure of the given size in inches, with one pair of axes."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def new_panels(width: float, height: float, count: int, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    """Create a figure of the given size in inches, with several pairs of axes, by default of one y scale."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=share_y, squeeze=False)[0])


def _take_texts_literally(figure: Figure) -> None:
    """Let no text of the figure be a formula: names of classes and runs may contain dollar signs."""
    from matplotlib.text import Text  # slow to import

    for text in figure.findobj(Text):
        text.set_parse_math(False)


def to_png(figure: Figure) -> bytes:
    """Render the figure as the bytes of a PNG file."""
    _take_texts_literally(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def to_image(figure: Figure) -> NDArray[np.uint8]:
    """Render the figure as pixels (row, column, colour)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import

    _take_texts_literally(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png_as_svg(png: bytes) -> str:
    """Embed a PNG in an SVG element, so that it can be used in place of a plot."""
    width, height = struct.unpack(">II", png[16:24])  # fields of the IHDR chunk, which always comes first
    data = b64encode(png).decode()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
        f'<image width="{width}" height="{height}" href="data:image/png;base64,{data}"/></svg>'
    )


def to_svg(figure: Figure) -> str:
    """Render the figure as an SVG element, for an HTML page or a file."""
    from matplotlib import rc_context  # slow to import

    _take_texts_literally(figure)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "everest-ds"}):  # makes the output reproducible
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
