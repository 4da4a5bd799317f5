"""Tests of the compact table of samples: it equals a naive reader, line by line, and is parsed once."""

from __future__ import annotations

import os
import pickle
import re
import time
from hashlib import blake2b
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from everest_ds.data import manifest_lines
from everest_ds.data.order import fingerprint
from everest_ds.data.video_list import Sample, SampleTable, leave_out, names_and_labels, read_manifest
from everest_ds.errors import DataError
from everest_ds.host_memory import peak_bytes, reset_peak
from everest_ds.parallel.world import World
from tests.ranks import run_ranks

FORM = "`path label` with a whole number from 0 as label, separated by a space, tab, comma or semicolon"
SEPARATED_LABEL = r"(?:(?:[ \t]*[,;][ \t]*|[ \t]+)(?P<label>-?[0-9]{1,18}))?"
SPAN = r"(?:#(?P<first>[0-9]{1,12})-(?P<stop>[0-9]{1,12}))?"
QUOTED = re.compile(rf'"(?P<path>(?:[^"]|"")+)"{SPAN}{SEPARATED_LABEL}')
PLAIN = re.compile(rf"(?P<path>.+?){SPAN}{SEPARATED_LABEL}")


def naive_sample(folder: Path, line: str) -> Sample:
    """Parse a line with one regular expression, as a specification of what a line means."""
    match = QUOTED.fullmatch(line)
    path = match["path"].replace('""', '"') if match else ""
    match = match or PLAIN.fullmatch(line)
    assert match is not None
    span = None if match["first"] is None else (int(match["first"]), int(match["stop"]))
    label = None if match["label"] is None else int(match["label"])
    return Sample(folder / (path or match["path"]), label, span)


def naive_samples(file: Path, folder: Path, num_classes: int | None, labelled: bool) -> list[Sample]:
    """Read a manifest one line and one object at a time."""
    samples = []
    for number, raw in enumerate(file.read_bytes().decode().split("\n"), start=1):
        line = raw.strip(" \t\r")
        if not line or line.startswith("#"):
            continue
        sample = naive_sample(folder, line)
        if sample.label is None and labelled:
            raise DataError(f"{file}:{number}: no label", given=repr(line), allowed=FORM)
        if sample.label is not None and not 0 <= sample.label < (num_classes or 10**18):
            allowed = "0 or more" if num_classes is None else f"0..{num_classes - 1}"
            raise DataError(f"{file}:{number}: label out of range", given=sample.label, allowed=allowed)
        if sample.span is not None and sample.span[0] >= sample.span[1]:
            allowed = "path#FIRST-STOP label, with FIRST below STOP"
            raise DataError(f"{file}:{number}: the span holds no frames", given=repr(line), allowed=allowed)
        samples.append(sample)
    if not samples:
        raise DataError(f"{file}: the manifest is empty", allowed=FORM)
    return samples


def naive_fingerprint(samples: list[Sample], seed: int) -> int:
    """Compute the fingerprint that checkpoints hold from one text of all samples."""
    names = [f"{s.path}#{s.span[0]}-{s.span[1]}" if s.span else str(s.path) for s in samples]
    shared = 0
    while len({name[: shared + 1] for name in names}) == 1 and shared < min(map(len, names)):
        shared += 1
    start = names[0][:shared].rfind("/") + 1
    parts = [
        str(seed),
        *(f"{name[start:]} {sample.label}" for name, sample in zip(names, samples, strict=True)),
    ]
    return int.from_bytes(blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big") >> 1


# Parts of lines, of which every kind of line can be put together, right or wrong.
PARTS = [
    *["a", "run/b", "c d", "/abs/e", "ü€", "7", "-3", "0", "12345678901234567890", "123456789012345678"],
    *[" ", "\t", ",", ";", " , ", '"', '""', "#", "#3-9", "#9-3", "#0-5", "-", "//", "./", "/.", ".", ".."],
]
WELL_FORMED = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["a", "run//b", "./c d", '"e, f"', "/abs/g", "ü/.", "x/", ".", "h#1-2"]),
    st.sampled_from(["", "#3-9", "#0-123456789012"]),
    st.sampled_from([" ", ",", "\t", " ; "]),
    st.integers(0, 9),
)
LINES = st.lists(WELL_FORMED | st.lists(st.sampled_from(PARTS), max_size=6).map("".join), max_size=6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    lines=LINES | st.lists(WELL_FORMED, min_size=1, max_size=9),
    end=st.sampled_from(["\n", "\r\n", " \n"]),
    folder=st.sampled_from([Path("/data"), Path("."), Path("lists/of"), Path("/")]),
    labelled=st.booleans(),
    num_classes=st.sampled_from([None, 8]),
)
def test_every_line_means_what_a_naive_reader_makes_of_it(
    tmp_path: Path, lines: list[str], end: str, folder: Path, labelled: bool, num_classes: int | None
) -> None:
    assume(not any(re.search(r'"-?[0-9]+"$', line.strip(" \t")) for line in lines))  # labels in quotes
    file = tmp_path / "list.txt"
    file.write_text(end.join(lines), encoding="utf-8", newline="")
    try:
        expected = naive_samples(file, folder, num_classes, labelled)
    except DataError as error:
        with pytest.raises(DataError) as caught:
            read_manifest(file, root=folder, num_classes=num_classes, labelled=labelled)
        assert str(caught.value) == str(error)
        return
    table = read_manifest(file, root=folder, num_classes=num_classes, labelled=labelled)
    assert list(table) == expected and len(table) == len(expected) and table[-1] == expected[-1]
    assert list(names_and_labels(table)) == [(sample.name, sample.label) for sample in expected]
    assert fingerprint(table, 3) == fingerprint(expected, 3) == naive_fingerprint(expected, 3)
    rows = list(range(0, len(expected), 2))
    assert list(leave_out(table, rows)) == leave_out(expected, rows) == expected[1::2]
    assert pickle.loads(pickle.dumps(table)) == expected


def long_manifest(file: Path, lines: int) -> list[Sample]:
    """Write a manifest without a pattern that would make a mix-up of its lines invisible."""
    samples = [Sample(file.parent / f"c{n * n % 977:03}/video-{n}.mp4", n * n % 977) for n in range(lines)]
    file.write_text("".join(f"c{s.label:03}/{s.path.name} {s.label}\n" for s in samples))
    return samples


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, in which every parsed text is kept, however short."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(manifest_lines, "_WORTH_KEEPING_BYTES", 0)
    return tmp_path / "cache" / "everest-ds" / "manifests"


def read(file: Path) -> SampleTable:
    return read_manifest(file, root=None, num_classes=977, labelled=True)


def test_a_text_is_parsed_once_and_a_changed_one_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, parse_line = tmp_path / "list.txt", Mock(wraps=manifest_lines.parse_line)
    monkeypatch.setattr(manifest_lines, "parse_line", parse_line)
    samples = long_manifest(file, 50)
    assert read(file) == read(file) == samples and parse_line.call_count == 50
    stamp = file.stat()
    file.write_text(file.read_text().replace("video-7.mp4", "video-8.mp4"))  # same size and time
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert read(file)[7].path.name == "video-8.mp4" and parse_line.call_count == 100
    for number in range(12):
        file.write_text(f"video-{number}.mp4 0\n")
        read(file)
    assert len(list(cache.iterdir())) == 8  # the folder does not grow without end


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 not an archive", None])
def test_a_damaged_file_in_the_cache_is_written_again(
    tmp_path: Path, cache: Path, damage: bytes | None
) -> None:
    samples = long_manifest(tmp_path / "list.txt", 50)
    read(tmp_path / "list.txt")
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    kept.write_bytes(flipped if damage is None else damage)
    assert read(tmp_path / "list.txt") == samples
    assert len(kept.read_bytes()) == len(whole)


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = long_manifest(tmp_path / "list.txt", 50)
    cache.parent.parent.write_text("a file where the cache folder should be")
    assert read(tmp_path / "list.txt") == samples


def shared_table(world: World, file: Path) -> tuple[int, SampleTable]:
    """Return what this rank receives of rank 0's table, and the growth of its peak memory meanwhile."""
    reset_peak()
    before = peak_bytes()
    table = world.share(lambda: read(file))
    return peak_bytes() - before, table.without([0])


def test_all_ranks_receive_the_table_of_rank_0(tmp_path: Path) -> None:
    samples = long_manifest(tmp_path / "list.txt", 1000)
    assert all(table == samples[1:] for _, table in run_ranks(shared_table, 2, tmp_path / "list.txt"))


@pytest.mark.slow
def test_a_million_lines_take_seconds_and_less_than_200_mb_on_each_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    long_manifest(tmp_path / "list.txt", 1_000_000)
    started = time.process_time()
    first = read(tmp_path / "list.txt")
    parsed = time.process_time()
    again = read(tmp_path / "list.txt")
    loaded = time.process_time()
    assert fingerprint(first, 0) == fingerprint(again, 0) and first[999_999] == again[999_999]
    hashed = time.process_time()
    assert parsed - started < 8 and loaded - parsed < 2 and hashed - loaded < 8
    for peak, table in run_ranks(shared_table, 2, tmp_path / "list.txt"):
        assert peak < 200e6 and len(table) == 999_999 and table[-1] == first[-1]
