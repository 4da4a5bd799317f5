"""The folder of a run: all files needed to understand, resume or repeat it, and a lock while it is active.

config.yaml  ds_config.json  environment.json  excluded.json   inputs: settings, versions, excluded samples
metrics.jsonl  broken.jsonl  tensorboard/  logs/               record of the run
checkpoints/  best.safetensors                                 trained weights and optimiser states
evaluation.json  confusion.png                                 result of the test
"""

from __future__ import annotations

import fcntl
import os
import platform
import socket
import struct
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from everest_ds.checkpoints.names import BEST_WEIGHTS_FILE, list_checkpoints
from everest_ds.config import Experiment, dump_experiment, flatten, load_experiment
from everest_ds.durable_files import read_json_rows, replace_file, replace_json, replace_rows
from everest_ds.errors import EverestError, RunFolderError
from everest_ds.launch.doctor import installed_version

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.json"
# Prefixes of the settings that may differ when a run is resumed, because they do not change the result. The
# exception is the global batch size, which is checked against the checkpoint.
FREE_KEYS = (
    *("run.dir", "run.log_", "run.save_", "run.keep_", "run.image_", "run.hang_", "run.probe_"),
    *("run.max_steps", "data.num_workers", "data.decoder", "data.pack_tokens", "data.token_cache"),
    *("data.stage", "data.probe_", "data.read_timeout_s", "data.max_broken_pct"),
    *("parallelism.", "recompute.", "batch.", "model.compile"),
)
_FLOCK = "hhqqi"  # struct flock of Linux: type, whence, start, length, process
_PACKAGES = ("everest-ds", "torch", "deepspeed", "fairscale", "decord", "numpy")


class RunFolder:
    """The folder of a run, opened for writing by rank 0; other ranks only use its paths."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def lock_file(self) -> Path:
        """The file that a training run creates first, and locks while it is active."""
        return self.path / ".lock"

    @property
    def checkpoints(self) -> Path:
        """The folder of the `step-...` checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The metrics file: training steps and validations, one JSON object per line."""
        return self.path / METRICS_FILE

    @property
    def broken(self) -> Path:
        """The record of unreadable videos, one JSON object per line."""
        return self.path / "broken.jsonl"

    @property
    def excluded(self) -> Path:
        """The record of training samples that the whole run leaves out: a JSON object, name -> reason."""
        return self.path / "excluded.json"

    @property
    def logs(self) -> Path:
        """The folder of the log files, one per rank."""
        return self.path / "logs"

    def stacks(self, rank: int) -> Path:
        """Return the file to which the stacks of a hanging `rank` are written."""
        return self.logs / f"rank-{rank}.stacks"

    @property
    def tensorboard(self) -> Path:
        """The folder of the TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def best_weights(self) -> Path:
        """The file with the weights of the best validation so far (fine-tuning only)."""
        return self.path / BEST_WEIGHTS_FILE

    def open(self, config: Experiment, ds_config: dict[str, Any], world_size: int) -> None:
        """Lock the folder for this run, and write its config and environment.

        Raises:
            RunFolderError: if another active run holds the folder, if it belongs to another config, or if it
                is not writable.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim()
            self.check_same_config(config)
            if not self._has_saved:
                self.excluded.unlink(missing_ok=True)  # it may come from another config
            replace_file(self.path / CONFIG_FILE, dump_experiment(config))
            replace_json(self.path / "ds_config.json", ds_config)
            replace_json(self.path / ENVIRONMENT_FILE, describe_environment(world_size))
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: writing the run folder failed", given=str(error), fix="choose another run.dir"
            ) from None

    def close(self) -> None:
        """Release the lock of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def drop_metrics_after(self, step: int) -> None:
        """Remove the metrics of steps after `step`, which a resumed run repeats."""
        if self.metrics.is_file():
            replace_rows(self.metrics, [row for row in read_metrics(self.path) if row["step"] <= step])

    def _claim(self) -> None:
        """Lock the folder; the operating system releases the lock when the process ends for any reason.

        This is a record lock, which forked children do not inherit. Loader workers outlive a killed rank by
        some seconds; if they held the lock, the next start would be refused during that time.
        """
        lock = open(self.lock_file, "a+")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either error
            lock.seek(0)
            raise RunFolderError(
                f"{self.path}: another run is active in this folder",
                given=lock.read().strip(),
                fix="wait for it, stop it, or choose another run.dir",
            ) from None
        except OSError as error:  # Lustre without -o flock, some NFS
            raise RunFolderError(
                f"{self.path}: the file system has no locks, which keep a second run out of the folder",
                given=error.strerror,
                fix="mount it with locks (Lustre: -o flock), or choose a run.dir on another file system",
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock

    @property
    def is_active(self) -> bool:
        """True if another process, on any host, trains in this folder; known on Linux only."""
        try:
            with open(self.lock_file, "rb") as lock:
                wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                found = fcntl.fcntl(lock, fcntl.F_GETLK, wanted)
        except OSError:  # there is no lock, or no way to ask for it
            return False
        return sys.platform == "linux" and struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK

    @property
    def _has_saved(self) -> bool:
        """True if the folder holds a checkpoint or weights, which belong to one config."""
        return bool(list_checkpoints(self.checkpoints)) or self.best_weights.exists()

    def check_same_config(self, config: Experiment) -> None:
        """Check that a run with `config` may use this folder.

        A folder belongs to a config once something is saved in it. A run that failed before leaves it free.

        Raises:
            RunFolderError: if the folder belongs to a run with another config.
        """
        file = self.path / CONFIG_FILE
        if not (file.is_file() and self._has_saved):
            return
        try:
            before = load_experiment(file)
        except EverestError as error:
            raise RunFolderError(
                f"{self.path}: belongs to a run whose config this version cannot read",
                given=str(error),
                fix=f"restore {file}, or choose another run.dir",
            ) from None
        old, new = (dict(flatten(c.model_dump(mode="json"))) for c in (before, config))
        changed = [key for key in new if not key.startswith(FREE_KEYS) and old.get(key) != new[key]]
        if changed:
            fix = "undo the change, choose another run.dir, or remove the folder to start over"
            if all(
                key.startswith("schedule.") for key in changed
            ):  # the whole schedule sets the learning rates
                fix = (
                    "undo the change, or train on in a new run that starts from this one's encoder:"
                    f" run.dir=NEW model.init_from={self.path}"
                )
            raise RunFolderError(
                f"{self.path}: belongs to a run with another config",
                given=", ".join(f"{key}={new[key]} (in the folder: {old.get(key)})" for key in changed[:4]),
                allowed="the same config, except for parallelism.*, recompute.*, batch.* (with the same"
                " global batch size), model.compile, data.num_workers, data.decoder, data.pack_tokens,"
                " data.token_cache, data.stage, data.probe_*, data.read_timeout_s, data.max_broken_pct, and"
                " run.* other than run.seed, run.max_skipped_steps and run.validate_every_epochs",
                fix=fix,
            )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return all rows of a run's metrics, without lines that a crash or a full disk cut off.

    Raises:
        RunFolderError: if the run has no metrics file.
    """
    file = run / METRICS_FILE
    if not file.is_file():
        raise RunFolderError(f"{run}: no {METRICS_FILE}", fix="give the folder of a run that has trained")
    return [row for row in read_json_rows(file).rows if isinstance(row.get("step"), int)]


def describe_environment(world_size: int) -> dict[str, Any]:
    """Return the time, command, host, package versions and git commit of a run."""
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
    """Return the versions of the packages that affect results; None for a package that is not installed."""
    return {name: installed_version(name) for name in _PACKAGES}


def _git_state() -> dict[str, Any] | None:
    """Return the commit of this code and whether it has uncommitted changes; None outside a git checkout."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
