"""Tests of the isolated map: an item that crashes or hangs its worker does not affect other items."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from everest_ds.data.maintenance.isolation import Lost, map_isolated


def act(item: str) -> str:
    """Crash, exit, hang or raise as a faulty decoder may, or return the item in upper case."""
    if item == "abort":
        os.abort()
    if item == "exit":
        os._exit(7)
    if item == "hang":
        time.sleep(600)
    if item == "raise":
        raise ValueError("a bug")
    return item.upper()


def test_crashes_and_hangs_are_results_of_their_items_alone() -> None:
    items = ["a", "abort", "b", "hang", "exit", "c", "abort"]
    results = dict(map_isolated(act, items, workers=2, timeout_s=2))
    assert [results[i] for i in range(len(items))] == [
        "A",
        Lost("crashed (SIGABRT)"),
        "B",
        Lost("hung for more than 2 s"),
        Lost("ended with exit code 7"),
        "C",
        Lost("crashed (SIGABRT)"),
    ]


def test_an_exception_is_no_fault_of_an_item() -> None:
    with pytest.raises(ValueError, match="a bug"):
        list(map_isolated(act, ["a", "raise"], workers=1, timeout_s=60))


def test_processes_that_cannot_start_are_not_blamed_on_the_items() -> None:
    script = (
        "from everest_ds.data.maintenance.isolation import map_isolated as m;"
        " print(list(m(abs, [-1], workers=1, timeout_s=9)))"
    )
    # Worker processes cannot import a program that was read from a pipe.
    done = subprocess.run([sys.executable], input=script, capture_output=True, text=True)
    assert done.returncode == 1 and "cannot start on this machine" in done.stderr
