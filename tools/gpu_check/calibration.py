"""The calibration part: run `everest-ds tune --calibrate`, to predict steps later without the machine."""

from __future__ import annotations

import subprocess
import sys
import time

from gpu_check.record import Record, Row

_NEEDS_S = 30.0


def run(record: Record) -> None:
    """Calibrate one rank and write the calibration to OUT/machine.json."""
    record.measure("calibrate", lambda: _calibrate(record), needs_s=_NEEDS_S)


def _calibrate(record: Record) -> Row:
    file, started = record.session.out / "machine.json", time.perf_counter()
    command = [sys.executable, "-m", "everest_ds", "tune", "--calibrate", "--calibration", str(file)]
    done = subprocess.run([*command, "--nproc", "1"], timeout=record.session.left_s)
    if done.returncode:
        raise RuntimeError(f"`everest-ds tune --calibrate` ended with exit code {done.returncode}")
    return {"file": file.name, "seconds": time.perf_counter() - started}
