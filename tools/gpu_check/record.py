"""The results of a part, in a JSON file that is rewritten after every row and names its machine."""

from __future__ import annotations

import gc
import json
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from everest_ds.profiling.device import this_device
from everest_ds.profiling.step_measurement import device_name
from everest_ds.training.run_folder import describe_environment

# `tools/gpu_check.sh prepare` writes the commit here, because the copy on the machine may not be a checkout.
COMMIT_FILE = Path(".gpu/commit")
_STATE = "driver_version,pstate,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
_LONGEST_ERROR = 600  # characters

Row = dict[str, Any]


@dataclass(frozen=True)
class Session:
    """The settings of a process that measures one part.

    Attributes:
        out: folder of the results.
        ends_at: Unix time of the end, so that Python's start counts too; cases that do not fit are left out.
        tiny: rehearse with tiny models.
        peers: folder with the files of everest/ and videomae/; None: leave out the released systems.
    """

    out: Path
    ends_at: float
    tiny: bool
    peers: Path | None

    @property
    def device(self) -> torch.device:
        """Return the GPU, or the CPU in a rehearsal without a GPU."""
        return this_device()

    @property
    def left_s(self) -> float:
        """Return the seconds until the session must have ended."""
        return self.ends_at - time.time()


class Record:
    """The rows of one part, with the environment in which they were measured."""

    def __init__(self, session: Session, part: str) -> None:
        self.session = session
        self._file = session.out / f"{part}.json"
        self._started = time.monotonic()
        self._content: dict[str, Any] = {
            "part": part,
            "tiny": session.tiny,
            "environment": environment(session.device),
            "state_before": device_state(),
            "rows": [],
        }
        session.out.mkdir(parents=True, exist_ok=True)
        self._write()

    def measure(self, case: str, call: Callable[[], Row], needs_s: float = 0.0) -> Row:
        """Add the row that `call` returns, or the reason why there is none: an error, or no time left.

        Args:
            case: name of the row.
            call: measures the case and returns its row.
            needs_s: seconds that must be left to try the case; a rehearsal tries every case.

        Returns:
            The row as added.
        """
        left_s = self.session.left_s
        if left_s < (0 if self.session.tiny else needs_s):
            return self.add(case, {"left_out": f"{left_s:.0f} s were left, {needs_s:.0f} are needed"})
        try:
            row = call()
        except torch.OutOfMemoryError:
            row = {"error": "out of memory"}
        except Exception as error:  # the next case can still be measured
            traceback.print_exc(limit=8)
            row = {"error": f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]}
        start_afresh()
        return self.add(case, row)

    def add(self, case: str, row: Row) -> Row:
        """Add a row, print it, write the file and return the row."""
        whole = {"case": case, **row}
        self._content["rows"].append(whole)
        self._write()
        shown = {name: _rounded(value) for name, value in row.items() if name != "profile"}
        print(f"[{time.monotonic() - self._started:6.1f} s] {case}: {shown}", flush=True)
        return whole

    def close(self) -> None:
        """Record the state of the device and the seconds that the part took."""
        self._content |= {"state_after": device_state(), "seconds": time.monotonic() - self._started}
        self._write()

    def _write(self) -> None:
        self._file.write_text(json.dumps(self._content, indent=1))


def environment(device: torch.device) -> dict[str, Any]:
    """Return device, versions, commit and time, so that a result can be understood later."""
    about = describe_environment(1)
    commit = COMMIT_FILE.read_text().strip() if COMMIT_FILE.is_file() else None
    if about["git"] is not None:
        commit = about["git"]["commit"] + (" with uncommitted changes" if about["git"]["dirty"] else "")
    found = {
        "device": device_name(device),
        "commit": commit,
        "time": about["time"],
        "python": about["python"],
    }
    found |= {"packages": about["packages"], "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def device_state() -> str | None:
    """Return driver, power state, clocks, power and temperature from nvidia-smi; None without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={_STATE}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def start_afresh() -> None:
    """Release memory and compiled graphs, so that the next case runs as in a process of its own.

    torch.compile refuses more than a few shapes of a function in one process.
    """
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return value
