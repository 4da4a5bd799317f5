"""The plots of the efficiency report, as SVG: accuracy against compute, and memory and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from everest_ds.reports.figure import new_figure, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, LINE = "#1c2733", "#5b6b7b", "#dfe5eb"
EVEREST, BASELINE = "#d1603d", "#2a6f97"
_OTHERS = ("#6a994e", "#8d6cab", "#b58a4a", "#3f8f8f", "#7d8597")
_STACK = ("#1f4e6b", "#2a6f97", "#61a5c2", "#a9d6e5", "#3f8f8f", EVEREST, "#f0b67f", "#c9d1d9")
_SIZE, _WIDE = (5.8, 3.7), (11.8, 4.7)  # inches: half and full page width, so that font sizes match


@dataclass(frozen=True)
class Bubble:
    """A system in the plot of accuracy against compute.

    Attributes:
        group: name of the group of systems that share a colour.
        label: text next to the bubble.
        gflops: compute of one clip, in GFLOPs.
        top1: accuracy in percent.
        parameters_m: millions of parameters, drawn as the area.
    """

    group: str
    label: str
    gflops: float
    top1: float
    parameters_m: float


@dataclass(frozen=True)
class Curve:
    """A solid or dashed curve in the colour of its group."""

    group: str
    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def draw_bubbles(bubbles: Sequence[Bubble], links: Sequence[tuple[Bubble, Bubble]]) -> str:
    """Draw top-1 accuracy over GFLOPs (logarithmic), with parameters as areas and links as arrows."""
    figure, axes = new_figure(*_WIDE)
    for start, end in links:
        axes.annotate(
            "",
            (end.gflops, end.top1),
            (start.gflops, start.top1),
            arrowprops={"arrowstyle": "->", "color": SOFT, "alpha": 0.7, "shrinkA": 12, "shrinkB": 12},
        )
    colors = group_colors([bubble.group for bubble in bubbles])
    for group, color in colors.items():
        mine = [bubble for bubble in bubbles if bubble.group == group]
        axes.scatter(
            [bubble.gflops for bubble in mine],
            [bubble.top1 for bubble in mine],
            s=[_area(bubble) for bubble in mine],
            color=color,
            alpha=0.75,
            linewidths=1,
            edgecolors="white",
            label=group,
        )
    for bubble in bubbles:
        _annotate(axes, bubble, below=any(_crowds(other, bubble) for other in bubbles))
    axes.set_xscale("log")
    ticks = [base * 10**power for power in range(5) for base in (1, 3)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.margins(0.08, 0.14)
    reach = [bubble.gflops for bubble in bubbles]
    axes.set_xlim(0.6 * min(reach), 1.6 * max(reach))
    axes.set_xlabel("fine-tuning GFLOPs per clip")
    axes.set_ylabel("K400 top-1, % (published)")
    finish(axes, marker_size=45)
    return to_svg(figure)


def draw_lines(
    lines: Sequence[Curve], xlabel: str, ylabel: str, limits: Mapping[str, float] | None = None
) -> str:
    """Draw curves on axes that start at zero, with named horizontal lines such as the memory of devices."""
    figure, axes = new_figure(*_SIZE)
    colors = group_colors([line.group for line in lines])
    for line in lines:
        xs, ys = zip(*line.points, strict=True)
        style = "--" if line.dashed else "-"
        axes.plot(xs, ys, style, color=colors[line.group], label=line.label, linewidth=1.8)
    for name, level in (limits or {}).items():
        axes.axhline(level, color=INK, linewidth=0.9, linestyle=":")
        axes.annotate(
            f"{name}, {level:g}",
            (0.01, level),
            xycoords=("axes fraction", "data"),
            ha="left",
            va="bottom",
            fontsize=8,
        )
    axes.set_ylim(0, 1.25 * max(limits.values()) if limits else None)
    axes.set_xlim(left=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    finish(axes)
    return to_svg(figure)


def draw_stacks(stacks: Mapping[str, Mapping[str, float]], xlabel: str) -> str:
    """Draw one stacked horizontal bar per name; parts have the same colour and order in all bars."""
    figure, axes = new_figure(_SIZE[0], 1.6 + 0.44 * len(stacks))
    names, parts = list(stacks), list(dict.fromkeys(part for stack in stacks.values() for part in stack))
    left = [0.0] * len(names)
    for part, color in zip(parts, _shades(len(parts)), strict=True):
        widths = [stacks[name].get(part, 0.0) for name in names]
        axes.barh(names, widths, left=left, color=color, label=part, height=0.62)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        axes.annotate(
            f"{total:,.1f}", (total, place), (4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.invert_yaxis()
    axes.margins(x=0.09)
    axes.set_xlabel(xlabel)
    finish(axes, grid="x")
    return to_svg(figure)


def group_colors(groups: Sequence[str]) -> dict[str, str]:
    """Assign a colour to each group; the colours of EVEREST and its baseline are fixed."""
    fixed = {"EVEREST": EVEREST, "VideoMAE": BASELINE}
    others = [group for group in dict.fromkeys(groups) if group not in fixed]
    colors = {group: _OTHERS[number % len(_OTHERS)] for number, group in enumerate(others)}
    return {group: fixed.get(group) or colors[group] for group in dict.fromkeys(groups)}


def _crowds(other: Bubble, bubble: Bubble) -> bool:
    """Return whether `other` would overlap the label above `bubble`."""
    near = 0.8 < other.gflops / bubble.gflops < 1.25
    return near and 0 < other.top1 - bubble.top1 < 0.8


def _annotate(axes: Axes, bubble: Bubble, *, below: bool) -> None:
    """Write the label of a bubble above or below it."""
    distance = _area(bubble) ** 0.5 / 2 + 2
    axes.annotate(
        bubble.label,
        (bubble.gflops, bubble.top1),
        (0, -distance if below else distance),
        textcoords="offset points",
        ha="center",
        va="top" if below else "bottom",
        fontsize=8.5,
        color=INK,
    )


def _area(bubble: Bubble) -> float:
    """Return the area of a bubble in square points, with an offset that keeps small systems visible."""
    return 18 + 2.2 * bubble.parameters_m


def _shades(count: int) -> list[str]:
    return [_STACK[number % len(_STACK)] for number in range(count)]


def finish(
    axes: Axes, *, grid: Literal["both", "x"] = "both", marker_size: float | None = None, legend: bool = True
) -> None:
    """Style the frame and grid, and put the legend above the figure with markers of `marker_size`."""
    axes.grid(axis=grid, color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(SOFT)
    axes.tick_params(colors=SOFT, labelcolor=INK, labelsize=9)
    if legend:
        _legend_above(axes, marker_size)


def _legend_above(axes: Axes, marker_size: float | None) -> None:
    """Put the legend above the figure, in at most two rows."""
    figure = axes.get_figure()
    handles, labels = axes.get_legend_handles_labels()
    per_row = len(handles) if len(handles) <= 3 or marker_size else -(-len(handles) // 2)
    shown = figure.legend(  # type: ignore[union-attr]
        handles,
        [label.replace("_", " ") for label in labels],
        loc="outside upper center",
        ncols=per_row,
        frameon=False,
        fontsize=8.5,
        handlelength=1.4,
        columnspacing=1.4,
    )
    for handle in shown.legend_handles if marker_size else ():
        handle.set_sizes([marker_size])  # type: ignore[union-attr]
