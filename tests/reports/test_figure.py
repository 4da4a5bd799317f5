"""Tests of texts in figures: a name is drawn as it is, whatever it contains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib import rc_context

from everest_ds.reports.charts import Bubble, Curve, draw_bubbles, draw_lines, draw_stacks
from everest_ds.reports.confusion import draw_confusion
from everest_ds.reports.figure import new_figure, to_image, to_svg
from everest_ds.reports.plots import draw_accuracies, draw_curves
from everest_ds.reports.tuning_plots import draw_what_if

NAMES = ["$a^$", "cost $5 or $6", r"\alpha_{$\frac$}", r"\$ $x$", "100 % {of} it_s_^", "$$", "two\nlines"]
_ROWS = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
# Each plot with a name from outside in every place that takes one.
PLOTS: dict[str, Callable[[str], object]] = {
    "confusion": lambda name: draw_confusion(np.eye(2, dtype=np.int64), [name, "b"]),
    "curves": lambda name: draw_curves({name: _ROWS, "b": _ROWS}, "loss", name),
    "accuracies": lambda name: draw_accuracies({name: 50.0, "b": 20.0}, 10.0),
    "bubbles": lambda name: draw_bubbles([Bubble(name, name, 10.0, 80.0, 20.0)], []),
    "lines": lambda name: draw_lines([Curve(name, name, [(0, 1), (1, 2)])], name, name, {name: 3.0}),
    "stacks": lambda name: draw_stacks({name: {name: 1.0}}, name),
    "what_if": lambda name: draw_what_if({name: {name: [(8, 100.0), (16, 90.0)]}}),
}


@pytest.mark.parametrize("plot", PLOTS.values(), ids=list(PLOTS))
@pytest.mark.parametrize("name", NAMES[:2])
def test_a_name_that_looks_like_a_formula_is_drawn(plot: Callable[[str], object], name: str) -> None:
    assert plot(name)


@pytest.mark.parametrize("name", [name for name in NAMES if "\n" not in name])
def test_every_text_of_a_figure_is_literal(name: str) -> None:
    with rc_context({"svg.fonttype": "none"}):  # writes texts as texts instead of glyphs
        figure, axes = new_figure(4, 4)
        axes.plot([0, 1], [0, 1], label=name)
        axes.set_title(name)
        axes.set_xlabel(name)
        axes.set_xticks([0, 1], [name, "b"])
        axes.annotate(name, (0.5, 0.5))
        axes.legend(title=name)
        figure.suptitle(name)
        text = to_svg(figure)
        assert text.count(f">{name}<") == 7
        assert to_image(figure).size
