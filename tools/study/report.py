"""The report of a study: tables, findings and a plot, by pure functions of its rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from everest_ds.reports.figure import to_png
from everest_ds.units import format_duration
from study.arms import EVEREST, KINDS, PRETRAINED, TUNED, Arm
from study.protocol import BUDGETS, KEEP_RATIO, STEPS

Rows = Sequence[Mapping[str, Any]]
Shares = Mapping[str, Mapping[str, float]]
# 97.5 % quantiles of Student's t by degrees of freedom, from 1.
_T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_ASIDE = 0.003  # share of the compute by which arms of equal compute are drawn apart
_COLORS = {
    EVEREST: "#d1603d",
    "sketch": "#e09f3e",
    "pixel": "#9c2c1c",
    "codec": "#b5179e",
    "camera": "#f72585",
    "rlt": "#2a6f97",
    "random": "#8d6cab",
    "tube": "#5fa8d3",
    "uniform": "#6a994e",
    "oracle": "#1c2733",
    "dense": "#888888",
    "iifs-1.5": "#f4a582",
    "iifs-3": "#67001f",
}


class Scores(NamedTuple):
    """The values of a figure by seed, in percent or points."""

    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Return the mean over the seeds."""
        return statistics.fmean(self.by_seed.values())

    @property
    def half_width(self) -> float:
        """Return half of the 95 % confidence interval of the mean (Student's t); infinite for one seed."""
        count = len(self.by_seed)
        if count < 2:
            return math.inf
        return t_quantile(count - 1) * statistics.stdev(self.by_seed.values()) / math.sqrt(count)

    def minus(self, other: Scores) -> Scores:
        """Return the differences, seed by seed, for the seeds that both have."""
        common = self.by_seed.keys() & other.by_seed.keys()
        return Scores({seed: self.by_seed[seed] - other.by_seed[seed] for seed in sorted(common)})

    def text(self, sign: str = "") -> str:
        """Return `mean ± half-width`, or a note that there is only one seed."""
        if not self.by_seed:
            return "-"
        spread = f"± {self.half_width:.1f}" if len(self.by_seed) > 1 else "(1 seed)"
        return f"{self.mean:{sign}.1f} {spread}"


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t; above 9 degrees of freedom by Fisher's expansion."""
    if freedom <= len(_T_QUANTILES):
        return _T_QUANTILES[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


class Comparison(NamedTuple):
    """A set of arms that differ in one stage.

    Attributes:
        task: the task of its runs.
        stage: name of the stage in sentences.
        arms: its arms by name.
        figure: the figure of a row that judges an arm.
        title: heading of the table and the plots.
    """

    task: str
    stage: str
    arms: Mapping[str, Arm]
    figure: str
    title: str


COMPARISONS = (
    Comparison("finetune", "fine-tuning", TUNED, "top1", f"fine-tuning on {KEEP_RATIO:g} of the tokens"),
    Comparison("pretrain", "pre-training", PRETRAINED, "probe_top1", "pre-training, by a linear probe"),
)


def scores(rows: Rows, figure: str, budget: str | None = None, **wanted: str) -> Scores:
    """Return `figure` by seed of the rows with the `wanted` values, of one budget or of any."""
    found = [
        row
        for row in rows
        if figure in row
        and (budget is None or budget in row["budgets"])
        and all(row[key] == value for key, value in wanted.items())
    ]
    return Scores({row["seed"]: row[figure] for row in found})


def render(rows: Rows, num_runs: int, shares: Shares) -> str:
    """Return the findings and all tables, as Markdown.

    Args:
        rows: rows of the runs that have ended.
        num_runs: number of runs of the whole study.
        shares: percent of the moving object that an arm keeps, by kind of data and name of the arm.
    """
    cpu_s = sum(row["cpu_s"] for row in rows)
    parts = [verdict(rows)]
    for comparison in COMPARISONS:
        lines = [
            dict(_line(rows, comparison, kind, name, shares)) for kind, name in _places(rows, comparison)
        ]
        parts += [f"### {comparison.title.capitalize()}", table(lines)]
    parts.append(f"{len(rows)} of {num_runs} runs, {format_duration(cpu_s)} of CPU time.")
    return "\n\n".join(parts) + "\n"


def verdict(rows: Rows) -> str:
    """Return where ReRo by the embedding loses to another arm, the largest loss first, in one line.

    A loss is clear if the confidence interval of the difference excludes 0.
    """
    behind = sorted(losses(rows), key=lambda loss: loss[0].mean)
    clear, unclear = (
        "; ".join(text for lead, text in behind if (lead.mean + lead.half_width < 0) == is_clear)
        for is_clear in (True, False)
    )
    line = (
        f"**ReRo loses** {clear}."
        if clear
        else "**ReRo clearly loses nowhere**, among the runs that have ended."
    )
    return f"{line} Behind, with an interval that includes 0: {unclear}." if unclear else line


def losses(rows: Rows) -> Iterator[tuple[Scores, str]]:
    """Yield the lead, in points, and a description of each comparison in which ReRo is behind on average."""
    for comparison in COMPARISONS:
        for kind, name in _places(rows, comparison):
            for budget in BUDGETS:
                lead = _lead(rows, comparison, kind, name, budget)
                if lead.by_seed and lead.mean < 0:
                    where = f"on {kind} in {comparison.stage} at equal {budget}"
                    yield lead, f"to {comparison.arms[name].label} {where} ({lead.text('+')})"


def _places(rows: Rows, comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Yield each kind of data and arm of a comparison of which a run has ended."""
    ended = {(row["kind"], row["arm"]) for row in rows if row["task"] == comparison.task and row["budgets"]}
    for kind in KINDS:
        yield from ((kind, name) for name in comparison.arms if (kind, name) in ended)


def _of(rows: Rows, comparison: Comparison, kind: str, name: str, budget: str, figure: str = "") -> Scores:
    wanted = {"kind": kind, "task": comparison.task, "arm": name}
    return scores(rows, figure or comparison.figure, budget, **wanted)


def _lead(rows: Rows, comparison: Comparison, kind: str, name: str, budget: str) -> Scores:
    mine, other = (_of(rows, comparison, kind, each, budget) for each in (EVEREST, name))
    return mine.minus(other)


def _line(
    rows: Rows, comparison: Comparison, kind: str, name: str, shares: Shares
) -> Iterator[tuple[str, str]]:
    """Yield the cells of an arm's line: compute, accuracy and lead of ReRo under both budgets."""
    yield "data", kind
    yield "arm", comparison.arms[name].label
    for budget in BUDGETS:
        macs = _of(rows, comparison, kind, name, budget, "training_macs")
        yield f"equal {budget}: GMACs", f"{macs.mean / 1e9:.0f}" if macs.by_seed else "-"
        yield "top-1" if budget == STEPS else "top-1 ", _of(rows, comparison, kind, name, budget).text()
        lead = "" if name == EVEREST else _lead(rows, comparison, kind, name, budget).text("+")
        yield "ReRo ahead" if budget == STEPS else "ReRo ahead ", lead
    if comparison.task == "finetune":
        share = shares.get(kind, {}).get(name)
        yield "object kept", "-" if share is None else f"{share:.0f} %"


def table(rows: Iterable[dict[str, str]]) -> str:
    """Return the rows as a Markdown table, whose columns are those of the first row."""
    shown = list(rows)
    if not shown:
        return ""
    lines = [list(shown[0]), ["---"] * len(shown[0]), *(list(row.values()) for row in shown)]
    return "\n".join(f"| {' | '.join(cell.strip() for cell in cells)} |" for cells in lines)


def draw(rows: Rows) -> bytes:
    """Draw accuracy over compute with confidence intervals as a PNG: a panel per kind and comparison."""
    panels = [
        (comparison, kind)
        for comparison in COMPARISONS
        for kind in dict.fromkeys(kind for kind, _ in _places(rows, comparison))
    ]
    figure = Figure(figsize=(3.6 * max(1, len(panels)), 5), layout="constrained")
    handles: dict[str, Any] = {}
    for axes, (comparison, kind) in zip(
        figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False
    ):
        handles |= _draw_panel(axes, rows, comparison, kind)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=9)
    return to_png(figure)


def _draw_panel(axes: Axes, rows: Rows, comparison: Comparison, kind: str) -> dict[str, Any]:
    """Draw the arms of a comparison on a kind of data; return the legend's handles by label."""
    axes.set_title(f"{kind}: {comparison.title}", fontsize=9)
    axes.set_xlabel("training compute, GMACs")
    axes.set_ylabel("test top-1, %")
    axes.grid(alpha=0.3)
    handles = {}
    names = [name for place, name in _places(rows, comparison) if place == kind]
    for number, name in enumerate(names):
        points = {}
        for budget in BUDGETS:
            macs, top1 = (
                _of(rows, comparison, kind, name, budget, figure)
                for figure in ("training_macs", comparison.figure)
            )
            if top1.by_seed:
                points[macs.mean / 1e9] = top1
        # Arms of equal compute are drawn side by side.
        x = [gmacs * (1 + _ASIDE * (number - len(names) / 2)) for gmacs in points]
        values = list(points.values())
        half = [top1.half_width if len(top1.by_seed) > 1 else 0.0 for top1 in values]
        style: dict[str, Any] = {"fmt": "o--", "color": _COLORS[name], "capsize": 3, "markersize": 4}
        handles[comparison.arms[name].label] = axes.errorbar(x, [top1.mean for top1 in values], half, **style)
    return handles
