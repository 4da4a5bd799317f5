"""Starting programs that stay, finding and ending them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path


def run(*command: str, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
    """Run a program to its end; its output. Ends ours with its message if it fails and `check` is set."""
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(environment or {})}, timeout=60
    )
    if check and done.returncode:
        raise SystemExit(f"error: {' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """Start a program in a session of its own; its process id."""
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
    try:
        return int(file.read_text())
    except (FileNotFoundError, ValueError):
        return None


def end(pid: int | None, number: int = signal.SIGKILL) -> None:
    """Signal a process and wait until it is gone."""
    if pid is not None and alive(pid):
        os.kill(pid, number)
        wait_until(lambda: not alive(pid), 10, f"process {pid} did not end")


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def with_environment(*settings: str) -> Iterable[int]:
    """Processes that were started with all of these NAME=VALUE settings."""
    wanted = [setting.encode() for setting in settings]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if all(setting in found for setting in wanted) and alive(int(folder.name)):
            yield int(folder.name)


def wait_until(ready: Callable[[], bool], seconds: float, complaint: str) -> None:
    """Poll; ends the program if it takes longer."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise SystemExit(f"error: {complaint} in {seconds:.0f} s")
        time.sleep(0.05)
