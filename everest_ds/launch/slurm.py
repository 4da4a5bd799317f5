"""Calls of SLURM's own commands; arguments go to them as they are, never through a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from everest_ds.errors import UsageError
from everest_ds.launch.sbatch import BatchJob, sbatch_command

_SECONDS = 60.0  # a controller that is busy or restarting answers within that, or not at all


def has_slurm() -> bool:
    """Whether sbatch can be called here."""
    return shutil.which("sbatch") is not None


def submit(job: BatchJob, folder: Path | None = None) -> str:
    """Queue the job, from `folder` instead of the current one if it is given; its id.

    Raises:
        UsageError: sbatch refuses it, in its own words, or is not there.
    """
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: the folder that the job was submitted from is gone")
    output = call(sbatch_command(job), job.environment, folder)
    return output.strip().partition(";")[0]  # "id;cluster" where there are several


def test_only(job: BatchJob) -> str:
    """What `sbatch --test-only` says of when and where the job would start, or why it never could."""
    words = sbatch_command(job)
    done = _run([words[0], "--test-only", *words[1:]], job.environment)
    return " ".join((done.stderr or done.stdout).split())


def call(
    words: Sequence[str], environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> str:
    """Standard output of one command.

    Raises:
        UsageError: it is not there, or refuses, in its own words.
    """
    done = _run(words, environment or {}, folder)
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())
        raise UsageError(f"{words[0]} refuses", given=reason or f"exit code {done.returncode}")
    return done.stdout


def answer(words: Sequence[str]) -> str | None:
    """Standard output of one command; None where it is not there, fails or does not answer."""
    try:
        return call(words)
    except UsageError:
        return None


def _run(
    words: Sequence[str], environment: Mapping[str, str], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words,
            env={**os.environ, **environment},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except FileNotFoundError:
        raise UsageError(
            f"{words[0]} is not installed here", fix="run this on a login node, or add --local to submit"
        ) from None
    except subprocess.TimeoutExpired:
        raise UsageError(f"{words[0]} does not answer", given=f"nothing within {_SECONDS:.0f} s") from None
