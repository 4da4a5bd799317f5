"""Plots of runs: loss curves and accuracy bars, as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from everest_ds.reports.figure import new_figure, to_png

Rows = Sequence[Mapping[str, Any]]


def draw_curves(runs: Mapping[str, Rows], column: str, ylabel: str) -> bytes:
    """Draw one curve per run: `column` of its metrics rows over the steps."""
    figure, axes = new_figure(6, 3.4)
    for name, rows in runs.items():
        points = [(row["step"], row[column]) for row in rows if column in row]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.5)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    if len(runs) > 1:
        axes.legend()
    return to_png(figure)


def draw_accuracies(bars: Mapping[str, float], chance: float) -> bytes:
    """Draw top-1 accuracies in percent as bars, with a line at chance level."""
    figure, axes = new_figure(6, 3.4)
    drawn = axes.bar(list(bars), list(bars.values()), width=0.5, color=["#2a6f97", "#a9bcd0", "#d8dee4"])
    on_white = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # above the line that may cross a label
    axes.bar_label(drawn, fmt="%.1f %%", padding=3, bbox=on_white)
    line = axes.axhline(chance, linestyle="--", color="black", linewidth=1)
    figure.legend([line], [f"chance {chance:.1f} %"], loc="outside upper right", frameon=False)
    axes.set_ylabel("test top-1, %")
    axes.set_ylim(0, 105)
    return to_png(figure)
