"""Tests of folders with one folder per class: what is indexed, what is skipped, and how samples are split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.data.class_folders import index_folder, split_samples
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError, UsageError


def put(folder: Path, *names: str) -> None:
    """Create files with these names, which are enough because indexing looks at names and sizes only."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def found(folder: Path) -> tuple[list[tuple[str, int | None]], dict[str, list[str]]]:
    """Return the indexed paths with their labels, and what was skipped by reason; paths are relative."""
    samples, _, skipped = index_folder(folder)
    return (
        [(str(sample.path.relative_to(folder)), sample.label) for sample in samples],
        {reason: [str(path.relative_to(folder)) for path in paths] for reason, paths in skipped.items()},
    )


def test_a_folder_per_class_gives_labels_in_the_order_of_the_names(tmp_path: Path) -> None:
    put(tmp_path, "walk/2.AVI", "walk/deep/1.webm", "run/a b.mp4", "run/notes.txt", ".cache/x.mp4", "README")
    assert index_folder(tmp_path).classes == ["run", "walk"]
    assert found(tmp_path)[0] == [("run/a b.mp4", 0), ("walk/2.AVI", 1), ("walk/deep/1.webm", 1)]


def test_what_an_operating_system_adds_is_skipped_and_named(tmp_path: Path) -> None:
    junk = ["__MACOSX/run/._a.mp4", "run/._a.mp4", "run/@eaDir/a.mp4", "walk/.thumbs/b.mp4", "._run.mov"]
    put(tmp_path, "run/a.mp4", "walk/b.MP4", "walk/Thumbs.db", "walk/Makefile", *junk)
    (tmp_path / "run" / "cut.mkv").touch()
    assert index_folder(tmp_path).classes == ["run", "walk"]
    assert found(tmp_path) == (
        [("run/a.mp4", 0), ("walk/b.MP4", 1)],
        {
            "hidden files": ["._run.mov", "run/._a.mp4"],
            "hidden folders": ["__MACOSX", "run/@eaDir", "walk/.thumbs"],
            "empty files": ["run/cut.mkv"],
            "files that end in .db": ["walk/Thumbs.db"],
            "files without a suffix": ["walk/Makefile"],
        },
    )


def test_links_are_followed_once_and_never_out_of_a_class_into_another(tmp_path: Path) -> None:
    top = tmp_path / "data"
    put(top, "run/a.mp4", "walk/b.mp4")
    put(tmp_path / "store", "deep/c.mp4", "d.mp4")
    (top / "jump").symlink_to(tmp_path / "store" / "deep")  # a class
    (top / "walk" / "more").symlink_to("../../store/d.mp4")  # not the name of a video
    (top / "walk" / "d.mp4").symlink_to("../../store/d.mp4")
    (top / "run" / "again.mp4").symlink_to("a.mp4")
    (top / "run" / "hard.mp4").hardlink_to(top / "run" / "a.mp4")
    (top / "run" / "all").symlink_to("..")
    (top / "run" / "self").symlink_to(".")
    (top / "run" / "lost.mp4").symlink_to("nowhere.mp4")
    (top / "run" / "round.mp4").symlink_to("round.mp4")
    assert found(top) == (
        [("jump/c.mp4", 0), ("run/a.mp4", 1), ("walk/b.mp4", 2), ("walk/d.mp4", 2)],
        {
            "further names of an indexed file": ["run/again.mp4", "run/hard.mp4"],
            "links to folders that are searched already": ["run/all", "run/self"],
            "links that lead nowhere": ["run/lost.mp4", "run/round.mp4"],
            "files without a suffix": ["walk/more"],
        },
    )
    (top / "run" / "b2.mp4").symlink_to("../walk/b.mp4")
    with pytest.raises(DataError, match=r"in two classes; given: .*run/b2\.mp4 and .*walk/b\.mp4"):
        index_folder(top)


def test_a_class_whose_files_are_all_skipped_says_which(tmp_path: Path) -> None:
    put(tmp_path, "run/a.mp4", "walk/.b.mp4", "walk/c.MP3")
    with pytest.raises(
        DataError, match=r"walk: .*given: files that end in \.MP3: 1.*; hidden files: 1"
    ) as caught:
        index_folder(tmp_path)
    assert "such as .b.mp4" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["README"], "no class folders"),
        (["run/a.mp4", "walk/notes.txt"], "walk: no videos in this class"),
        (["run/a.mp4", "b.mp4"], r"outside a class folder; given: b\.mp4"),
    ],
)
def test_a_folder_of_another_layout_is_refused(tmp_path: Path, files: list[str], reason: str) -> None:
    put(tmp_path, *files)
    with pytest.raises(DataError, match=reason):
        index_folder(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: no such folder"):
        index_folder(tmp_path / "absent")


def class_samples(*counts: int) -> list[Sample]:
    """Return `counts[c]` samples of each class c."""
    return [Sample(Path(f"{c}/{i}.mp4"), c) for c, count in enumerate(counts) for i in range(count)]


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    shares=st.tuples(*[st.integers(0, 10)] * 3).filter(sum),
    seed=st.integers(0, 2**32),
    shuffle=st.randoms(),
)
def test_a_split_loses_nothing_and_is_in_proportion_in_each_class_in_any_order(
    counts: list[int], shares: tuple[int, int, int], seed: int, shuffle: object
) -> None:
    samples = class_samples(*counts)
    train, val, test = (share / sum(shares) for share in shares)
    parts = split_samples(samples, (train, val, test), seed)
    assert Counter(sample for part in parts for sample in part) == Counter(samples)
    for part, fraction in zip(parts, (train, val, test), strict=True):
        assert abs(len(part) - fraction * len(samples)) <= 1
        for label, count in enumerate(counts):
            assert abs(sum(sample.label == label for sample in part) - fraction * count) <= 2
    shuffle.shuffle(samples)  # type: ignore[attr-defined]
    assert split_samples(samples, (train, val, test), seed) == parts


def test_another_seed_splits_otherwise() -> None:
    samples = class_samples(50, 50)
    assert split_samples(samples, (0.8, 0.1, 0.1), 0) != split_samples(samples, (0.8, 0.1, 0.1), 1)


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.2), (1.2, -0.1, -0.1)])
def test_fractions_that_are_no_split_are_refused(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError, match="sum to 1"):
        split_samples(class_samples(3), fractions, 0)
