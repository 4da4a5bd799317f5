"""Resident memory of this process: what it holds now, and the most that it held since it was last asked."""

from __future__ import annotations

import re
import resource
from pathlib import Path

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): the peak becomes what is resident now


def resident_bytes() -> int:
    """Now.

    Raises:
        OSError: on a system without Linux' /proc.
    """
    found = re.search(r"^VmRSS:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no field VmRSS")
    return int(found[1]) * 1024


def peak_bytes() -> int:
    """The most since `reset_peak`, or since the start of the process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> bool:
    """Forget the peak; False where the system forbids it, as some containers do, or knows no such thing."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True
