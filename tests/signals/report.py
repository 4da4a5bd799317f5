"""The table of the signal matrix that `--signal-report FILE` writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.signals.cases import Case

_HEAD = [
    "| signal | to | cases (with workers) | steps lost | videos accused | resumable"
    " | stopped: median, longest |",
    "|---|---|--:|--:|--:|--:|--:|",
]


@dataclass(frozen=True)
class Row:
    """The effect of one case on a run.

    Attributes:
        case: the case.
        steps_lost: steps that were done but not saved.
        accusations: lines that blame a video, a worker or the memory for the stop.
        resumable: whether the run ended as one to be resumed: exit code 75, or a job that requeued itself.
        stopped_s: seconds from the signal to the end of the run, with everything saved.
    """

    case: Case
    steps_lost: int
    accusations: int
    resumable: bool
    stopped_s: float

    @property
    def harmless(self) -> bool:
        """True if the signal cost nothing."""
        return self.resumable and not self.steps_lost and not self.accusations


class SignalReport:
    """The rows of the table, written to `file` (if it is given) after every case."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._rows: list[Row] = []

    def add(self, row: Row) -> Row:
        """Add a case, write the table, and return the case."""
        self._rows.append(row)
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            slowest = sorted(self._rows, key=lambda row: -row.stopped_s)
            details = [f"- {row.stopped_s:.1f} s: {row.case}" for row in slowest]
            self._file.write_text("\n".join([*to_markdown(self._rows), "", *details, ""]))
        return row


def to_markdown(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a Markdown table that joins workers, accumulation and phases."""
    groups: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.case.number.name, row.case.target].append(row)
    return _HEAD + [
        f"| {name} | {target} | {len(found)} ({sum(row.case.workers > 0 for row in found)})"
        f" | {sum(row.steps_lost for row in found)} | {sum(row.accusations for row in found)}"
        f" | {100 * sum(row.resumable for row in found) / len(found):.0f} %"
        f" | {median(row.stopped_s for row in found):.1f} s, {max(row.stopped_s for row in found):.1f} s |"
        for (name, target), found in sorted(groups.items())
    ]
