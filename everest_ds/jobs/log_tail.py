"""The newest lines of a job's logs: of one rank, of all ranks merged by time, or of the job's output."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from everest_ds.errors import UsageError
from everest_ds.jobs.job_table import JobRow
from everest_ds.jobs.slurm_state import query_jobs
from everest_ds.training.run_folder import RunFolder

_POLL_SECONDS = 0.2
_ASK_SLURM_SECONDS = 5.0
_STAMP = len("2026-01-01 00:00:00,000")


@dataclass
class LogTail:
    """Reader of the new lines of all files in a folder that match a pattern, including later files."""

    folder: Path
    pattern: str
    read: dict[Path, int] = field(default_factory=dict)

    @classmethod
    def of_ranks(cls, row: JobRow, rank: int | None) -> LogTail:
        """Return the tail of one rank's log, or of the logs of all ranks if `rank` is None."""
        return cls(row.run / "logs", "rank-*.log" if rank is None else f"rank-{rank}.log")

    @classmethod
    def of_job(cls, row: JobRow) -> LogTail:
        """Return the tail of the output of the job, which its batch script and all ranks write."""
        return cls(row.output.parent, row.output.name)

    def last(self, count: int) -> list[str]:
        """Return the last `count` lines of all files, in order of time, and mark all lines as read."""
        lines = self.new()
        return lines[-count:] if count else []

    def new(self) -> list[str]:
        """Return the complete lines since the last call, sorted by time; label the lines of several files."""
        files = sorted(self.folder.glob(self.pattern))
        label = len(files) > 1
        stamped = [
            (stamp, f"[{file.stem}] {line}" if label else line)
            for file in files
            for stamp, line in self._lines(file)
        ]
        return [line for _, line in sorted(stamped, key=lambda pair: pair[0])]

    def follow(self, row: JobRow) -> Iterator[list[str]]:
        """Yield new lines, possibly none, several times a second until the job has ended."""
        asked = time.monotonic()
        while True:
            yield self.new()
            if time.monotonic() - asked > _ASK_SLURM_SECONDS:
                ended, asked = _has_ended(row), time.monotonic()
                if ended:
                    yield self.new()
                    return
            time.sleep(_POLL_SECONDS)

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


def _has_ended(row: JobRow) -> bool:
    if row.slurm is None:
        return not RunFolder(row.run).is_active
    try:
        state = query_jobs([row.job_id]).get(row.job_id)
    except UsageError:  # while the controller is away, the job may keep running
        return False
    return state is None or state.is_over
