"""The rates at which a machine delivers the bytes of clips: from the disk of the videos, and in copies."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from everest_ds.profiling.device import this_device
from everest_ds.profiling.device_rates import host_bytes_per_s

_IO_COUNTS = Path("/proc/self/io")  # Linux only
_READ_S, _READ_BYTES = 2.0, 2**28  # limits of the measurement of a disk
_NUM_READERS = 8  # files that are read at a time, as by several workers
_CHUNK_BYTES = 2**20
_COPIED_BYTES, _NUM_COPIES = 2**26, 5  # more than a processor's cache holds
_COLD_SHARE = 0.5  # share of the bytes that must come from the disk, not from the page cache


class DiskRate(NamedTuple):
    """The rate at which files were read, several at a time.

    Attributes:
        bytes_per_s: bytes read per second.
        cold: True if most bytes came from the disk; False if the page cache kept them, or if the system does
            not say where they came from.
    """

    bytes_per_s: float
    cold: bool


def disk_rate(files: Iterable[Path]) -> DiskRate | None:
    """Measure how fast `files` are read after the system was asked to drop them from its cache.

    Small files are read again and again, for the median of the rates.

    Returns:
        The rate; None if no byte could be read.
    """
    rates, num_bytes, before, began = [], 0, io_count("read_bytes"), time.perf_counter()
    every = list(files)
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        while (start := time.perf_counter()) < began + _READ_S and num_bytes < _READ_BYTES:
            read = sum(readers.map(partial(_read_cold, until=began + _READ_S), every))
            if not read:  # no file can be read, or the time was over before the first chunk
                break
            rates.append(read / (time.perf_counter() - start))
            num_bytes += read
    if not rates:
        return None
    return DiskRate(median(rates), io_count("read_bytes") - before >= _COLD_SHARE * num_bytes)


def _read_cold(file: Path, until: float) -> int:
    """Read a file from the disk, at most until that time; return the number of bytes that were read."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return 0
    num_bytes = 0
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            # Reading ahead would leave bytes that were read, but do not count, when the time is over.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        while time.perf_counter() < until and (chunk := os.read(descriptor, _CHUNK_BYTES)):
            num_bytes += len(chunk)
    except OSError:
        return num_bytes
    finally:
        os.close(descriptor)
    return num_bytes


def drop_from_page_cache(file: Path) -> None:
    """Ask the system, if it is Linux, to read the content of a file from the disk again."""
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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
        start = time.process_time()  # other programs do not count
        target.copy_(source)
        seconds.append(time.process_time() - start)
    in_memory, device = _COPIED_BYTES / median(seconds), this_device()
    return min(in_memory, host_bytes_per_s(device)) if device.type == "cuda" else in_memory
