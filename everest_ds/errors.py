"""The typed errors that a user can cause, and the exit code of each.

Every message has the same shape: the subject, the given value, the allowed values and the fix. Exit codes are
part of the interface, because schedulers and scripts branch on them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes of `everest-ds` (documented in docs/runs.md)."""

    OK = 0
    FAILURE = 1  # a bug or an unforeseen failure; a traceback is printed
    USAGE = 2  # the command line or the config is wrong
    DATA = 3  # a video, a manifest or a label is missing or damaged
    CHECKPOINT = 4  # a checkpoint is missing, damaged or belongs to another model
    RUN_FOLDER = 5  # the run folder belongs to another config or is in use
    RANK_LOST = 6  # another rank ended; the console shows the first cause
    OUT_OF_MEMORY = 7  # the accelerator's memory is full
    DIVERGED = 8  # the loss is no longer finite
    BAD_NODE = 9  # the preflight found an unfit node and named it
    RESTARTS = 10  # a SLURM job restarted too often, or without progress
    STOPPED = 75  # stopped on request and saved; the same command resumes it (EX_TEMPFAIL of sysexits.h)


class EverestError(Exception):
    """An error that the user can act on: printed as one line, without a traceback.

    Args:
        subject: the fault, naming the file or the config key.
        given: the value that was found.
        allowed: the values that would have been accepted.
        fix: the action that removes the fault.
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
        self.on_every_rank = False  # True: all ranks raise this error, so only one of them reports it


class UsageError(EverestError):
    """The error for a command that cannot be carried out as given, such as one with an unknown option."""

    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """The error for a wrong config key, value or combination of values."""


class DataError(EverestError):
    """The error for a video, manifest or label that is missing, damaged or out of range."""

    exit_code = ExitCode.DATA


class CheckpointError(EverestError):
    """The error for a checkpoint that is missing, incomplete, or saved from another model or set of ranks."""

    exit_code = ExitCode.CHECKPOINT


class RunFolderError(EverestError):
    """The error for a run folder that belongs to another config or to a run that is still active."""

    exit_code = ExitCode.RUN_FOLDER


class RankLostError(EverestError):
    """The error for a rank that ended before the other ranks of its run."""

    exit_code = ExitCode.RANK_LOST


class OutOfMemoryError(EverestError):
    """The error for an accelerator that has run out of memory."""

    exit_code = ExitCode.OUT_OF_MEMORY


class DivergedError(EverestError):
    """The error for a loss that is no longer a finite number."""

    exit_code = ExitCode.DIVERGED


class BadNodeError(EverestError):
    """The error for nodes that cannot take part in the run.

    Args:
        subject: the fault, naming the nodes.
        nodes: the unfit nodes, in SLURM's node-list notation.
        given: the value that was found.
        fix: the action that removes the fault.
    """

    exit_code = ExitCode.BAD_NODE

    # Every field but the subject has a default, because unpickling an error sent by another rank passes its
    # text alone to the constructor.
    def __init__(
        self, subject: str, *, nodes: str = "", given: object = None, fix: str | None = None
    ) -> None:
        super().__init__(subject, given=given, fix=fix)
        self.nodes = nodes


class RestartError(EverestError):
    """The error for a SLURM job that was restarted too often or makes no progress."""

    exit_code = ExitCode.RESTARTS


class StoppedError(EverestError):
    """The error that ends a run which stopped on request, after saving everything.

    Args:
        subject: the text for the user.
        step: the last optimizer step that was completed.
        by: the origin of the stop request, such as a signal or a file.
        fix: the action that resumes the run.
    """

    exit_code = ExitCode.STOPPED

    def __init__(self, subject: str, *, step: int = 0, by: str = "", fix: str | None = None) -> None:
        super().__init__(subject, fix=fix)
        self.on_every_rank = True  # a stop is agreed on by all ranks
        self.step = step
        self.by = by


_MOST_LISTED = 30  # names listed in one error, which must stay readable


def nearest(name: str, valid: Iterable[str], count: int = 3) -> str:
    """Return the valid names closest to `name` as the `allowed` text of an error.

    If no valid name is close or contains `name`, the text lists all valid names, or examples of many.
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    close = close or [other for other in names if name and name in other][:count]
    if close:
        return "did you mean " + " or ".join(close) + "?"
    if len(names) > _MOST_LISTED:
        return f"one of {len(names)} names, such as {', '.join(names[:count])}"
    return f"one of {', '.join(names)}"
