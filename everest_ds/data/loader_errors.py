"""Errors of the loader: reports of failed workers, full shared memory and lost batches."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import traceback
from itertools import takewhile
from multiprocessing.queues import Queue
from typing import NamedTuple, NoReturn

from everest_ds.data.batch_memory import SHARED_MEMORY
from everest_ds.errors import DataError, EverestError
from everest_ds.log import logger
from everest_ds.units import format_bytes

_NO_SPACE = os.strerror(errno.ENOSPC)
_LONGEST = 240  # characters quoted from another error's message
# The signals by which a decoder ends its own process. Any other signal was sent from outside.
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP})


class Failed(NamedTuple):
    """An error that a worker sends to its rank in place of a batch.

    Torch would pass an exception on as an exception of the same type with a traceback as its text, so that a
    RuntimeError in a worker could not be distinguished from torch's own.

    Attributes:
        error: the error to raise in the rank.
        trace: the traceback of an unexpected error; empty otherwise.
    """

    error: EverestError
    trace: str = ""

    def reraise(self) -> NoReturn:
        """Raise the error in the rank, after writing its traceback to the rank's log."""
        if self.trace:
            logger.error("%s", self.trace)
        raise self.error


def failed_item(name: str, error: Exception) -> Failed:
    """Return the message of a worker that failed at the sample `name`; call this in the `except` block."""
    return _failed(f"{name}: a loader worker failed", error)


def failed_join(error: Exception) -> Failed:
    """Return the message of a worker that could not join its clips into a batch."""
    return _failed("a loader worker could not join its clips into a batch", error)


def _failed(subject: str, error: Exception) -> Failed:
    if isinstance(error, EverestError):
        return Failed(error)
    if _is_full(error):
        return Failed(_shared_memory_full(_describe(error)))
    found = DataError(subject, given=_describe(error), fix="see the traceback in this rank's log")
    return Failed(found, traceback.format_exc())


def explain_torch(subject: str, error: Exception) -> EverestError:
    """Return the error to raise when torch's loader itself fails, in its pipes or its pinning thread."""
    if isinstance(error, EverestError):
        return error
    if _is_full(error):
        return _shared_memory_full(_describe(error))
    logger.error("%s", subject, exc_info=error)
    return DataError(
        subject,
        given=_describe(error),
        fix="see the traceback in this rank's log; if too many files are open, raise `ulimit -n`",
    )


def explain_silence(seconds: float, pinning_ended: bool) -> EverestError:
    """Return the error to raise when no batch came although no worker is reading a video."""
    given = "the thread that pins batches ended" if pinning_ended else f"no batch came for {seconds:g} s"
    return DataError(
        "a batch was lost between a loader worker and its rank",
        given=given,
        fix="see the traceback in this rank's output; if too many files are open, raise `ulimit -n`",
    )


def blames_video(exit_code: int) -> bool:
    """Return whether a worker's exit code suggests that the video it was reading crashed it."""
    return exit_code > 0 or -exit_code in _CRASHES


def crash_reason(exit_code: int) -> str:
    """Return the reason that is reported for a video that crashed its worker with this exit code."""
    return f"it crashes the video decoder ({describe_end(exit_code)})"


def full_memory(exit_code: int) -> EverestError | None:
    """Return the error to raise if a worker ended because shared memory is full, or None."""
    if exit_code == -signal.SIGBUS:  # raised by a write to shared memory that is full
        return _shared_memory_full(f"a worker ended with {describe_end(exit_code)}")
    return None


def explain_kills(how: str) -> EverestError:
    """Return the error to raise when workers are killed from outside, one after the other."""
    return DataError(
        "the loader's workers are killed again and again",
        given=how,
        fix="if the machine ran out of memory, lower data.num_workers or batch.micro_batch_size",
    )


def describe_end(exit_code: int) -> str:
    """Return the name of the signal that ended a worker, or its exit code."""
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"


def hush_lost_rank() -> None:
    """Make this worker silent if its rank dies while the worker hands it a batch; call this in the worker.

    A rank that is killed closes its end of the queue shortly before the worker is ended, and the thread that
    fills the queue would print a traceback below the one line that reports the loss.
    """
    report = Queue._on_queue_feeder_error  # type: ignore[attr-defined]

    def report_unless_rank_is_lost(error: Exception, batch: object) -> None:
        if not isinstance(error, ConnectionError):
            report(error, batch)

    Queue._on_queue_feeder_error = staticmethod(report_unless_rank_is_lost)  # type: ignore[attr-defined]


def _is_full(error: Exception) -> bool:
    return _NO_SPACE in str(error)


def _shared_memory_full(detail: str) -> DataError:
    size = format_bytes(shutil.disk_usage(SHARED_MEMORY).total)
    return DataError(
        f"{SHARED_MEMORY} is full, and the loader's workers deliver their batches through it",
        given=f"{detail}; {size} in all",
        fix="enlarge it (docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm), or lower"
        " data.num_workers or batch.micro_batch_size; --dry-run prints how much a run needs",
    )


def _describe(error: Exception) -> str:
    """Return the error's type and message in one line, without the traceback that torch puts before it."""
    lines = str(error).splitlines()
    own = list(takewhile(lambda line: not line.startswith("  "), reversed(lines)))[::-1]
    text = " ".join(" ".join(own).split())
    named = text if len(own) < len(lines) else f"{type(error).__name__}: {text}"
    return named[:_LONGEST]
