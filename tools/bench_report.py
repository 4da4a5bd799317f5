"""Tables of a step benchmark, with one column per contender."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from everest_ds.console import print_facts, print_table
from everest_ds.units import format_bytes

_PRODUCT_ROWS = 12
_ONE_DECIMAL_FROM = 100


def print_report(result: Mapping[str, Any]) -> None:
    """Print all results of `bench_step.py`."""
    print_facts("Benchmark", result["environment"])
    _print_columns("Step (medians; measured)", result["contenders"])
    if result["resident_peak_bytes"]:
        peak = format_bytes(result["resident_peak_bytes"])
        print(f"Peak resident memory of the process with all contenders: {peak}\n")
    if result["ratios"]:
        print_table("Ratios to our engine (quartiles over the ratios of all rounds)", result["ratios"])
    if result["rates"]:
        _print_columns(
            "Limit: the step's matrix products, each timed alone (best of several calls)", result["rates"]
        )
        for rates in result["rates"]:
            rows = [_in_ms(row) for row in rates["products"][:_PRODUCT_ROWS]]
            print_table(f"Largest products of {rates['contender']}", rows)
    if result["profile"]:
        print_table("Time of a step of our engine, by operator", result["profile"])


def _in_ms(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "product": row["product"],
        "dtype": row["dtype"],
        "count": row["count"],
        "GFLOP/s": round(row["gflops"], 1),
        "ms each": 1e3 * row["seconds_each"],
        "ms in all": 1e3 * row["in_all_s"],
    }


def _print_columns(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print each row as a column, because there are more quantities than contenders."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["contender"], justify="right", no_wrap=True)
    for name in rows[0]:
        if name != "contender" and any(_is_shown(row[name]) for row in rows):
            table.add_row(name.replace("_", " "), *(_cell(name, row[name]) for row in rows))
    Console().print(table)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= _ONE_DECIMAL_FROM else f"{value:.2f}"
    return str(value)


def _is_shown(value: Any) -> bool:
    """Return whether a value can be shown; rows that no contender has a value for are left out."""
    return value is not None and not isinstance(value, list)
