"""The folder of a run: everything needed to understand, resume or repeat it, and a lock while it lives.

config.yaml  ds_config.json  environment.json  excluded.json   what was asked, resolved; with what versions
metrics.jsonl  broken.jsonl  tensorboard/  logs/               what happened
checkpoints/  best.safetensors                  what was learned
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from everest_ds.checkpoints.names import BEST_WEIGHTS_FILE
from everest_ds.config import Experiment, dump_experiment, flatten, load_experiment
from everest_ds.errors import EverestError, RunFolderError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
# Settings that may differ when a run goes on: they do not change what is computed. Of the batch, only the
# global size does, which checkpoints remember.
FREE_KEYS = (
    *("run.dir", "run.log_", "run.save_", "run.keep_", "run.image_", "run.hang_"),
    *("data.num_workers", "data.decoder", "data.pack_tokens", "data.read_timeout_s", "data.max_broken_pct"),
    *("parallelism.", "recompute.", "batch.", "model.compile"),
)
_PACKAGES = ("everest-ds", "torch", "deepspeed", "fairscale", "decord", "numpy")


class RunFolder:
    """A run's folder, opened for writing by rank 0; other ranks only ask it for paths."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        """Where `step-...` checkpoints are."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: training steps and validations."""
        return self.path / METRICS_FILE

    @property
    def broken(self) -> Path:
        """One JSON object a line: videos that could not be read, and when."""
        return self.path / "broken.jsonl"

    @property
    def excluded(self) -> Path:
        """Name -> reason: the training samples that this run leaves out from its beginning to its end."""
        return self.path / "excluded.json"

    @property
    def logs(self) -> Path:
        """One log file per rank."""
        return self.path / "logs"

    def stacks(self, rank: int) -> Path:
        """Where a rank's stacks go if it hangs."""
        return self.logs / f"rank-{rank}.stacks"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def best_weights(self) -> Path:
        """Weights of the best validation so far (fine-tuning)."""
        return self.path / BEST_WEIGHTS_FILE

    def open(self, config: Experiment, ds_config: dict[str, Any], world_size: int) -> None:
        """Claim the folder for this run and write down what it is.

        Raises:
            RunFolderError: if another live run holds it, it belongs to another config, or it cannot be
                written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim()
            self.check_same_config(config)
            (self.path / CONFIG_FILE).write_text(dump_experiment(config))
            _write_json(self.path / "ds_config.json", ds_config)
            _write_json(self.path / "environment.json", describe_environment(world_size))
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: cannot write the run folder", given=str(error), fix="choose another run.dir"
            ) from None

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def drop_metrics_after(self, step: int) -> None:
        """Forget rows of steps that a resumed run will do again."""
        if self.metrics.is_file():
            rows = [row for row in read_metrics(self.path) if row["step"] <= step]
            shorter = self.metrics.with_name(f".{METRICS_FILE}.tmp")
            shorter.write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.replace(shorter, self.metrics)

    def _claim(self) -> None:
        """Hold a lock that the operating system drops with the process, however it ends.

        A record lock, which forked children do not hold with it: loader workers outlive a killed rank for
        some seconds, in which the next start would be refused.
        """
        lock = open(self.path / ".lock", "a+")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # either, says POSIX
            lock.seek(0)
            raise RunFolderError(
                f"{self.path}: a run is live in this folder",
                given=lock.read().strip(),
                fix="wait for it, stop it, or choose another run.dir",
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock

    def check_same_config(self, config: Experiment) -> None:
        """Whether `config` may go on in this folder.

        Raises:
            RunFolderError: if it belongs to another config.
        """
        file = self.path / CONFIG_FILE
        if not file.is_file():
            return
        try:
            before = load_experiment(file)
        except EverestError as error:
            raise RunFolderError(f"{self.path}: holds another version's run", given=str(error)) from None
        changed = _differences(before, config)
        if changed:
            raise RunFolderError(
                f"{self.path}: belongs to a run with another config",
                given=", ".join(f"{key}={new} (there {old})" for key, old, new in changed[:4]),
                allowed="the same config (parallelism, batch, recompute, model.compile and run.* may differ)",
                fix="choose another run.dir, or remove the folder to start over",
            )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics; a last line cut off by a crash is left out.

    Raises:
        RunFolderError: if the run has none, or a line is damaged.
    """
    file = run / METRICS_FILE
    if not file.is_file():
        raise RunFolderError(f"{run}: no {METRICS_FILE}", fix="give the folder of a run that has trained")
    lines = file.read_text().split("\n")
    complete = lines[:-1]
    try:
        return [json.loads(line) for line in complete]
    except ValueError as error:
        raise RunFolderError(f"{file}: damaged", given=str(error)) from None


def describe_environment(world_size: int) -> dict[str, Any]:
    """Versions, commit, command and place of a run."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "host": socket.gethostname(),
        "world_size": world_size,
        "python": platform.python_version(),
        "packages": package_versions(),
        "git": _git_state(),
    }


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that results depend on; None for one that is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def _differences(before: Experiment, now: Experiment) -> list[tuple[str, Any, Any]]:
    old, new = (dict(flatten(c.model_dump(mode="json"))) for c in (before, now))
    keys = [key for key in new if not key.startswith(FREE_KEYS)]
    return [(key, old.get(key), new[key]) for key in keys if old.get(key) != new[key]]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether it has uncommitted changes; None outside a checkout."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
