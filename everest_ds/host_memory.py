"""Resident memory of this process: its current size, its peak since the last reset, and what it keeps."""

from __future__ import annotations

import ctypes
import re
import resource
from pathlib import Path

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Options of mallopt(3), a function of glibc.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_RESET_PEAK = "5"  # proc(5): writing 5 sets the peak to the current size


def resident_bytes() -> int:
    """Return the resident set size of this process, in bytes.

    Raises:
        OSError: if the system has no Linux /proc.
    """
    found = re.search(r"^VmRSS:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no field VmRSS")
    return int(found[1]) * 1024


def peak_bytes() -> int:
    """Return the peak resident set size since `reset_peak`, or since the process started, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> bool:
    """Reset the peak to the current size, and return whether that succeeded.

    Some containers forbid the reset, and systems other than Linux have no such file.
    """
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def keep_freed_memory(num_bytes: int) -> None:
    """Let this process keep up to `num_bytes` of freed memory, so that the next large array takes it again.

    By default, glibc returns the memory of an array of 32 MB or more to the system when it is freed, and the
    system clears every page of the next one. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, num_bytes)
        mallopt(_MMAP_MAX, 0)
