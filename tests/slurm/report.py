"""What each fault cost, as a table: `pytest -m slurm --slurm-report FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FaultTimes:
    """Seconds from a fault to the requeued job and to its first new step; None where nothing restarted."""

    fault: str
    requeued_s: float | None
    training_s: float | None
    steps_lost: int


def to_markdown(rows: Sequence[FaultTimes]) -> str:
    """A table for docs/slurm.md."""
    lines = ["| fault | requeued after | training again after | steps lost |", "|---|--:|--:|--:|"]
    for row in rows:
        lines.append(
            f"| {row.fault} | {_seconds(row.requeued_s)} | {_seconds(row.training_s)} | {row.steps_lost} |"
        )
    return "\n".join(lines) + "\n"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
