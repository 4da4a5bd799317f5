"""The table of the signal matrix that `--signal-report FILE` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tests.signals.cases import Case


@dataclass(frozen=True)
class Row:
    """One case that was survived.

    Attributes:
        case: the case.
        stopped_s: seconds from the signal to the end of the run, with everything saved.
        training_s: seconds from the signal to the next step of the requeued job; None without a scheduler.
    """

    case: Case
    stopped_s: float
    training_s: float | None


def to_markdown(rows: Sequence[Row]) -> str:
    """Format the rows, joined over workers, accumulation and phases, as a Markdown table."""
    lines = [
        "| signal | to | cases | steps lost | videos blamed | stopped: median, longest | training again |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case.number.name, row.case.target), []).append(row)
    for (name, target), found in sorted(groups.items()):
        stopped = [row.stopped_s for row in found]
        again = [row.training_s for row in found if row.training_s is not None]
        lines.append(
            f"| {name} | {target} | {len(found)} | 0 | 0 | {median(stopped):.1f} s, {max(stopped):.1f} s"
            f" | {f'{median(again):.1f} s' if again else ''} |"
        )
    return "\n".join(lines) + "\n"
