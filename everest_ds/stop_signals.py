"""The signals that ask a run to save and stop, and the end of child processes with their parent.

Ctrl-C sends SIGINT, schedulers send SIGTERM before a job ends, and SLURM sends SIGUSR1 on --signal=USR1. A
scheduler may send them to the launcher, to the ranks and to the ranks' own child processes at once. Launcher
and ranks note them; a rank's children ignore them, because the rank needs its children until it has saved.
When the parent ends, however it ends, its children end as well.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

from everest_ds.errors import ExitCode

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def ignore_stop_signals() -> None:
    """Ignore the stop signals in this process, a child of a rank, which only its rank ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent(parent: int) -> Callable[[], None] | None:
    """Return a `preexec_fn` with which Linux kills the child when its parent dies; None on other systems."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>

    def ask() -> None:
        libc.prctl(set_parent_death_signal, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != parent:  # the parent died before this call
            os._exit(ExitCode.RANK_LOST)

    return ask
