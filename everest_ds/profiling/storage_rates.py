"""The rates at which a machine delivers the bytes of clips: from the disk of the videos, and in copies."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from everest_ds.profiling.device import this_device
from everest_ds.profiling.device_rates import host_bytes_per_s

_IO_COUNTS = Path("/proc/self/io")  # Linux only
_READ_BYTES, _READ_S = 2**28, 3.0  # limits of the measurement of a disk
_CHUNK_BYTES = 2**20
_COPIED_BYTES, _NUM_COPIES = 2**26, 5  # more than a processor's cache holds
_COLD_SHARE = 0.5  # share of the bytes that must come from the disk, not from the page cache


class DiskRate(NamedTuple):
    """The rate at which files were read, one after the other.

    Attributes:
        bytes_per_s: bytes read per second.
        cold: True if most bytes came from the disk; False if the page cache kept them, or if the system does
            not say where they came from.
    """

    bytes_per_s: float
    cold: bool


def disk_rate(files: Iterable[Path]) -> DiskRate | None:
    """Measure how fast `files` are read after the system was asked to drop them from its cache.

    Returns:
        The rate; None if no file can be read.
    """
    num_bytes, seconds, before = 0, 0.0, io_count("read_bytes")
    for file in files:
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            continue
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            while chunk := os.read(descriptor, _CHUNK_BYTES):
                num_bytes += len(chunk)
            seconds += time.perf_counter() - start
        finally:
            os.close(descriptor)
        if num_bytes > _READ_BYTES or seconds > _READ_S:
            break
    if not num_bytes:
        return None
    return DiskRate(num_bytes / seconds, io_count("read_bytes") - before >= _COLD_SHARE * num_bytes)


def io_count(name: str) -> int:
    """Return a count of this process's input and output so far; 0 on a system that does not count.

    Args:
        name: `rchar` for the bytes read from files, cached or not, or `read_bytes` for those from a disk.
    """
    if not _IO_COUNTS.exists():
        return 0
    counts = dict(line.split(": ") for line in _IO_COUNTS.read_text().splitlines())
    return int(counts[name])


def copy_rate() -> float:
    """Measure the rate at which a rank copies batches out of shared memory and on to its GPU, if it has one.

    One thread copies from shared to pinned memory while an earlier batch is copied to the GPU, so the slower
    of the two copies counts.
    """
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8).share_memory_()
    target, seconds = torch.zeros_like(source), []
    for _ in range(_NUM_COPIES):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    in_memory, device = _COPIED_BYTES / median(seconds), this_device()
    return min(in_memory, host_bytes_per_s(device)) if device.type == "cuda" else in_memory
