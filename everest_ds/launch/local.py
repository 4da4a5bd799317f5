"""The local launcher: starts all ranks on one machine and ends them together, like torchrun on one node."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from everest_ds.errors import ExitCode, RankLostError, UsageError
from everest_ds.launch.environment import LOCALHOST, RankEnvironment, free_port
from everest_ds.stop_signals import STOP_SIGNALS, end_with_parent

EVEREST = (sys.executable, "-m", "everest_ds")

# Time that the other ranks have to end after the first failure. Their connections break within a second, and
# finding the lost ranks takes five; the rest lets rank 0 close its logs and print the reason on a busy node.
# The time is bounded because a rank in a collective call would wait forever.
GRACE_SECONDS = 20.0
# Time from SIGTERM to SIGKILL, enough to flush files. No checkpoint can be saved without the lost ranks.
TERMINATE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_TAIL_LINES = 20
_TAIL_BYTES = 64 * 1024


def launch_local(
    num_ranks: int, argv: Sequence[str], *, log_dir: Path | None, command: Sequence[str] = EVEREST
) -> int:
    """Run `command *argv` as `num_ranks` ranks on this machine, and return one exit code for all of them.

    Rank 0 writes to this terminal. The others write to `log_dir/rank-<N>.out` (in a temporary folder if
    `log_dir` is None); the last lines of that file are shown if that rank is the first to fail. SIGTERM and
    SIGUSR1 are passed on to the ranks, and SIGINT as SIGTERM, because a terminal sends SIGINT to every rank
    itself. No rank outlives this process; on Linux that holds even if this process is killed. Call this
    function in the main thread only, because it installs signal handlers while it runs.

    Returns:
        The exit code of the first rank to fail, or `ExitCode.RANK_LOST` if a signal ended that rank;
        `ExitCode.STOPPED` if a rank stopped on request; otherwise 0.

    Raises:
        UsageError: if `num_ranks` is below 1.
    """
    if num_ranks < 1:
        raise UsageError("the number of ranks is too small", given=num_ranks, allowed="1 or more")
    with contextlib.ExitStack() as stack:
        folder = log_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="everest-ds-")))
        folder.mkdir(parents=True, exist_ok=True)
        group = _Group(folder)
        stack.callback(group.kill)
        stack.enter_context(_signals_noted(group))
        port = free_port()
        for rank in range(num_ranks):
            place = RankEnvironment("local", rank, num_ranks, rank, num_ranks, LOCALHOST, port)
            group.start([*command, *argv], place)
        return group.finish()


def available_cores() -> int:
    """Return the number of CPU cores that taskset, SLURM or a container lets this process use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(num_ranks: int) -> int:
    """Return the number of threads with which each of `num_ranks` ranks on this machine computes."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, available_cores() // num_ranks))


class _Failure(NamedTuple):
    rank: int
    code: int  # in subprocess's convention: -9 for a process ended by SIGKILL


@dataclass
class _Group:
    """The ranks that were started, the signals that stop them, and the failures in the order observed."""

    folder: Path
    ranks: list[subprocess.Popen[bytes]] = field(default_factory=list)
    output_starts: list[int] = field(default_factory=list)
    failures: list[_Failure] = field(default_factory=list)
    received: set[int] = field(default_factory=set)
    to_pass_on: list[int] = field(default_factory=list)

    def start(self, command: Sequence[str], place: RankEnvironment) -> None:
        # By default torch uses every core in each rank, and N ranks then slow each other down.
        threads = threads_per_rank(place.local_world_size)
        # Output is appended, because that of the run being resumed may hold the reason why it ended.
        with open(self.output_file(place.rank) if place.rank else os.devnull, "ab") as output:
            self.output_starts.append(output.tell())
            process = subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), **place.as_variables()},
                stdin=subprocess.DEVNULL,
                stdout=output if place.rank else None,
                stderr=output if place.rank else None,
                preexec_fn=end_with_parent(os.getpid()),
            )
        self.ranks.append(process)

    def output_file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.out"

    def note_signal(self, number: int, frame: FrameType | None) -> None:
        """Record a received signal; `poll` acts on it later, so that the handler itself does nothing else."""
        # A terminal sends SIGINT to the ranks as well, and a second SIGINT would end them without saving.
        passed_on = signal.SIGTERM if number == signal.SIGINT else number
        self.received |= {number, passed_on}
        self.to_pass_on.append(passed_on)

    def poll(self) -> bool:
        """Pass on signals, record new failures, and return whether a rank is still running."""
        while self.to_pass_on:
            self.send(self.to_pass_on.pop(0))
        codes = [process.poll() for process in self.ranks]
        failed = {failure.rank for failure in self.failures}
        # Among ranks that failed within one poll, rank 0 comes last: its reason is already on the console.
        for rank, code in reversed(list(enumerate(codes))):
            if code not in (None, ExitCode.OK, ExitCode.STOPPED) and rank not in failed:
                self.failures.append(_Failure(rank, code))
        return None in codes

    def wait(self, seconds: float, until_failure: bool = False) -> bool:
        """Wait at most `seconds` for all ranks to end, and return whether one is still running."""
        deadline = time.monotonic() + seconds
        while running := self.poll():
            if time.monotonic() > deadline or (until_failure and self.failures):
                break
            time.sleep(_POLL_SECONDS)
        return running

    def send(self, number: int) -> None:
        for process in self.ranks:
            process.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        for process in self.ranks:
            process.wait()

    def finish(self) -> int:
        """Wait for all ranks, end those that hang after a failure, and return the exit code for all."""
        if self.wait(math.inf, until_failure=True):
            _say(f"{_how_it_ended(self.failures[0])}; the other ranks have {GRACE_SECONDS:.0f} s to end")
            self.wait(GRACE_SECONDS)
        failures = list(self.failures)
        self.send(signal.SIGTERM)
        self.wait(TERMINATE_SECONDS)
        self.kill()
        # The first failure with a cause of its own, which is not the loss of another rank.
        own = [failure for failure in failures if failure.code != ExitCode.RANK_LOST]
        stopped = any(process.returncode == ExitCode.STOPPED for process in self.ranks)
        if failures and not own and stopped:
            return ExitCode.STOPPED  # a rank was asked to stop before training, and the others lost it
        if failures:
            return self.report((own or failures)[0])
        return max(process.returncode for process in self.ranks)

    def report(self, failure: _Failure) -> int:
        """Print the reason of a failure unless rank 0 has done so, and return the launcher's exit code."""
        if -failure.code in self.received:
            return ExitCode.STOPPED  # the rank had no signal handler yet, and so nothing to save
        if failure.rank > 0:
            tail = _last_lines(self.output_file(failure.rank), self.output_starts[failure.rank])
            _say("\n".join(f"[rank {failure.rank}] {line}" for line in tail))
        if failure.code > 0:
            return failure.code
        fix = "look for the out-of-memory killer in dmesg" if failure.code == -signal.SIGKILL else None
        _say(str(RankLostError(_how_it_ended(failure), fix=fix)))
        return ExitCode.RANK_LOST


def _how_it_ended(failure: _Failure) -> str:
    if failure.code > 0:
        return f"rank {failure.rank} failed with exit code {failure.code}"
    with contextlib.suppress(ValueError):  # Python has no name for most real-time signals
        return f"rank {failure.rank} was ended by {signal.Signals(-failure.code).name}"
    return f"rank {failure.rank} was ended by signal {-failure.code}"


def _last_lines(file: Path, start: int) -> list[str]:
    """Return the last lines of the file among those written after byte `start`; none if it was deleted."""
    with contextlib.suppress(FileNotFoundError), open(file, "rb") as stream:
        stream.seek(max(start, file.stat().st_size - _TAIL_BYTES))
        return stream.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
    return []


@contextlib.contextmanager
def _signals_noted(group: _Group) -> Iterator[None]:
    """Record stop signals while the block runs, then restore the previous handlers.

    SIGINT gets a handler too instead of SIG_IGN, because the ranks would inherit an ignored signal.
    """
    previous = {number: signal.signal(number, group.note_signal) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
