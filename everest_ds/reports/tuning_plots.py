"""The plots of the tuner's report, as SVG: predicted against measured, memory against speed, scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from everest_ds.reports.charts import INK, LINE, SOFT, finish, group_colors
from everest_ds.reports.figure import new_figure, new_panels, to_svg

_SQUARE, _WIDE = (5.8, 4.4), (11.8, 4.6)  # inches: half and full page width
_MOST_LABELS = 8  # candidates on the front that are labelled, spread evenly
_BAND = 0.2  # relative error up to which a prediction counts as good
_MARKERS = "osD^vP*X"
# Tick positions within a decade, from coarse to fine.
_STEPS = ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9))


@dataclass(frozen=True)
class Pair:
    """The predicted and the measured figure of one trial, in the same unit."""

    group: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class Place:
    """A candidate in the plot of speed over memory.

    Attributes:
        label: text next to the point.
        memory_gib: peak memory per rank, in GiB.
        clips_per_s: clips per second of all ranks.
        measured: whether both figures are measured; otherwise they are predicted.
        on_front: whether the candidate is on the Pareto front.
    """

    label: str
    memory_gib: float
    clips_per_s: float
    measured: bool
    on_front: bool


def draw_agreement(pairs: Sequence[Pair], quantity: str, unit: str) -> str:
    """Draw measured over predicted figures on equal logarithmic axes, with a band of ±20 %."""
    figure, axes = new_figure(*_SQUARE)
    values = [value for pair in pairs for value in (pair.predicted, pair.measured)]
    ends = (0.8 * min(values), 1.25 * max(values))
    axes.fill_between(
        ends, [(1 - _BAND) * x for x in ends], [(1 + _BAND) * x for x in ends], color=LINE, alpha=0.6
    )
    axes.plot(ends, ends, color=SOFT, linewidth=1)
    for number, (group, color) in enumerate(group_colors(sorted({pair.group for pair in pairs})).items()):
        mine = [pair for pair in pairs if pair.group == group]
        axes.scatter(
            [pair.predicted for pair in mine],
            [pair.measured for pair in mine],
            s=38,
            color=color,
            marker=_MARKERS[number % len(_MARKERS)],
            edgecolors="white",
            linewidths=0.8,
            label=group,
            zorder=3,
        )
    ticks = _ticks(*ends)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"predicted {quantity}, {unit}")
    axes.set_ylabel(f"measured {quantity}, {unit}")
    finish(axes)
    return to_svg(figure)


def draw_front(places: Sequence[Place], limit_gib: float) -> str:
    """Draw speed over memory per rank, with the Pareto front and the device's memory."""
    figure, axes = new_figure(*_WIDE)
    for measured, color, label in ((False, "#a9bcd0", "predicted"), (True, "#d1603d", "measured")):
        mine = [place for place in places if place.measured == measured]
        xs, ys = [place.memory_gib for place in mine], [place.clips_per_s for place in mine]
        axes.scatter(xs, ys, s=34, color=color, label=label, edgecolors="white", linewidths=0.7, zorder=3)
    front = sorted((place for place in places if place.on_front), key=lambda place: place.memory_gib)
    xs, ys = [place.memory_gib for place in front], [place.clips_per_s for place in front]
    axes.step(xs, ys, where="post", color="#2a6f97", linewidth=1.4, label="front")
    stride = max(1, -(-len(front) // _MOST_LABELS))
    for place in front[::-1][::stride]:  # the fastest candidate always has a label
        axes.annotate(
            place.label,
            (place.memory_gib, place.clips_per_s),
            (6, -4),
            textcoords="offset points",
            fontsize=8,
            color=INK,
            va="top",
        )
    if limit_gib < 1.25 * max(place.memory_gib for place in places):
        axes.axvline(
            limit_gib, color=INK, linewidth=0.9, linestyle=":", label=f"limit of {limit_gib:.3g} GiB per rank"
        )
    reach = [place.memory_gib for place in places]
    axes.set_xlim(0.0 if min(reach) < max(reach) / 2 else 0.9 * min(reach), 1.25 * max(reach))
    axes.margins(y=0.1)
    axes.set_xlabel("peak memory per rank, GiB")
    axes.set_ylabel("clips/s, all ranks together")
    finish(axes)
    return to_svg(figure)


def draw_what_if(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> str:
    """Draw, for each value of a trait, the speed of the best candidate over the number of GPUs.

    Args:
        panels: trait -> value -> (GPUs, percent of the fastest candidate's speed); one panel per trait.
    """
    figure, all_axes = new_panels(11.8, 4.4, len(panels))
    gpus = sorted({count for lines in panels.values() for points in lines.values() for count, _ in points})
    for axes, (trait, lines) in zip(all_axes, panels.items(), strict=True):
        for number, (value, color) in enumerate(group_colors(list(lines)).items()):
            xs, ys = zip(*lines[value], strict=True)
            marker = _MARKERS[number % len(_MARKERS)]
            axes.plot(xs, ys, color=color, label=value, linewidth=1.6, marker=marker, markersize=4.5)
        axes.set_xscale("log", base=2)
        axes.set_xticks(gpus, [f"{count:,}" for count in gpus], rotation=45)
        axes.set_ylim(0, 104)
        axes.set_title(trait, fontsize=10, color=INK)
        axes.set_xlabel("GPUs")
        axes.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=3)
        finish(axes, legend=False)
    all_axes[0].set_ylabel("% of the fastest candidate's clips/s (predicted)")
    return to_svg(figure)


def _ticks(low: float, high: float) -> list[float]:
    """Return round tick values from `low` to `high`, at least four if the finest steps allow it."""
    ticks: list[float] = []
    for steps in _STEPS:
        values = [step * 10.0**power for power in range(-6, 9) for step in steps]
        ticks = [float(f"{value:.3g}") for value in values if low <= value <= high]
        if len(ticks) >= 4:
            break
    return ticks
