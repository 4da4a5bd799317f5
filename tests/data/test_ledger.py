"""Tests of the ledger: its entries apply to the recorded version of a file and survive crashed writers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from everest_ds.data.ledger import Ledger, exclude
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    """A sample whose file exists."""
    (tmp_path / "a.mp4").write_bytes(b"video")
    return Sample(tmp_path / "a.mp4", 3)


def test_the_last_line_of_a_video_counts_also_to_another_process(tmp_path: Path, sample: Sample) -> None:
    ledger, other = (Ledger.of_manifest(tmp_path / "train.txt") for _ in range(2))
    ledger.record(sample, "cut off")
    other.record(sample, "", 20)
    again = Ledger.read(tmp_path / "train.txt.ledger.jsonl")
    assert ledger.broken(sample) == "cut off"
    assert again.broken(sample) is None and again.broken(sample, 21) is not None


def test_a_file_that_was_replaced_is_not_known(tmp_path: Path, sample: Sample) -> None:
    ledger = Ledger.read(tmp_path / "ledger")
    ledger.record(sample, "cut off")
    os.utime(sample.path, ns=(0, 0))
    assert ledger.broken(sample) is None and ledger.known(sample) is None


def test_a_missing_file_is_known_until_it_is_there(tmp_path: Path) -> None:
    ledger, absent = Ledger.read(tmp_path / "ledger"), Sample(tmp_path / "b.mp4", None)
    ledger.record(absent, "no such video file", source="run")
    assert ledger.broken(absent) == "no such video file"
    absent.path.touch()
    assert ledger.broken(absent) is None


def test_samples_are_left_out_by_name_parts_of_a_video_too(tmp_path: Path, sample: Sample) -> None:
    ledger = Ledger.read(tmp_path / "ledger")
    part, short, whole = (Sample(sample.path, 0, span) for span in ((0, 9), (9, 12), (20, 40)))
    ledger.record(part, "damaged")
    ledger.record(short, "", 3)
    ledger.record(whole, "", 20)
    usable = exclude([sample, part, short, whole], ledger, min_frames=4)
    assert usable.samples == [sample, whole]
    assert [(p.sample, p.reason) for p in usable.excluded] == [
        (part, "damaged"),
        (short, "too short; given: 3 frames; allowed: 4 or more"),
    ]


def test_a_ledger_read_for_its_faults_leaves_out_the_same_samples(tmp_path: Path, sample: Sample) -> None:
    ledger, samples = Ledger.read(tmp_path / "ledger"), [Sample(sample.path, 0, (0, n)) for n in range(1, 9)]
    for each, entry in zip(
        samples, [("", 1), ("bad", 0), ("", 9), ("", 2), ("bad", 0), ("", 5)], strict=False
    ):
        ledger.record(each, *entry)
    ledger.record(samples[1], "", 7)  # found intact later
    ledger.record(samples[2], "", 1)
    faults = Ledger.read(ledger.path, faults_below=4)
    assert exclude(samples, faults, 4) == exclude(samples, Ledger.read(ledger.path), 4)
    assert [problem.sample.span for problem in exclude(samples, faults, 4).excluded] == [
        (0, 1),
        (0, 3),
        (0, 4),
        (0, 5),
    ]
    assert faults.known(samples[5]) is None  # an intact entry is not kept


@pytest.mark.parametrize("keep", [1, 40])
def test_a_line_cut_off_by_a_crash_loses_itself_only(tmp_path: Path, sample: Sample, keep: int) -> None:
    file = tmp_path / "ledger"
    first, second, third = (Sample(sample.path, None, (0, n)) for n in (1, 2, 3))
    Ledger.read(file).record(first, "one")
    start = file.stat().st_size
    Ledger.read(file).record(second, "two")
    os.truncate(file, start + keep)
    Ledger.read(file).record(third, "three")
    ledger = Ledger.read(file)
    assert [ledger.broken(each) for each in (first, second, third)] == ["one", None, "three"]


def test_a_file_name_that_is_no_utf8_can_be_recorded(tmp_path: Path) -> None:
    odd = Sample(tmp_path / "b\udcff.mp4", None)
    Ledger.read(tmp_path / "ledger").record(odd, "empty")
    assert Ledger.read(tmp_path / "ledger").broken(odd) == "empty"


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text('{"video": "a.mp4"}\n')
    with pytest.raises(DataError, match="not a ledger of this version"):
        Ledger.read(tmp_path / "ledger")
