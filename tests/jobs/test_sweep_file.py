"""Tests of a sweep's candidates: they are read back as written, and an error names a malformed line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everest_ds.errors import UsageError
from everest_ds.jobs.sweep_file import (
    SweepCandidate,
    check_candidate_name,
    expand_array,
    expand_grid,
    read_candidates,
    read_settings,
    split_values,
    write_candidates,
)

WORDS = st.lists(st.text(), max_size=3).map(tuple)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.builds(SweepCandidate, st.text(), st.text(), st.text(), WORDS, WORDS), max_size=4))
def test_candidates_come_back_as_they_were_written(tmp_path: Path, candidates: list[SweepCandidate]) -> None:
    write_candidates(tmp_path / "sweep.jsonl", candidates)
    assert read_candidates(tmp_path / "sweep.jsonl") == candidates


def test_a_grid_is_every_combination_in_order() -> None:
    assert expand_grid(["a=1,2", "b.c=x"]) == [("a=1", "b.c=x"), ("a=2", "b.c=x")]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-3,2", ["1e-3", "2"]),
        ("[0.9,0.95],[0.9,0.99]", ["[0.9,0.95]", "[0.9,0.99]"]),
        ("{a: 1, b: 2},3", ["{a: 1, b: 2}", "3"]),
        ("'a,b',\"c]\",d", ["'a,b'", '"c]"', "d"]),
        ("", [""]),
    ],
)
def test_commas_within_a_value_do_not_split_it(text: str, values: list[str]) -> None:
    assert split_values(text) == values


@pytest.mark.parametrize("axes", [["a"], ["=1"], ["a=1", "a=2"]])
def test_an_axis_without_a_key_or_said_twice_is_refused(axes: list[str]) -> None:
    with pytest.raises(UsageError, match="--grid"):
        expand_grid(axes)


@pytest.mark.parametrize(
    ("spec", "tasks"), [("0", [0]), ("0-3", [0, 1, 2, 3]), ("0-6:3,1%2", [0, 3, 6, 1]), ("7%1", [7])]
)
def test_array_specifications_are_sbatchs(spec: str, tasks: list[int]) -> None:
    assert expand_array(spec, 8) == tasks


@pytest.mark.parametrize("spec", ["8", "0-8", "3-1", "", "a", "0-3:0", "-1", "0,,1"])
def test_a_task_without_a_candidate_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="--array"):
        expand_array(spec, 8)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", 3])
def test_a_name_that_is_no_folders_is_refused(name: object) -> None:
    with pytest.raises(UsageError, match="name of a candidate"):
        check_candidate_name(name)


def test_overrides_may_be_a_list_or_a_mapping(tmp_path: Path) -> None:
    rows = [{"name": "wide", "overrides": ["a.b=1"]}, {"overrides": {"a.b": [1, 2], "c": None}}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    assert read_settings(tmp_path / "c.jsonl") == [("wide", ("a.b=1",)), (None, ("a.b=[1, 2]", "c=null"))]


@pytest.mark.parametrize("line", ["{", "[]", '{"name": "a"}', '{"overrides": [1]}', '{"overrides": 1}', "3"])
def test_a_line_that_is_no_candidate_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "c.jsonl").write_text('{"overrides": []}\n' + line + "\n")
    with pytest.raises(UsageError, match=r"c\.jsonl:2: not a candidate"):
        read_settings(tmp_path / "c.jsonl")
