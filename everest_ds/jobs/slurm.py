"""Calls of SLURM's commands, with arguments passed directly and never through a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from everest_ds.errors import UsageError
from everest_ds.jobs.sbatch import BatchJob, sbatch_command

_SECONDS = 60.0  # a busy or restarting controller answers within this time, or not at all


def has_slurm() -> bool:
    """Return whether sbatch is installed on this machine."""
    return shutil.which("sbatch") is not None


def submit_job(job: BatchJob, folder: Path | None = None) -> str:
    """Submit the job from `folder` (None: the current folder), and return its id without waiting for its end.

    Raises:
        UsageError: if the folder is gone, or sbatch is not installed or rejects the job.
    """
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: the folder that the job was submitted from no longer exists")
    output = call(sbatch_command(job), job.environment, folder)
    return output.strip().partition(";")[0]  # sbatch prints "id;cluster" on a site with several clusters


def test_only(job: BatchJob) -> str:
    """Return the answer of `sbatch --test-only`: when and where the job would start, or why it cannot."""
    words = sbatch_command(job)
    done = _run([words[0], "--test-only", *words[1:]], job.environment)
    return " ".join((done.stderr or done.stdout).split())


def call(
    words: Sequence[str], environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> str:
    """Run one command and return its standard output.

    Raises:
        UsageError: if the command is not installed, fails or does not answer; the error quotes its message.
    """
    done = _run(words, environment or {}, folder)
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())
        raise UsageError(f"{words[0]} failed", given=reason or f"exit code {done.returncode}")
    return done.stdout


def answer(words: Sequence[str]) -> str | None:
    """Return the standard output of one command, or None if it is not installed, fails or does not answer."""
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
            # With SBATCH_WAIT, sbatch would return only when the job has ended.
            env={name: v for name, v in {**os.environ, **environment}.items() if name != "SBATCH_WAIT"},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except FileNotFoundError:
        raise UsageError(
            f"{words[0]} is not installed on this machine",
            fix="run this on a login node, or add --local to submit",
        ) from None
    except subprocess.TimeoutExpired:
        raise UsageError(f"{words[0]} did not answer within {_SECONDS:.0f} s") from None
