"""Errors of the loader: how a failed worker, full shared memory or a lost batch is reported."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import traceback
from itertools import takewhile
from typing import NamedTuple, NoReturn

from everest_ds.errors import DataError, EverestError
from everest_ds.log import logger
from everest_ds.units import format_bytes

_SHARED_MEMORY = "/dev/shm"
_NO_SPACE = os.strerror(errno.ENOSPC)
_LONGEST = 240  # characters of another error's text


class Failed(NamedTuple):
    """An error on its way from a worker to its rank, in the place of a batch.

    Torch would hand an exception over as the text of a traceback, in an exception of the same type: a
    RuntimeError of a worker could not be told from torch's own.

    Attributes:
        trace: the traceback of an error that nobody foresaw.
    """

    error: EverestError
    trace: str = ""

    def reraise(self) -> NoReturn:
        """Raise the error in the rank; its traceback goes to the rank's log."""
        if self.trace:
            logger.error("%s", self.trace)
        raise self.error


def failed_item(name: str, error: Exception) -> Failed:
    """Return what a worker sends if it fails at the sample `name`. Call it where `error` is handled."""
    return _failed(f"{name}: a loader worker failed", error)


def failed_join(error: Exception) -> Failed:
    """Return what a worker sends if it cannot make one batch of its clips."""
    return _failed("a loader worker could not make a batch of its clips", error)


def _failed(subject: str, error: Exception) -> Failed:
    if isinstance(error, EverestError):
        return Failed(error)
    if _is_full(error):
        return Failed(_shared_memory_full(_describe(error)))
    found = DataError(subject, given=_describe(error), fix="see the traceback in this rank's log")
    return Failed(found, traceback.format_exc())


def explain_torch(subject: str, error: Exception) -> EverestError:
    """Return the error to raise for one of torch's loader itself: of its pipes, or of the pinning thread."""
    if isinstance(error, EverestError):
        return error
    if _is_full(error):
        return _shared_memory_full(_describe(error))
    logger.error("%s", subject, exc_info=error)
    return DataError(
        subject,
        given=_describe(error),
        fix="see the traceback in this rank's log; where too many files are open, raise `ulimit -n`",
    )


def explain_silence(seconds: float, pinning_ended: bool) -> EverestError:
    """Return the error to raise where no batch came and no worker is reading a video."""
    given = "the thread that pins batches ended" if pinning_ended else f"nothing came for {seconds:g} s"
    return DataError(
        "a batch was lost between a loader worker and its rank",
        given=given,
        fix="see the traceback in this rank's output; where too many files are open, raise `ulimit -n`",
    )


def blames_video(exit_code: int) -> bool:
    """Whether a worker that ended so may have been ended by the video that it was reading."""
    return exit_code not in (-signal.SIGBUS, -signal.SIGKILL)


def crash_reason(exit_code: int) -> str:
    """Return why a video counts as unreadable whose worker ended so."""
    return f"it crashes the video decoder ({_end(exit_code)})"


def explain_death(exit_code: int) -> EverestError:
    """Return the error to raise for a worker that no video ended."""
    if exit_code == -signal.SIGBUS:  # it wrote to a page of a batch that shared memory had no room for
        return _shared_memory_full(f"a worker ended with {_end(exit_code)}")
    return DataError(
        "a loader worker was killed",
        given=_end(exit_code),
        fix="if the machine ran out of memory, lower data.num_workers or batch.micro_batch_size",
    )


def _end(exit_code: int) -> str:
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"


def _is_full(error: Exception) -> bool:
    return _NO_SPACE in str(error)


def _shared_memory_full(detail: str) -> DataError:
    size = format_bytes(shutil.disk_usage(_SHARED_MEMORY).total)
    return DataError(
        f"{_SHARED_MEMORY} is full: the loader's workers hand over their batches there",
        given=f"{detail}; {size} in all",
        fix="give it more (docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm), or lower"
        " data.num_workers or batch.micro_batch_size; --dry-run says how much a run needs",
    )


def _describe(error: Exception) -> str:
    """Return the error's type and own text in one line, without the traceback that torch puts before it."""
    lines = str(error).splitlines()
    own = list(takewhile(lambda line: not line.startswith("  "), reversed(lines)))[::-1]
    text = " ".join(" ".join(own).split())
    named = text if len(own) < len(lines) else f"{type(error).__name__}: {text}"
    return named[:_LONGEST]
