"""The report of a study: tables, findings and a plot, by pure functions of its rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from everest_ds.reports.figure import to_png
from everest_ds.units import format_duration
from study.protocol import (
    BUSY,
    EVEREST,
    KEEP_RATIO,
    KEEP_RATIOS,
    NOTHING,
    OVERSAMPLINGS,
    PAUSES,
    PAUSES_KEEP_RATIOS,
    PLAIN,
    SELECTIONS,
    SHORT,
)

Rows = Sequence[Mapping[str, Any]]
Shares = Mapping[str, Mapping[float, float]]
FIGURES = {"probe_top1": "linear probe", "top1": "fine-tuning"}
_JUDGES = {"probe_top1": "linear probe", "top1": "the same short fine-tuning"}
LONGER = f"{EVEREST}-{KEEP_RATIO}-compute"
_TOLERANCE = 1.0  # points that fine-tuning on fewer tokens may lose against the dense one
_COLORS = {EVEREST: "#d1603d", "tube": "#2a6f97", "dual": "#6a994e", "random": "#8d6cab", "none": "#1c2733"}
_NAMES = {
    EVEREST: "EVEREST (`rero`)",
    "tube": "VideoMAE (`tube`)",
    "dual": "VideoMAE v2 (`dual`)",
    "random": "random drop (`random`)",
    "none": "dense (`none`)",
    NOTHING: "no pre-training",
}


class Scores(NamedTuple):
    """The values of a figure by seed, in percent or points."""

    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Return the mean over the seeds."""
        return statistics.fmean(self.by_seed.values())

    @property
    def deviation(self) -> float:
        """Return the sample standard deviation over the seeds, or 0 for a single seed."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else 0.0

    def minus(self, other: Scores) -> Scores:
        """Return the differences, seed by seed, for the seeds that both have."""
        common = self.by_seed.keys() & other.by_seed.keys()
        return Scores({seed: self.by_seed[seed] - other.by_seed[seed] for seed in sorted(common)})

    def text(self, sign: str = "") -> str:
        """Return `mean ± deviation`, or a note that there is only one seed."""
        if not self.by_seed:
            return "-"
        spread = f"± {self.deviation:.1f}" if len(self.by_seed) > 1 else "(1 seed)"
        return f"{self.mean:{sign}.1f} {spread}"


def scores(rows: Rows, kind: str, name: str, figure: str = "top1", **wanted: str) -> Scores:
    """Return `figure` of the runs called `name`, from EVEREST's chain unless `wanted` overrides that."""
    wanted = {"pretrained": EVEREST, "budget": "steps", "kind": kind, "name": name, **wanted}
    found = [row for row in rows if figure in row and all(row[k] == value for k, value in wanted.items())]
    return Scores({row["seed"]: row[figure] for row in found})


def render(rows: Rows, num_runs: int, shares: Shares) -> str:
    """Return all tables and findings, as Markdown.

    Args:
        rows: rows of the runs that have ended.
        num_runs: number of runs of the whole study.
        shares: percent of the moving object that ReRo keeps, by kind of data and keep ratio.
    """
    kinds = [kind for kind in (PLAIN, BUSY) if any(row["kind"] == kind for row in rows)]
    lost = [f"- {finding}." for kind in kinds for finding in findings(rows, kind)]
    parts = [
        "### Pre-training: which tokens to learn from",
        table(row for kind in kinds for row in _pretrainings(rows, kind)),
        "### Fine-tuning: how many tokens to keep",
        table(row for kind in kinds for row in _keep_ratios(rows, kind)),
        "Share of the moving object's pixels, over all frames, that ReRo keeps (random drop keeps ρ):",
        table(
            {"data": kind} | {f"ρ {r}": f"{s:.1f} %" for r, s in of.items()} for kind, of in shares.items()
        ),
        "### Frames: IIFS on videos that mostly pause",
        table(_oversamplings(rows)),
        "### Where ReRo does not win",
        "\n".join(lost) or "Nowhere, among the runs that have ended.",
        f"{len(rows)} of {num_runs} runs, {format_duration(sum(row['cpu_s'] for row in rows))} of CPU time.",
    ]
    return "\n\n".join(parts) + "\n"


def findings(rows: Rows, kind: str) -> Iterator[str]:
    """Yield the comparisons that ReRo does not win.

    ReRo wins if it is ahead of another selection in every seed, and within a point of dense on average.
    """
    for budget in ("steps", "compute"):
        for figure, what in FIGURES.items():
            everest = scores(rows, kind, SHORT, figure)
            for other in SELECTIONS[1:]:
                lead = everest.minus(scores(rows, kind, SHORT, figure, pretrained=other, budget=budget))
                where = f"{kind}, pre-training at equal {budget}, {what}"
                yield from _not_ahead(where, lead, _NAMES[other])
    for ratio in KEEP_RATIOS:
        where = f"{kind}, fine-tuning at ρ {ratio}"
        yield from _not_ahead(where, _lead(rows, kind, ratio, f"random-{ratio}"), "random drop")
        loss = _lead(rows, kind, ratio, "dense")
        if loss.by_seed and loss.mean < -_TOLERANCE:
            yield f"{where}: {loss.text('+')} against dense"


def _not_ahead(where: str, lead: Scores, other: str) -> Iterator[str]:
    behind = sum(value <= 0 for value in lead.by_seed.values())
    if behind:
        seeds = f"{behind} of {len(lead.by_seed)} seeds"
        yield f"{where}: not ahead of {other} in {seeds} ({lead.text('+')})"


def _lead(rows: Rows, kind: str, ratio: float, other: str) -> Scores:
    return scores(rows, kind, f"{EVEREST}-{ratio}").minus(scores(rows, kind, other))


def _pretrainings(rows: Rows, kind: str) -> Iterator[dict[str, str]]:
    chains = [(EVEREST, "steps"), *((s, b) for b in ("steps", "compute") for s in SELECTIONS[1:])]
    for selection, budget in [*chains, (NOTHING, "steps")]:
        chain = {"pretrained": selection, "budget": budget}
        yield {
            "data": kind,
            "pre-training": _NAMES[selection],
            "equal": {EVEREST: "both", NOTHING: "-"}.get(selection, budget),
            "GMACs": _gmacs(rows, kind, "pretrain", **chain),
            **dict(_judged(rows, kind, chain)),
        }


def _judged(rows: Rows, kind: str, chain: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for figure, what in FIGURES.items():
        mine = scores(rows, kind, SHORT, figure, **chain)
        lead = scores(rows, kind, SHORT, figure).minus(mine)
        yield f"{what}, top-1", mine.text()
        yield f"{what}, EVEREST ahead", lead.text("+") if chain["pretrained"] != EVEREST else ""


def _keep_ratios(rows: Rows, kind: str) -> Iterator[dict[str, str]]:
    arms: list[tuple[str, str, str | None]] = [("1 (dense)", "dense", None)]
    arms += [(f"{ratio}", f"{EVEREST}-{ratio}", f"random-{ratio}") for ratio in reversed(KEEP_RATIOS)]
    for label, name, other in [*arms, (f"{KEEP_RATIO}, more steps", LONGER, None)]:
        yield _against(rows, kind, label, name, scores(rows, kind, other) if other else Scores({}))
    own, both = scores(rows, kind, f"random-{KEEP_RATIO}", pretrained="random"), f"{EVEREST}-{KEEP_RATIO}"
    yield _against(rows, kind, f"{KEEP_RATIO}, each after its own pre-training", both, own)


def _against(rows: Rows, kind: str, label: str, name: str, drop: Scores) -> dict[str, str]:
    mine, dense = scores(rows, kind, name), scores(rows, kind, "dense")
    return {
        "data": kind,
        "ρ": label,
        "GMACs": _gmacs(rows, kind, name),
        "of dense": _share_of_dense(rows, kind, name),
        "ReRo, top-1": mine.text(),
        "random drop": drop.text(),
        "ReRo - dense": mine.minus(dense).text("+") if name != "dense" else "-",
        "ReRo - random": mine.minus(drop).text("+"),
    }


def _oversamplings(rows: Rows) -> Iterator[dict[str, str]]:
    for ratio in PAUSES_KEEP_RATIOS:
        off = scores(rows, PAUSES, f"iifs-{OVERSAMPLINGS[0]}-{ratio}")
        for alpha in OVERSAMPLINGS:
            mine = scores(rows, PAUSES, f"iifs-{alpha}-{ratio}")
            shown = f"{alpha:g}" if alpha > 1 else "1 (off)"
            lead = mine.minus(off).text("+") if alpha > 1 else "-"
            yield {"ρ": f"{ratio}", "α": shown, "top-1": mine.text(), "against off": lead}


def _gmacs(rows: Rows, kind: str, name: str, **wanted: str) -> str:
    macs = scores(rows, kind, name, "training_macs", **wanted)
    return f"{macs.mean / 1e9:.0f}" if macs.by_seed else "-"


def _share_of_dense(rows: Rows, kind: str, name: str) -> str:
    own, dense = (scores(rows, kind, n, "training_macs") for n in (name, "dense"))
    return f"{own.mean / dense.mean:.2f}" if own.by_seed and dense.by_seed else "-"


def table(rows: Iterable[dict[str, str]]) -> str:
    """Return the rows as a Markdown table, whose columns are those of the first row."""
    shown = list(rows)
    if not shown:
        return ""
    lines = [list(shown[0]), ["---"] * len(shown[0]), *(list(row.values()) for row in shown)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(rows: Rows) -> bytes:
    """Draw accuracy over compute as a PNG: fine-tuning left, pre-training right, a row per kind of data."""
    figure = Figure(figsize=(14, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 2))[0]
    tuned, pretrained = left.subplots(2, 1, squeeze=False), right.subplots(2, 2)
    for number, kind in enumerate((PLAIN, BUSY)):
        _draw_keep_ratios(tuned[number, 0], rows, kind)
        for axes, judge in zip(pretrained[number], FIGURES, strict=True):
            _draw_pretrainings(axes, rows, kind, judge)
    for side, grid in ((left, tuned), (right, pretrained)):
        for axes in grid.flat:
            axes.set_ylabel("test top-1, %")
            axes.grid(alpha=0.3)
        handles, labels = grid[0, -1].get_legend_handles_labels()
        side.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    return to_png(figure)


def _draw_keep_ratios(axes: Axes, rows: Rows, kind: str) -> None:
    axes.set_title(f"{kind}: fine-tuned on ρ {', '.join(map(str, KEEP_RATIOS))}", fontsize=10)
    axes.set_xlabel("compute of fine-tuning, GMACs")
    arms = [("ReRo", EVEREST, "o-", [f"{EVEREST}-{ratio}" for ratio in KEEP_RATIOS])]
    arms += [("random drop", "random", "o-", [f"random-{ratio}" for ratio in KEEP_RATIOS])]
    arms += [(f"ReRo, ρ {KEEP_RATIO}, more steps", EVEREST, "s", [LONGER]), ("dense", "none", "D", ["dense"])]
    for label, selection, style, names in arms:
        points = [(scores(rows, kind, name, "training_macs"), scores(rows, kind, name)) for name in names]
        _draw_points(axes, points, style, label, _COLORS[selection])


def _draw_pretrainings(axes: Axes, rows: Rows, kind: str, judge: str) -> None:
    axes.set_title(f"{kind}: each pre-training, by {_JUDGES[judge]}", fontsize=10)
    axes.set_xlabel("compute of pre-training, GMACs")
    for selection in SELECTIONS:
        chains = [{"pretrained": selection, "budget": budget} for budget in ("compute", "steps")]
        points = [
            (
                scores(rows, kind, "pretrain", "training_macs", **chain),
                scores(rows, kind, SHORT, judge, **chain),
            )
            for chain in chains
        ]
        _draw_points(axes, points, "o--", _NAMES[selection].replace("`", ""), _COLORS[selection])
    scratch = scores(rows, kind, SHORT, judge, pretrained=NOTHING)
    if scratch.by_seed:
        axes.axhline(scratch.mean, linestyle=":", color="black", linewidth=1, label=_NAMES[NOTHING])


def _draw_points(
    axes: Axes, points: Sequence[tuple[Scores, Scores]], style: str, label: str, color: str
) -> None:
    """Draw the measured means over compute, with their deviations as error bars."""
    there = [(macs.mean / 1e9, top1) for macs, top1 in points if macs.by_seed and top1.by_seed]
    x, y = [macs for macs, _ in there], [top1.mean for _, top1 in there]
    axes.errorbar(x, y, [top1.deviation for _, top1 in there], fmt=style, label=label, color=color, capsize=3)
