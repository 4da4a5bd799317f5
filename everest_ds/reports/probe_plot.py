"""The picture of the probes of several checkpoints: accuracies with their intervals, and RankMe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from everest_ds.reports.charts import BASELINE, EVEREST, SOFT, finish
from everest_ds.reports.figure import new_panels, to_png

_MOST_TICKS = 7  # steps that are written in full without overlapping
_COLORS = (EVEREST, BASELINE, SOFT)
Interval = tuple[float, float, float]  # value, lower and upper end


def draw_probes(
    names: Sequence[str],
    steps: Sequence[int] | None,
    accuracies: Mapping[str, Sequence[Interval]],
    rankme: Sequence[float],
) -> bytes:
    """Draw accuracies and RankMe over the steps as a PNG, or over the names of weights without steps.

    Args:
        names: name of each checkpoint.
        steps: optimiser steps of each checkpoint; None if they are not known.
        accuracies: name of a probe -> top-1 accuracy in percent of each checkpoint, with its interval.
        rankme: effective rank of each checkpoint.
    """
    figure, (left, right) = new_panels(9, 3.6, 2, share_y=False)
    places = list(range(len(names))) if steps is None else list(steps)
    for color, (name, values) in zip(_COLORS, accuracies.items(), strict=False):
        top1 = [value for value, _, _ in values]
        below = [value - low for value, low, _ in values]
        above = [high - value for value, _, high in values]
        left.errorbar(places, top1, [below, above], fmt="o-", color=color, label=name, capsize=3)
    left.set_ylabel("top-1 and 95 % interval, %")
    right.plot(places, list(rankme), "o-", color=SOFT)
    right.set_ylabel("RankMe")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        if steps is None:
            axes.set_xticks(places, list(names))
        else:
            axes.set_xlabel("optimiser step")
            if len(places) <= _MOST_TICKS:
                axes.set_xticks(places)
        finish(axes, legend=axes is left)
    return to_png(figure)
