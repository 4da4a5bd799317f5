"""Tests of pages rendered as Markdown."""

from __future__ import annotations

import re

from everest_ds.reports.page import Page, PageSection, Plot, render_page
from everest_ds.reports.page_markdown import render_page_markdown
from everest_ds.reports.tuning_plots import Pair, Place, draw_agreement, draw_front, draw_what_if


def test_tables_plots_and_figures_are_in_both_forms_and_bars_do_not_break_a_table() -> None:
    plot = Plot("speed", "How fast.", "<svg></svg>")
    rows = [{"name": "a|b", "step_s": 1.5}, {"name": "c", "step_s": 2}]
    page = Page("Title", "Lead.", {"best": "a"}, [PageSection("First", "Text.", plots=[plot], rows=rows)])
    text = render_page_markdown(page)
    assert text.startswith("# Title\n\nLead.\n\n| best |\n| --- |\n| a |\n")
    assert "## First\n\nText.\n\n![How fast.](plots/speed.svg)\n\n" in text
    assert text.endswith("| name | step s |\n| --- | --: |\n| a\\|b | 1.5 |\n| c | 2 |\n")
    html = render_page(page)
    assert '<svg role="img" aria-label="How fast."></svg>' in html and "a|b" in html


def test_a_page_fits_a_narrow_screen_and_a_screen_reader() -> None:
    """Every grid may be as narrow as the screen, and only tables scroll, each in a box of its own."""
    plot = Plot("speed", "A `wide` <plot>.", "<svg viewBox='0 0 9 9'><svg></svg></svg>")
    section = PageSection("First", "Keep `a<b` whole.", plots=[plot], rows=[{"name": "a"}])
    html = render_page(Page("Title", "Run `make`.", {"best": "a"}, [section]))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    floors = re.findall(r"minmax\((.*?), 1fr\)", html)
    assert len(floors) == 3 and all(re.fullmatch(r"min\(\d+px, 100%\)", floor) for floor in floors)
    assert html.count("<table>") == len(re.findall(r'<div class="scroll">\s*<table>', html)) == 1
    assert '<th scope="col">name</th>' in html and "<th>" not in html
    assert "Run <code>make</code>." in html and "Keep <code>a&lt;b</code> whole." in html and "`" not in html
    assert html.count('role="img"') == 1 and "A <code>wide</code> &lt;plot&gt;." in html


def test_plots_of_the_tuner_draw_whatever_there_is() -> None:
    one = draw_agreement([Pair("ZeRO-2", 1.0, 1.0)], "step time", "s")
    wide = draw_agreement([Pair("ZeRO-2", 0.001, 0.002), Pair("ZeRO-3", 90.0, 80.0)], "memory", "GiB")
    front = draw_front([Place("best", 2.0, 10.0, True, True), Place("worse", 3.0, 9.0, False, False)], 4.0)
    what_if = draw_what_if(
        {"ZeRO stage": {"1": [(1, 100.0), (2, 90.0)]}, "recompute": {"none": [(2, 100.0)]}}
    )
    for svg in (one, wide, front, what_if):
        assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
