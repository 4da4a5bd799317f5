"""Site settings from slurm/clusters/NAME.env, read with bash because the job script sources the same file."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from everest_ds.errors import UsageError, nearest

# The file's name is an argument of bash and not part of the script, so that bash cannot execute the name.
_PRINT_VARIABLES = 'set -a; source "$1" >&2 && env -0'
_SECONDS = 30.0


def find_cluster_file(name: str, folder: Path) -> Path:
    """Find a cluster file by its name in `folder`, or any file by its path.

    Raises:
        UsageError: if there is no such file.
    """
    file = Path(name) if "/" in name else folder / f"{name}.env"
    if not file.is_file():
        known = [path.stem for path in folder.glob("*.env")]
        raise UsageError(
            "--cluster names no settings file",
            given=repr(name),
            allowed=f"{nearest(name, known)} or a file's path",
        )
    return file.resolve()


def read_cluster_file(file: Path) -> dict[str, str]:
    """Return the variables that matter before a job starts: SBATCH_... and EVEREST_PYTHON.

    Raises:
        UsageError: if bash cannot read the file.
    """
    words = ["bash", "-c", _PRINT_VARIABLES, "bash", str(file)]
    try:
        done = subprocess.run(words, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{file}: bash cannot read it", given=str(error)) from None
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split())
        raise UsageError(f"{file}: bash cannot read it", given=reason)
    pairs = (os.fsdecode(item).partition("=") for item in done.stdout.split(b"\0") if item)
    return {name: value for name, _, value in pairs if name.startswith("SBATCH_") or name == "EVEREST_PYTHON"}
