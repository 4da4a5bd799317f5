"""What can go wrong, typed: every error a user can cause says what, given what, allowed what, do what.

Exit codes are part of the interface: schedulers and scripts branch on them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes of `everest-ds` (documented in docs/runs.md)."""

    OK = 0
    FAILURE = 1  # a bug or an unforeseen failure: comes with a traceback
    USAGE = 2  # command line or config
    DATA = 3  # a video, a manifest, a label
    CHECKPOINT = 4  # missing, damaged, or of another model
    RUN_FOLDER = 5  # of another config, or in use
    RANK_LOST = 6  # another rank ended: the first reason is on the console
    OUT_OF_MEMORY = 7
    DIVERGED = 8  # the loss is no longer finite
    BAD_NODE = 9  # the preflight found a node unfit: it is named
    RESTARTS = 10  # a SLURM job restarted too often, or without progress
    STOPPED = 75  # asked to stop; saved; the same command goes on (EX_TEMPFAIL of sysexits.h)


class EverestError(Exception):
    """An error whose text is for the user: printed as one line, without a traceback.

    Args:
        subject: what is wrong, naming the file or the config key.
        given: what was found there.
        allowed: what would have been right.
        fix: what to do about it.
    """

    exit_code = ExitCode.FAILURE

    def __init__(
        self,
        subject: str,
        *,
        given: object = None,
        allowed: object = None,
        fix: str | None = None,
    ) -> None:
        parts = [subject]
        if given is not None:
            parts.append(f"given: {given}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        if fix is not None:
            parts.append(f"fix: {fix}")
        super().__init__("; ".join(parts))
        self.on_every_rank = False  # raised on all ranks at once: one of them telling it is enough


class UsageError(EverestError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """A config key, value or combination is wrong."""


class DataError(EverestError):
    """A video, a manifest or a label is missing, damaged or out of range."""

    exit_code = ExitCode.DATA


class CheckpointError(EverestError):
    """A checkpoint is missing, incomplete, or belongs to another model or world."""

    exit_code = ExitCode.CHECKPOINT


class RunFolderError(EverestError):
    """A run folder belongs to another config or to a run that is still alive."""

    exit_code = ExitCode.RUN_FOLDER


class RankLostError(EverestError):
    """A rank ended before its peers."""

    exit_code = ExitCode.RANK_LOST


class OutOfMemoryError(EverestError):
    """The accelerator's memory is full."""

    exit_code = ExitCode.OUT_OF_MEMORY


class DivergedError(EverestError):
    """The loss stopped being a finite number."""

    exit_code = ExitCode.DIVERGED


class BadNodeError(EverestError):
    """A node cannot take part in the run.

    Args:
        nodes: SLURM's list of them.
    """

    exit_code = ExitCode.BAD_NODE

    # Defaults, for errors travel between ranks: an unpickled one is made of its text alone.
    def __init__(
        self, subject: str, *, nodes: str = "", given: object = None, fix: str | None = None
    ) -> None:
        super().__init__(subject, given=given, fix=fix)
        self.nodes = nodes


class RestartError(EverestError):
    """A SLURM job was restarted too often, or makes no progress."""

    exit_code = ExitCode.RESTARTS


class StoppedError(EverestError):
    """The run was asked to stop; everything is saved.

    Args:
        step: the last one that was done.
        by: who asked.
    """

    exit_code = ExitCode.STOPPED

    def __init__(self, subject: str, *, step: int = 0, by: str = "", fix: str | None = None) -> None:
        super().__init__(subject, fix=fix)
        self.on_every_rank = True  # all agreed to stop
        self.step = step
        self.by = by


_MOST_LISTED = 24  # names of an error: one line is read, a page is not


def nearest(name: str, valid: Iterable[str], count: int = 3) -> str:
    """The valid names closest to `name`, or the first of all if none is close: for an error's `allowed`."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return "one of " + ", ".join(names[:_MOST_LISTED]) + more
