"""Draw the table of `everest-ds jobs`, for docs/jobs.svg: python tools/draw_jobs.py FILE FOLDER..."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console

from everest_ds.cli.jobs import jobs_table
from everest_ds.jobs.job_table import find_runs, in_submission_order, job_rows

WIDTH = 120


def main() -> None:
    """Write the SVG picture of the runs in the given folders."""
    file, *folders = sys.argv[1:]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(jobs_table(in_submission_order(job_rows(find_runs(map(Path, folders)))), WIDTH))
    console.save_svg(file, title="everest-ds jobs")


if __name__ == "__main__":
    main()
