"""Tests of manifests: common variants are read, faults are reported by line, and written files read back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everest_ds.data.data_set import list_samples
from everest_ds.data.video_list import (
    Sample,
    read_class_names,
    read_manifest,
    write_manifest,
)
from everest_ds.errors import DataError
from everest_ds.log import logger


def manifest(folder: Path, content: str | bytes) -> Path:
    """Write a manifest with the given content."""
    file = folder / "train.csv"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def read(
    file: Path, *, labelled: bool = True, num_classes: int | None = None
) -> list[tuple[str, int | None]]:
    """Return the path, relative to the manifest's folder, and the label of every line."""
    samples = read_manifest(file, root=None, num_classes=num_classes, labelled=labelled)
    return [(str(sample.path.relative_to(file.parent)), sample.label) for sample in samples]


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("a.mp4 3", "a.mp4"),
        ("a.mp4    3", "a.mp4"),
        ("a.mp4\t3", "a.mp4"),
        ("a.mp4,3", "a.mp4"),
        ("a.mp4;3", "a.mp4"),
        ("a.mp4 , 3", "a.mp4"),
        ("  a.mp4 3  ", "a.mp4"),
        ("a.mp4 03", "a.mp4"),
        ("two words/a, b;c 7.mp4 3", "two words/a, b;c 7.mp4"),
        ("a b.mp4,3", "a b.mp4"),
        ('"a b.mp4",3', "a b.mp4"),
        ('"a ""b"", 5" 3', 'a "b", 5'),
        ('"half quoted.mp4 3', '"half quoted.mp4'),
        ("a.mp4 0 3", "a.mp4 0"),
        ('"a b.mp4","3"', "a b.mp4"),
        ('"a ""b"", 5.mp4"\t"3"', 'a "b", 5.mp4'),
    ],
)
def test_the_label_is_the_last_field_whatever_separates_it(tmp_path: Path, line: str, path: str) -> None:
    assert read(manifest(tmp_path, line)) == [(path, 3)]


def test_blank_lines_comments_a_byte_order_mark_and_windows_line_ends_do_not_count(tmp_path: Path) -> None:
    content = "\ufeffa.mp4 0\r\n\r\n# b.mp4 1\r\nc.mp4 2"
    assert read(manifest(tmp_path, content)) == [("a.mp4", 0), ("c.mp4", 2)]


@pytest.mark.parametrize(
    "header", ["path,label", '"video_path","class"', "FileName\tLabel_ID", "video; target"]
)
def test_a_header_does_not_count_but_only_as_the_first_line(tmp_path: Path, header: str) -> None:
    assert read(manifest(tmp_path, f"\n{header}\na.mp4 1\n"), labelled=False) == [("a.mp4", 1)]
    with pytest.raises(DataError, match=r"train\.csv:2: no label"):
        read(manifest(tmp_path, f"a.mp4 1\n{header}\n"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_joined_files_and_the_line_ends_of_every_system_are_read(tmp_path: Path, end: str) -> None:
    content = end.join(["\ufeffa.mp4 0  ", "", "\t \t", "\ufeffb.mp4\t1 ", "# \ufeff"])
    assert read(manifest(tmp_path, content)) == [("a.mp4", 0), ("b.mp4", 1)]


@pytest.mark.parametrize("line", ["a.mp4 0\rb.mp4 1", "a\0.mp4 0"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_line_that_is_no_text_is_refused_by_its_number(tmp_path: Path, line: str, labelled: bool) -> None:
    with pytest.raises(DataError, match=r"train\.csv:3: the line contains a carriage return or a null"):
        read(manifest(tmp_path, f"# names\nok.mp4 0\n{line}\n"), labelled=labelled)


@pytest.mark.parametrize("rest", [" 1.0", ",walk", "\t3 # good", ";", " -", " 3,"])
def test_text_after_a_video_is_refused_as_a_label_even_where_none_is_needed(
    tmp_path: Path, rest: str
) -> None:
    with pytest.raises(DataError, match=r"train\.csv:2: no label; given: .*fix: enclose the path"):
        read(manifest(tmp_path, f"a.mp4\nb.MOV{rest}\n"), labelled=False)
    assert read(manifest(tmp_path, f'"b.MOV{rest}"\n'), labelled=False) == [(f"b.MOV{rest}", None)]


def test_a_name_that_begins_with_a_hash_is_a_video_if_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "#20_Rhythm_clap.mp4").touch()
    lines = ["#20_Rhythm_clap.mp4 1", "#21_Rhythm_clap.mp4 x", "#gone.mp4 9", "a.mp4 0", "# walk.mp4"]
    assert read(manifest(tmp_path, "\n".join(lines)), num_classes=2) == [
        ("#20_Rhythm_clap.mp4", 1),
        ("a.mp4", 0),
    ]
    with pytest.raises(DataError, match=r"train\.csv:3: label out of range; given: 7"):
        read(manifest(tmp_path, "#x.mp4 8\n#20_Rhythm_clap.mp4 1\n#20_Rhythm_clap.mp4 7\n"), num_classes=2)


def test_relative_paths_start_at_the_root_and_absolute_ones_stay(tmp_path: Path) -> None:
    file = manifest(tmp_path, "a.mp4 0\n/videos/b.mp4 1\n")
    samples = read_manifest(file, root=Path("/data"), num_classes=2, labelled=True)
    assert samples == [Sample(Path("/data/a.mp4"), 0), Sample(Path("/videos/b.mp4"), 1)]


def test_a_list_without_labels_may_have_them(tmp_path: Path) -> None:
    file = manifest(tmp_path, 'a b.mp4\nc.mp4 5\n"d 6"\n7\n')
    assert read(file, labelled=False) == [("a b.mp4", None), ("c.mp4", 5), ("d 6", None), ("7", None)]


@pytest.mark.parametrize("line", ["a.mp4", "a.mp4 x", "a.mp4 1.0", "3", '"a b.mp4 3"', "path,label"])
def test_a_line_without_a_label_is_quoted_with_its_number(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"train\.csv:2: no label; given: .*path label") as caught:
        read(manifest(tmp_path, f"ok.mp4 0\n{line}\n"))
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("label", "num_classes", "allowed"), [(5, 5, r"0\.\.4"), (-1, 5, r"0\.\.4"), (-1, None, "0 or more")]
)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_label_out_of_range_names_line_and_range(
    tmp_path: Path, label: int, num_classes: int | None, allowed: str, labelled: bool
) -> None:
    file = manifest(tmp_path, f"ok.mp4 4\na.mp4 {label}\n")
    with pytest.raises(DataError, match=rf"train\.csv:2: .*given: {label}; allowed: {allowed}"):
        read(file, labelled=labelled, num_classes=num_classes)


@pytest.mark.parametrize("content", ["", "\n\n", "# only a comment\n"])
def test_a_manifest_without_samples_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"train\.csv: the manifest is empty"):
        read(manifest(tmp_path, content))


def test_a_manifest_that_is_missing_a_folder_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.txt: no such manifest"):
        read(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="a folder"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"train\.csv: the manifest is not UTF-8 text; given: byte 1"):
        read(manifest(tmp_path, b"a\xff.mp4 0\n"))


# Difficult names: separators, quotes, comment signs, digits, and characters that splitlines() splits at.
names = st.text(
    st.one_of(
        st.sampled_from(" ,;\t\"'#-0123\ufeff\x0b\x85\u2028"),
        st.characters(exclude_characters="/\n\r\0", exclude_categories=["Cs"]),
    ),
    min_size=1,
).filter(lambda name: name not in (".", ".."))
names |= st.sampled_from(
    ["path,label", "Clip; Target", "Video", "a.MKV 1.0", "b.mp4, walk", "#c.mp4", '"d.mp4","1"']
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(paths=st.lists(st.lists(names, min_size=1, max_size=3), min_size=1), data=st.data())
def test_what_is_written_is_read_back(tmp_path: Path, paths: list[list[str]], data: st.DataObject) -> None:
    label = data.draw(st.sampled_from([st.integers(0, 10**6), st.none() | st.integers(0, 10**6)]))
    span = st.none() | st.tuples(st.integers(0, 10**6), st.integers(10**6 + 1, 10**9))
    samples = [Sample(tmp_path.joinpath(*parts), data.draw(label), data.draw(span)) for parts in paths]
    file = tmp_path / "list.txt"
    write_manifest(file, samples, tmp_path)
    labelled = all(sample.label is not None for sample in samples)
    assert read_manifest(file, root=None, num_classes=None, labelled=labelled) == samples


@pytest.mark.parametrize("name", ["path,label", "Clip; Target", "file\tclass"])
def test_a_video_called_like_a_header_is_read_back(tmp_path: Path, name: str) -> None:
    samples = [Sample(tmp_path / name, None), Sample(tmp_path / "b", None)]
    write_manifest(tmp_path / "list.txt", samples, tmp_path)
    assert read_manifest(tmp_path / "list.txt", root=None, num_classes=None, labelled=False) == samples


def test_a_line_may_stand_for_a_part_of_a_video(tmp_path: Path) -> None:
    file = manifest(tmp_path, 'full/a.mp4#34-274 1\n"b c.mp4"#0-5,0\n"d#1-2" 0\n')
    samples = read_manifest(file, root=None, num_classes=None, labelled=True)
    names = [sample.name.removeprefix(f"{tmp_path}/") for sample in samples]
    assert names == ["full/a.mp4#34-274", "b c.mp4#0-5", "d#1-2"]
    assert [sample.span for sample in samples] == [(34, 274), (0, 5), None]
    with pytest.raises(DataError, match="no frames"):
        read_manifest(manifest(tmp_path, "a.mp4#5-5 0"), root=None, num_classes=None, labelled=True)


def test_simple_names_are_written_as_plainly_as_videomae_reads_them(tmp_path: Path) -> None:
    samples = [Sample(tmp_path / "a/b.mp4", 0), Sample(Path("/elsewhere/c.mp4"), 12)]
    write_manifest(tmp_path / "list.txt", samples, tmp_path)
    assert (tmp_path / "list.txt").read_text() == "a/b.mp4 0\n/elsewhere/c.mp4 12\n"


@pytest.mark.parametrize("name", ["a\nb.mp4", "a\rb.mp4", "a\udcff.mp4", "a\0.mp4"])
def test_a_name_that_no_line_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be written to a manifest") as caught:
        write_manifest(tmp_path / "list.txt", [Sample(tmp_path / name, 0)], tmp_path)
    str(caught.value).encode()
    assert len(str(caught.value).splitlines()) == 1


def test_class_names_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    assert read_class_names(manifest(tmp_path, "\ufeffplaying chess\r\n\nabseiling\n")) == [
        "playing chess",
        "abseiling",
    ]


@pytest.mark.parametrize(
    ("content", "reason"), [("\n", "no class names"), ("a\nb\na\n", "repeated; given: a")]
)
def test_class_names_must_be_there_and_differ(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(DataError, match=rf"train\.csv: .*{reason}"):
        read_class_names(manifest(tmp_path, content))


def test_a_folder_is_listed_through_links_and_without_hidden_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)  # a run in this process would have turned it off
    for name in ("store/b.MKV", "top/a.mp4", "top/._a.mp4", "top/__MACOSX/a.mp4", "top/empty.avi"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "top" / "link").symlink_to("../store")
    (tmp_path / "top" / "loop").symlink_to(".")
    found = [str(sample.path.relative_to(tmp_path / "top")) for sample in list_samples(tmp_path / "top")]
    assert found == ["a.mp4", "empty.avi", "link/b.MKV"]  # an empty file is reported when it is read
    skipped = [record.getMessage().partition(": skipped ")[2] for record in caplog.records]
    assert skipped == [
        "hidden files: 1, such as ._a.mp4",
        "hidden folders: 1, such as __MACOSX",
        "links to folders that are searched already: 1, such as loop",
    ]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no videos in this folder"):
        list_samples(tmp_path / "none")
