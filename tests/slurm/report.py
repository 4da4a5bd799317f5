"""The table of fault costs that `pytest -m slurm --slurm-report FILE` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FaultTimes:
    """Seconds from a fault to the requeued job and to its first new step; None if the job did not restart."""

    fault: str
    requeued_s: float | None
    training_s: float | None
    steps_lost: int


def to_markdown(rows: Sequence[FaultTimes]) -> str:
    """Format the rows as the Markdown table of docs/slurm.md."""
    lines = ["| fault | requeued after | training again after | steps lost |", "|---|--:|--:|--:|"]
    for row in rows:
        lines.append(
            f"| {row.fault} | {_seconds(row.requeued_s)} | {_seconds(row.training_s)} | {row.steps_lost} |"
        )
    return "\n".join(lines) + "\n"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
