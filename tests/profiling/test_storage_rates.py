"""Tests of measured rates of a disk and of copies, against the times of plain reads and copies."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from everest_ds.profiling import storage_rates
from everest_ds.profiling.storage_rates import copy_rate, disk_rate


def test_a_disk_delivers_files_that_left_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_rates, "_READ_S", 0.3)
    files = [tmp_path / str(number) for number in range(4)]
    for file in files:
        file.write_bytes(os.urandom(2**20))
        with file.open("rb") as written:
            os.fsync(written.fileno())
    found = disk_rate([*files, tmp_path / "missing"])
    assert found is not None and found.bytes_per_s > 0
    monkeypatch.setattr(storage_rates, "_IO_COUNTS", tmp_path / "none")  # as on other systems than Linux
    unknown = disk_rate(files)
    assert unknown is not None and not unknown.cold


def test_a_last_round_that_the_time_cuts_off_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second round begins just before the time is over, and reads nothing."""
    (tmp_path / "small").write_bytes(bytes(1000))
    read, rounds = storage_rates._read_cold, iter([1, 0])
    monkeypatch.setattr(storage_rates, "_read_cold", lambda file, until: next(rounds) * read(file, until))
    found = disk_rate([tmp_path / "small"])
    assert found is not None and found.bytes_per_s > 0


def test_files_that_cannot_be_read_have_no_rate(tmp_path: Path) -> None:
    assert disk_rate([tmp_path / "missing", tmp_path]) is None
    assert disk_rate([]) is None


def test_a_copy_takes_as_long_as_that_of_python() -> None:
    size = 2**26
    source, seconds = bytearray(size), []
    for _ in range(3):
        start = time.perf_counter()
        bytes(source)
        seconds.append(time.perf_counter() - start)
    assert 0.1 < copy_rate() / (size / min(seconds)) < 10
