"""The signals that ask a run to save and stop, for every process of a run.

Ctrl-C sends SIGINT, schedulers send SIGTERM before a job ends, and SLURM sends SIGUSR1 on --signal=USR1. A
scheduler may send them to the launcher, to the ranks and to the ranks' own child processes at once. Launcher
and ranks note them; a rank's children ignore them, because the rank needs its children until it has saved.
"""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def ignore_stop_signals() -> None:
    """Ignore the stop signals in this process, a child of a rank, which only its rank ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
