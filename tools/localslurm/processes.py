"""Helpers that run programs, and that start, find and end background processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path


def run(*command: str, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
    """Run a program and return its standard output.

    If the program fails and `check` is set, this program ends with the message of the failed one.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(environment or {})}, timeout=60
    )
    if check and done.returncode:
        raise SystemExit(f"error: {' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """Start a background program in its own session, and return its process id."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    return process.pid


def read_pid(file: Path) -> int | None:
    """Return the process id in a file, or None if the file is missing or malformed."""
    try:
        return int(file.read_text())
    except (FileNotFoundError, ValueError):
        return None


def end(pid: int | None, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process and wait until the process has ended."""
    if pid is not None and alive(pid):
        os.kill(pid, number)
        wait_until(lambda: not alive(pid), 10, f"process {pid} did not end")


def alive(pid: int) -> bool:
    """Return whether a process is running; a zombie counts as ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def with_environment(*settings: str) -> Iterable[int]:
    """Yield the ids of processes whose environment has all of these NAME=VALUE settings."""
    wanted = [setting.encode() for setting in settings]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if all(setting in found for setting in wanted) and alive(int(folder.name)):
            yield int(folder.name)


def wait_until(ready: Callable[[], bool], seconds: float, complaint: str) -> None:
    """Poll until `ready` returns True, and end this program with `complaint` if that takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise SystemExit(f"error: {complaint} within {seconds:.0f} s")
        time.sleep(0.05)
