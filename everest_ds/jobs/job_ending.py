"""The end of a rank of a SLURM job: recorded in the event log, or an early exit before training starts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from everest_ds.checkpoints.names import newest_step
from everest_ds.errors import BadNodeError, EverestError, ExitCode, RunFolderError, StoppedError
from everest_ds.jobs.requeue import SlurmJob, log_event
from everest_ds.stop_signals import STOP_SIGNALS
from everest_ds.training.run_folder import RunFolder


@contextmanager
def early_stop() -> Iterator[None]:
    """Exit at once, as stopped, on a stop signal that comes while training has no handler of its own."""
    previous = {number: signal.signal(number, _leave) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    print(
        f"everest-ds: stopped by {signal.Signals(number).name} outside training, with nothing to save;"
        " fix: run the same command again",
        file=sys.stderr,
    )
    sys.stderr.flush()
    os._exit(ExitCode.STOPPED)


def _was_deleted(run: Path, absent: str | bytes | int | None) -> bool:
    """Return whether a file is absent because someone deleted its run folder, with the lock of the run."""
    if not isinstance(absent, str | bytes) or RunFolder(run).lock_file.exists():
        return False
    return Path(os.fsdecode(absent)).absolute().is_relative_to(run.absolute())


@contextmanager
def logged_end(job: SlurmJob | None, run: Path, rank: int) -> Iterator[None]:
    """Record in the event log how this rank ended, unless another rank records it; re-raise any error."""
    try:
        yield
    except StoppedError as error:
        if rank == 0:
            log_event(job, run, "stopped", step=error.step, reason=error.by)
        raise
    except EverestError as error:
        if rank == 0 or not (error.on_every_rank or error.exit_code == ExitCode.RANK_LOST):
            nodes = error.nodes if isinstance(error, BadNodeError) else None
            log_event(job, run, "failed", reason=str(error), code=error.exit_code, nodes=nodes)
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and _was_deleted(run, error.filename):
            raise RunFolderError(
                f"{run}: the run folder was deleted while the run was active",
                given=str(error),
                fix="the same command starts the run anew; stop a run before its folder is deleted",
            ) from None
        log_event(job, run, "failed", reason=f"{type(error).__name__}: {error}", code=ExitCode.FAILURE)
        raise
    if rank == 0:
        log_event(job, run, "finished", step=newest_step(run) or None)
