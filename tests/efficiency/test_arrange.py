"""Tests of the efficiency report: its rows are arranged, summarised and rendered."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from everest_ds.efficiency.arrange import Heading, arrange, level_of, summarise
from everest_ds.efficiency.markdown import render_markdown
from everest_ds.efficiency.report_page import render_efficiency_page
from everest_ds.reports.charts import Bubble, Curve, draw_bubbles, draw_lines, draw_stacks
from everest_ds.reports.page import Plot

HEADINGS = {"t": Heading("Title", "Text.", {"gflops": "GFLOPs", "memory_gb": "memory, GB", "top1": "top-1"})}


def row(method: str, column: str, published: Any, value: Any, kind: str = "predicted", note: str = "") -> Any:
    numbers = isinstance(published, int | float) and value is not None
    gap = round(100 * (value - published) / published, 2) if numbers else None
    keys = {"table": "t", "method": method, "backbone": "ViT-B", "column": column}
    return {**keys, "published": published, "value": value, "kind": kind, "gap_pct": gap, "note": note}


ROWS = [
    row("A", "gflops", 35.5, 35.48),
    row("A", "memory_gb", 150.3, 160.0, note="32 clips"),
    row("A", "top1", 73.5, None, "published"),
    row("B", "gflops", None, 21.4957, "counted", "sparse"),
    row("B", "memory_gb", 66.3, 50.0, note="32 clips"),
    row("B", "memory_gb", 66.3, 66.0, "measured", "on <H100>"),
]


@pytest.mark.parametrize(
    ("published", "value", "level"),
    [(35.5, 35.4501, "exact"), (87, 86.53, "exact"), (425.0, 422.2, "close"), (100.0, 114.0, "fair"),
     (100.0, 80.0, "far"), (None, 80.0, ""), ("8m 18s", "9m 00s", "")],
)  # fmt: skip
def test_levels_of_agreement(published: Any, value: Any, level: str) -> None:
    assert level_of(row("A", "gflops", published, value)) == level


def test_lines_hold_every_kind_of_a_cell_and_notes_are_said_once() -> None:
    (grid,) = arrange(ROWS, HEADINGS)
    assert [line.method for line in grid.lines] == ["A", "B"]
    everything = ("published", "ours", "gap")
    assert [column.parts for column in grid.columns] == [everything, everything, ("published",)]
    assert [entry.kind for entry in grid.lines[1].entries["memory_gb"]] == ["predicted", "measured"]
    assert sorted(grid.notes) == ["32 clips", "on <H100>", "sparse"]


def test_a_note_that_all_figures_of_a_column_share_stands_at_its_head() -> None:
    (grid,) = arrange([r for r in ROWS if r["kind"] != "measured"], HEADINGS)
    memory = grid.columns[1]
    assert grid.notes[memory.note - 1] == "32 clips"
    assert all(entry.note == 0 for line in grid.lines for entry in line.entries.get("memory_gb", []))


def test_the_summary_leaves_out_measured_figures_and_derived_percentages() -> None:
    derived = {**row("A", "gflops", 40.0, 40.0), "table": "t_pct"}
    assert summarise([*ROWS, derived]) == {
        "GFLOPs figures equal to the printed digit": "1 of 1",
        "GFLOPs figures within 1 %": "1 of 1",
        "memory figures within 15 %": "1 of 2",
    }


def test_markdown_marks_kinds_gaps_and_notes() -> None:
    text = render_markdown("Report", "Lead.", arrange(ROWS, HEADINGS), [("A plot.", "plots/a.svg")])
    assert "| A | ViT-B | 35.5 / 35.48ᵖ (✓) | 150.3 / 160.00ᵖ (+6.5 %) [1] | 73.5 |" in text
    assert "| B | ViT-B | 21.50ᶜ [2] |" in text
    assert "1. 32 clips" in text and "![A plot.](plots/a.svg)" in text


def test_the_page_is_self_contained_and_escapes_what_it_is_given() -> None:
    plot = Plot("p", "Caption & more", draw_stacks({"A": {"forward": 1.0, "backward": 2.0}}, "ms"))
    page = render_efficiency_page(
        "T", "L", {"x": "1 of 2"}, arrange(ROWS, HEADINGS), [plot], "B", "made here"
    )
    assert "on &lt;H100&gt;" in page and "Caption &amp; more" in page
    assert page.count("<svg") == 1 and "class=own" in page
    assert 'src="' not in page and "<link" not in page and "<script" not in page


def test_plots_are_well_formed_and_repeatable() -> None:
    ours, theirs = Bubble("EVEREST", "ViT-B", 98, 79.2, 87), Bubble("VideoMAE", "ViT-B", 180, 78.4, 87)
    line = Curve("EVEREST", "EVEREST, pre-training", [(4, 1.0), (8, 2.0)], dashed=True)
    for draw in (
        lambda: draw_bubbles([ours, theirs], [(theirs, ours)]),
        lambda: draw_lines([line], "clips", "GiB", {"A6000": 48.0}),
        lambda: draw_stacks({"a": {"x": 1.0}, "b": {"y": 2.0}}, "GiB"),
    ):
        svg = draw()
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert draw() == svg
