"""Pictures of confusion matrices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from everest_ds.reports.figure import new_figure, to_png

_MAX_WRITTEN = 20  # with more classes, numbers in the cells are too small to read


def draw_confusion(counts: NDArray[np.int64], names: list[str]) -> bytes:
    """Draw counts (true class, predicted class) as a PNG; a cell is coloured by its share of the row."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(4 + 0.35 * len(names), 16)
    figure, axes = new_figure(side, side)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(names) <= _MAX_WRITTEN:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        for (row, column), count in np.ndenumerate(counts):
            shade = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=shade)
    return to_png(figure)
