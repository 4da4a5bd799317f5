"""Tests of the CSV files of the commands: they read back, and no cell is a formula."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.console import format_csv, write_csv

_texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@given(st.lists(st.tuples(_texts, _texts, st.floats(allow_nan=False)), min_size=1))
def test_csv_reads_back_whatever_the_cells_say(rows: list[tuple[str, str, float]]) -> None:
    text = format_csv([dict(zip(("video", "class", "loss"), row, strict=True)) for row in rows])
    header, *read = csv.reader(io.StringIO(text, newline=""))
    assert header == ["video", "class", "loss"]
    for (video, label, loss), cells in zip(rows, read, strict=True):
        assert [cell.removeprefix("'") for cell in cells[:2]] == [t.removeprefix("'") for t in (video, label)]
        assert float(cells[2]) == loss
        assert all(cell[:1] not in tuple("=+-@\t\r") for cell in cells[:2])


@pytest.mark.parametrize("start", ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1"])
def test_cells_and_headings_that_look_like_formulas_are_text(tmp_path: Path, start: str) -> None:
    write_csv(tmp_path / "new" / "rows.csv", [{start: start, "loss": -1.5, "top1": None}])
    with open(tmp_path / "new" / "rows.csv", newline="", encoding="utf-8") as stream:
        assert list(csv.reader(stream)) == [[f"'{start}", "loss", "top1"], [f"'{start}", "-1.5", ""]]
