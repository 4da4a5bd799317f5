"""The report pages of the tuner: the results of its trials, and the effect of more or fewer GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from everest_ds.errors import UsageError
from everest_ds.output_paths import output_below
from everest_ds.reports.page import Page, PageSection, Plot, render_page
from everest_ds.reports.page_markdown import render_page_markdown
from everest_ds.reports.tuning_plots import Pair, Place, draw_agreement, draw_front, draw_what_if
from everest_ds.tuning.knobs import SCALING_TRAITS, ZERO_STAGE
from everest_ds.tuning.scaling import ScalingRow, payoffs, values_of
from everest_ds.tuning.trials.ranking import RankedCandidate, TrialResults, pareto_front
from everest_ds.units import GIB


def trials_page(
    subject: str, result: TrialResults, memory_bytes: int, dropped: Sequence[Mapping[str, str]], baseline: str
) -> Page:
    """Build the page on the trials of a tuning run: ranking, prediction errors and the speed-memory front.

    Args:
        subject: recipe, ranks and machine, for the lead.
        result: the candidates, ranked again after their trials.
        memory_bytes: usable memory per rank.
        dropped: families that the search left out, with reasons.
        baseline: name of the baseline that the winner is compared with.
    """
    sections = [
        PageSection("Ranking", _ranking_text(result), rows=ranking_rows(result.ranked, memory_bytes)),
        _agreement_section(result),
        _front_section(result, memory_bytes),
        PageSection("Families left out", rows=dropped) if dropped else None,
    ]
    lead = (
        f"{subject}. Measured figures are medians over the steps after warm-up, taken in the real trainer;"
        " they include waiting for data."
    )
    shown = [section for section in sections if section]
    return Page("Tuning: trials", lead, _headline(result, baseline), shown)


def what_if_page(subject: str, rows: Sequence[ScalingRow]) -> Page:
    """Build the page that shows which choices pay off with how many GPUs, from predictions only."""
    panels = {
        trait: {
            value: [
                (row.gpus, 100 * row.by_choice[trait][value] / row.clips_per_s)
                for row in rows
                if value in row.by_choice[trait]
            ]
            for value in values_of(rows, trait)
        }
        for trait in SCALING_TRAITS
    }
    caption = (
        "Speed of the fastest candidate with each choice, in % of the fastest candidate with the same number"
        " of GPUs. A line begins at the smallest number of GPUs on which the choice fits."
    )
    plot = Plot("what_if", caption, draw_what_if(panels), wide=True)
    lead = (
        f"{subject}. Predicted by the cost model; nothing was run. The global batch is the same for all"
        " numbers of GPUs. Speeds leave out waiting for data, which would make all choices look alike."
    )
    return Page(
        "Tuning: what if",
        lead,
        {},
        [
            PageSection(
                "Numbers of GPUs for which each choice pays off", plots=[plot], rows=payoff_rows(rows)
            ),
            PageSection("Fastest candidate for each number of GPUs", rows=what_if_rows(rows)),
        ],
    )


def write_page(folder: Path, name: str, page: Page) -> Path:
    """Write a page as `name`.html and `name`.md, with its plots; return the path of the HTML file.

    Raises:
        UsageError: a file cannot be written.
    """
    plots = {f"plots/{plot.name}.svg": plot.svg for section in page.sections for plot in section.plots}
    files = {f"{name}.html": render_page(page), f"{name}.md": render_page_markdown(page), **plots}
    for file, text in files.items():
        target = output_below(folder, Path(file), ())
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        except OSError as error:
            raise UsageError(f"{folder / file}: cannot be written", given=str(error)) from None
    return folder / f"{name}.html"


def ranking_rows(ranked: Sequence[RankedCandidate], memory_bytes: int) -> list[dict[str, Any]]:
    """Return one human-readable row per candidate, best first."""
    return [
        {
            "rank": number,
            "candidate": one.candidate.name,
            "clips/s": _short(one.clips_per_s),
            "step, s": _short(one.step_s),
            "memory, GiB": _short(one.peak_bytes / GIB),
            "free, %": round(100 * (1 - one.peak_bytes / memory_bytes)),
            "source": "measured" if one.candidate.measured else "predicted",
            "remarks": "; ".join(text for text in (one.refused, one.remarks) if text),
        }
        for number, one in enumerate(ranked, 1)
    ]


def payoff_rows(rows: Sequence[ScalingRow]) -> list[dict[str, Any]]:
    """Return one row per choice: the numbers of GPUs on which it fits, and on which it pays off."""
    return [
        {
            "choice": one.trait,
            "value": one.value,
            "fits": _numbers(one.fits_on),
            "pays off": _numbers(one.pays_on),
        }
        for one in payoffs(rows)
    ]


def what_if_rows(rows: Sequence[ScalingRow]) -> list[dict[str, Any]]:
    """Return one row per number of GPUs: its fastest candidate."""
    alone = rows[0].clips_per_s / rows[0].gpus
    return [
        {
            "GPUs": row.gpus,
            **row.best,
            "clips/s": round(row.clips_per_s),
            "clips/s per GPU": _short(row.clips_per_s / row.gpus),
            "scaling, %": round(100 * row.clips_per_s / row.gpus / alone),
            "waiting for data, % of the step": round(row.data_wait_pct),
        }
        for row in rows
    ]


def _headline(result: TrialResults, baseline: str) -> dict[str, str]:
    winner = result.recommended
    if winner is None:
        return {"recommended": "none: no trial could be measured"}
    figures = {"recommended": winner.candidate.name, "measured": f"{winner.clips_per_s:.4g} clips/s"}
    for one in result.ranked:
        if one.candidate.baseline == baseline and one.candidate.measured and one is not winner:
            figures[f"speed relative to {baseline}"] = f"{winner.clips_per_s / one.clips_per_s:.2f} x"
    figures["median error of predicted time"] = f"{median(map(abs, result.time_errors_pct)):.0f} %"
    figures["median error of predicted memory"] = f"{median(map(abs, result.memory_errors_pct)):.0f} %"
    if result.tau is not None:
        figures["Kendall's tau, predicted against measured order"] = f"{result.tau:.2f}"
    return figures


def _ranking_text(result: TrialResults) -> str:
    first = result.ranked[0] if result.ranked else None
    text = f"Predictions are corrected with the trials: time {result.time}; memory {result.memory}."
    if first and not first.refused and not first.candidate.measured and result.recommended:
        text += (
            f" {first.candidate.name} may be faster than the candidates that ran; more trials would show it."
        )
    return text


def _agreement_section(result: TrialResults) -> PageSection | None:
    ran = [one.candidate for one in result.ranked if one.candidate.measured]
    if not ran:
        return None
    rows, times, peaks = [], [], []
    for one in sorted(ran, key=lambda candidate: candidate.step.step_s):
        trial = one.measured
        assert trial and trial.step_s and trial.peak_bytes
        group = ZERO_STAGE.text(ZERO_STAGE.of(one.config))
        times.append(Pair(group, one.step.step_s, trial.step_s))
        peaks.append(Pair(group, one.needed_bytes / GIB, trial.peak_bytes / GIB))
        rows.append(
            {
                "candidate": one.name,
                **_compared("step, s", times[-1]),
                **_compared("memory, GiB", peaks[-1]),
                "waiting for data, %": round(trial.data_wait_pct or 0),
            }
        )
    plots = [
        Plot(
            "time",
            "Step time; the band marks deviations of up to 20 %.",
            draw_agreement(times, "step time", "s"),
        ),
        Plot("memory", "Peak memory of rank 0.", draw_agreement(peaks, "memory", "GiB")),
    ]
    return PageSection(
        "Predicted against measured", "Predictions are those made before the trials.", plots=plots, rows=rows
    )


def _compared(quantity: str, pair: Pair) -> dict[str, float]:
    name, _, unit = quantity.partition(", ")
    return {
        f"predicted {name}, {unit}": _short(pair.predicted),
        f"measured {name}, {unit}": _short(pair.measured),
        f"{name} error, %": round(100 * (pair.predicted / pair.measured - 1)),
    }


def _short(value: float) -> float:
    """Round a number to three significant digits."""
    return float(f"{value:.3g}")


def _front_section(result: TrialResults, memory_bytes: int) -> PageSection | None:
    front = pareto_front(result.ranked)
    if not front:
        return None
    places = [
        Place(
            one.candidate.name,
            one.peak_bytes / GIB,
            one.clips_per_s,
            bool(one.candidate.measured),
            one in front,
        )
        for one in result.ranked
        if not one.refused
    ]
    caption = (
        "Speed over memory, with corrected predictions. No candidate beats those on the line in both figures."
    )
    plot = Plot("front", caption, draw_front(places, memory_bytes / GIB), wide=True)
    return PageSection("Memory and speed", plots=[plot])


def _numbers(gpus: Sequence[int]) -> str:
    """Abbreviate powers of two as ranges: `(8, 16, 32)` becomes `8-32`."""
    if not gpus:
        return "none"
    spans: list[list[int]] = []
    for count in gpus:
        if spans and count == 2 * spans[-1][-1]:
            spans[-1].append(count)
        else:
            spans.append([count])
    return ", ".join(f"{span[0]:,}" + (f"-{span[-1]:,}" if len(span) > 1 else "") for span in spans)
