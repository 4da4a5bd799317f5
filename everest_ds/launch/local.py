"""Start the ranks of one machine, and end them together: torchrun's job, without its agent and its noise."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from everest_ds.errors import ExitCode, RankLostError, UsageError
from everest_ds.launch.environment import LOCALHOST, RankEnvironment, free_port

EVEREST = (sys.executable, "-m", "everest_ds")

# After the first failure the other ranks see their connections break within a second, and call the roll for
# five; the rest is for rank 0 to close its logs and print its reason on a node whose cores are taken. No
# longer: a rank in a collective call would wait for ever.
GRACE_SECONDS = 20.0
# From SIGTERM to SIGKILL: time to flush files. A checkpoint cannot be saved any more, its peers are gone.
TERMINATE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_TAIL_LINES = 20
_TAIL_BYTES = 64 * 1024


def launch_local(
    num_ranks: int, argv: Sequence[str], *, log_dir: Path | None, command: Sequence[str] = EVEREST
) -> int:
    """Run `command *argv` as `num_ranks` ranks on this machine, and return the exit code for all of them.

    Rank 0 writes to this terminal; the others to `log_dir/rank-<N>.out` (a temporary folder if None), of
    which the end is shown if that rank is the first to fail. SIGTERM and SIGUSR1 are passed on; SIGINT is
    not, for the terminal sends it to every rank itself. No rank outlives this process, on Linux not even
    when it is killed. Main thread only: signal handlers are installed meanwhile.

    Returns:
        The exit code of the first rank to fail, or `ExitCode.RANK_LOST` if a signal ended that rank;
        `ExitCode.STOPPED` if a rank stopped as asked; otherwise 0.

    Raises:
        UsageError: `num_ranks` is below 1.
    """
    if num_ranks < 1:
        raise UsageError("number of ranks", given=num_ranks, allowed="1 or more")
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
    """CPU cores this process may use: what taskset, SLURM or a container leaves of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(num_ranks: int) -> int:
    """Threads that each of `num_ranks` ranks on this machine computes with."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, available_cores() // num_ranks))


class _Failure(NamedTuple):
    rank: int
    code: int  # as subprocess gives it: -9 is an end by SIGKILL


@dataclass
class _Group:
    """The ranks that were started; what was asked of them; and which failed, in the order it was seen."""

    folder: Path
    ranks: list[subprocess.Popen[bytes]] = field(default_factory=list)
    output_starts: list[int] = field(default_factory=list)
    failures: list[_Failure] = field(default_factory=list)
    asked: set[int] = field(default_factory=set)
    to_pass_on: list[int] = field(default_factory=list)

    def start(self, command: Sequence[str], place: RankEnvironment) -> None:
        # Appended: the output of the run that is being resumed may hold the reason of its end.
        with open(self.output_file(place.rank) if place.rank else os.devnull, "ab") as output:
            self.output_starts.append(output.tell())
            process = subprocess.Popen(
                command,
                env=_rank_variables(place),
                stdin=subprocess.DEVNULL,
                stdout=output if place.rank else None,
                stderr=output if place.rank else None,
                preexec_fn=end_with_parent(os.getpid()),
            )
        self.ranks.append(process)

    def output_file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.out"

    def note_signal(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: `poll` does the rest, so that nothing runs inside the handler."""
        self.asked.add(number)
        if number != signal.SIGINT:
            self.to_pass_on.append(number)

    def poll(self) -> bool:
        """Pass on signals, note new failures; whether a rank still runs."""
        while self.to_pass_on:
            self.send(self.to_pass_on.pop(0))
        codes = [process.poll() for process in self.ranks]
        failed = {failure.rank for failure in self.failures}
        # Of ranks that failed within one poll rank 0 counts last: its reason is on the console already.
        for rank, code in reversed(list(enumerate(codes))):
            if code not in (None, ExitCode.OK, ExitCode.STOPPED) and rank not in failed:
                self.failures.append(_Failure(rank, code))
        return None in codes

    def wait(self, seconds: float, until_failure: bool = False) -> bool:
        """Wait at most `seconds` for all ranks to end; whether one still runs."""
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
        """Wait for all ranks; once one failed, end those that do not end by themselves. The code for all."""
        if self.wait(math.inf, until_failure=True):
            _say(f"{_how_it_ended(self.failures[0])}; the other ranks have {GRACE_SECONDS:.0f} s to end")
            self.wait(GRACE_SECONDS)
        failures = list(self.failures)
        self.send(signal.SIGTERM)
        self.wait(TERMINATE_SECONDS)
        self.kill()
        if failures:
            return self.report(_first_cause(failures))
        return max(process.returncode for process in self.ranks)

    def report(self, failure: _Failure) -> int:
        """Put the reason on the console, unless that rank wrote to it already; the exit code to end with."""
        if -failure.code in self.asked:
            return ExitCode.STOPPED  # it had no handler yet, so it had nothing to save
        if failure.rank > 0:
            tail = _last_lines(self.output_file(failure.rank), self.output_starts[failure.rank])
            _say("\n".join(f"[rank {failure.rank}] {line}" for line in tail))
        if failure.code > 0:
            return failure.code
        fix = "look for the out-of-memory killer in dmesg" if failure.code == -signal.SIGKILL else None
        _say(str(RankLostError(_how_it_ended(failure), fix=fix)))
        return ExitCode.RANK_LOST


def _first_cause(failures: Sequence[_Failure]) -> _Failure:
    """The first rank to fail for a reason of its own, not because another was lost."""
    own = [failure for failure in failures if failure.code != ExitCode.RANK_LOST]
    return (own or failures)[0]


def _how_it_ended(failure: _Failure) -> str:
    if failure.code > 0:
        return f"rank {failure.rank} failed with exit code {failure.code}"
    with contextlib.suppress(ValueError):  # real-time signals have no name
        return f"rank {failure.rank} was ended by {signal.Signals(-failure.code).name}"
    return f"rank {failure.rank} was ended by signal {-failure.code}"


def _last_lines(file: Path, start: int) -> list[str]:
    """The last lines written from byte `start` on."""
    with open(file, "rb") as stream:
        stream.seek(max(start, file.stat().st_size - _TAIL_BYTES))
        return stream.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]


def _rank_variables(place: RankEnvironment) -> dict[str, str]:
    # Each rank's torch takes every core unless told otherwise, and N ranks then stand in each other's way.
    threads = threads_per_rank(place.local_world_size)
    return {**os.environ, "OMP_NUM_THREADS": str(threads), **place.as_variables()}


def end_with_parent(parent: int) -> Callable[[], None] | None:
    """What a child runs before its program: Linux shall kill it when the launcher dies. Elsewhere nothing."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>

    def ask() -> None:
        libc.prctl(set_parent_death_signal, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != parent:  # it died before we asked
            os._exit(ExitCode.RANK_LOST)

    return ask


@contextlib.contextmanager
def _signals_noted(group: _Group) -> Iterator[None]:
    """A handler, not SIG_IGN, for SIGINT: an ignored signal would stay ignored in the ranks."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    previous = {number: signal.signal(number, group.note_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
