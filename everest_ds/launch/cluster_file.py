"""What a site's settings say to sbatch: slurm/clusters/NAME.env, read by bash as the job itself reads it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from everest_ds.errors import UsageError, nearest

# The file's name is an argument of bash, never part of what it runs.
_PRINT_VARIABLES = 'set -a; source "$1" >&2 && env -0'
_SECONDS = 30.0


def find_cluster_file(name: str, folder: Path) -> Path:
    """A file of `folder` by its name, or any file by its path.

    Raises:
        UsageError: there is none.
    """
    file = Path(name) if "/" in name else folder / f"{name}.env"
    if not file.is_file():
        known = [path.stem for path in folder.glob("*.env")]
        raise UsageError("--cluster", given=repr(name), allowed=f"{nearest(name, known)} or a file's path")
    return file.resolve()


def read_cluster_file(file: Path) -> dict[str, str]:
    """The variables that matter before the job: sbatch's own (SBATCH_...), and which Python to run.

    Raises:
        UsageError: bash cannot read it.
    """
    words = ["bash", "-c", _PRINT_VARIABLES, "bash", str(file)]
    try:
        done = subprocess.run(words, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{file}: cannot be read by bash", given=str(error)) from None
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split())
        raise UsageError(f"{file}: bash cannot read it", given=reason)
    pairs = (os.fsdecode(item).partition("=") for item in done.stdout.split(b"\0") if item)
    return {name: value for name, _, value in pairs if name.startswith("SBATCH_") or name == "EVEREST_PYTHON"}
