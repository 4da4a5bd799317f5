"""`everest-ds logs`: print the end of a run's logs and follow them, for one rank or for all ranks merged."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everest_ds.cli.jobs import find_rows
from everest_ds.errors import UsageError

if TYPE_CHECKING:
    from everest_ds.jobs.job_table import JobRow

Which = Annotated[str, typer.Argument(metavar="RUN|JOB", help="A run folder or a job number.")]
Rank = Annotated[int, typer.Option(min=0, help="The rank whose log is printed.")]
AllRanks = Annotated[bool, typer.Option("--all", help="Print the logs of all ranks, merged by time.")]
OfJob = Annotated[
    bool, typer.Option("--job", help="Print the output of the job instead of the logs of ranks.")
]
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Print new lines until the job ends or Ctrl-C is pressed.")
]
Lines = Annotated[int, typer.Option("--lines", "-n", min=0, help="Number of last lines to print first.")]

_POLL_SECONDS = 0.2
_ASK_SLURM_SECONDS = 5.0
_STAMP = len("2026-01-01 00:00:00,000")


def logs(
    which: Which,
    rank: Rank = 0,
    all_ranks: AllRanks = False,
    of_job: OfJob = False,
    follow: Follow = False,
    lines: Lines = 20,
) -> None:
    """Print the end of a run's logs. A restarted run appends to the same logs.

    Example: everest-ds logs runs/first -f
    """
    row = find_rows([which])[0]
    pattern = "rank-*.log" if all_ranks else f"rank-{rank}.log"
    tails = Tails(row.output.parent, row.output.name) if of_job else Tails(row.run / "logs", pattern)
    shown = tails.last(lines)
    if not shown and not follow:
        raise UsageError(
            f"{tails.folder / tails.pattern}: no log lines yet", fix="wait for them with -f, or try --job"
        )
    _print(shown)
    if follow:
        _follow(tails, _is_over(row))


def _follow(tails: Tails, is_over: Callable[[], bool]) -> None:
    asked = time.monotonic()
    while True:
        _print(tails.new())
        if time.monotonic() - asked > _ASK_SLURM_SECONDS:
            over, asked = is_over(), time.monotonic()
            if over:
                _print(tails.new())
                return
        time.sleep(_POLL_SECONDS)


def _is_over(row: JobRow) -> Callable[[], bool]:
    from everest_ds.jobs.slurm_state import query_jobs

    def ask() -> bool:
        try:
            state = query_jobs([row.job_id]).get(row.job_id)
        except UsageError:  # while the controller is away, the job may keep running
            return False
        return state is None or state.is_over

    return ask


@dataclass
class Tails:
    """Reader of the new lines of all files in a folder that match a pattern, including later files."""

    folder: Path
    pattern: str
    read: dict[Path, int] = field(default_factory=dict)

    def last(self, count: int) -> list[str]:
        """Return the last `count` lines of all files, in order of time, and mark all lines as read."""
        return self.new()[-count:] if count else self.new()[:0]

    def new(self) -> list[str]:
        """Return the complete lines since the last call by time, labelled if there are several files."""
        files = sorted(self.folder.glob(self.pattern))
        label = len(files) > 1
        stamped = [
            (stamp, f"[{file.stem}] {line}" if label else line)
            for file in files
            for stamp, line in self._lines(file)
        ]
        return [line for _, line in sorted(stamped, key=lambda pair: pair[0])]

    def _lines(self, file: Path) -> Iterator[tuple[str, str]]:
        """Yield (time, line) for each new complete line; a line without a time gets the preceding one."""
        with open(file, "rb") as stream:
            stream.seek(self.read.get(file, 0))
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.read[file] = self.read.get(file, 0) + len(whole)
        stamp = ""
        for line in whole.decode(errors="replace").splitlines():
            stamp = line[:_STAMP] if line[:4].isdigit() else stamp
            yield stamp, line


def _print(lines: list[str]) -> None:
    for line in lines:
        print(line)
    sys.stdout.flush()
