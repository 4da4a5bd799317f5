"""Tests of output files: none lies outside the folder that the user chose, and none is an input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from everest_ds.checkpoints.export import export_weights
from everest_ds.data.synthetic import SyntheticSpec, synthesize
from everest_ds.efficiency.measured import PROFILE_FORMAT
from everest_ds.efficiency.report_files import write_report
from everest_ds.errors import UsageError
from everest_ds.interchange.convert import convert_weights
from everest_ds.output_paths import output_below
from tests.checkpoints.made import make_checkpoint
from tests.cli.test_cli import run_main
from tests.efficiency.test_measured import MEASURED
from tests.interchange import systems
from tests.interchange.systems import CLIP


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("../x.txt", "outside"),
        ("a/../../x.txt", "outside"),
        ("/etc/x.txt", "outside"),
        ("linked/x.txt", "outside"),
        ("link.txt", "outside"),
        ("dangling.txt", "outside"),
        ("input.txt", "an input would be overwritten"),
        ("again/input.txt", "an input would be overwritten"),
        ("a/../input.txt", "an input would be overwritten"),
    ],
)
def test_a_place_outside_or_of_an_input_is_refused(tmp_path: Path, place: str, says: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").mkdir()
    (out / "linked").symlink_to(tmp_path)
    (out / "again").symlink_to(out)
    (out / "link.txt").symlink_to(tmp_path / "input.txt")
    (out / "dangling.txt").symlink_to(tmp_path / "nowhere.txt")
    inputs = {(out / "input.txt").resolve(), (tmp_path / "input.txt").resolve()}
    with pytest.raises(UsageError, match=says):
        output_below(out, Path(place), inputs)


@pytest.mark.parametrize("place", ["x.txt", "new/deeper/x.txt", "a/../x.txt"])
def test_a_place_below_the_folder_is_taken(tmp_path: Path, place: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")  # the folder itself may be a link
    assert output_below(tmp_path / "link", Path(place), ()) == tmp_path / "link" / place


def linked_splits(folder: Path) -> None:
    synthesize(folder, {"train": 1, "val": 1, "test": 1}, SyntheticSpec(num_frames=8, size=32), workers=1)


def linked_report(folder: Path) -> None:
    write_report(folder, [], [], [], lambda done: None)


# Writers of several files into a folder, and a file that each of them writes.
FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "synthesize": (linked_splits, "test/00000.mp4"),
    "synthesize manifests": (linked_splits, "val.txt"),
    "report": (linked_report, "report.json"),
}


@pytest.mark.parametrize(("write", "place"), FOLDERS.values(), ids=list(FOLDERS))
def test_no_writer_follows_a_link_out_of_its_folder(
    tmp_path: Path, write: Callable[[Path], None], place: str
) -> None:
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.write_text("precious")
    (out / place).parent.mkdir(parents=True)
    (out / place).symlink_to(precious)
    with pytest.raises(UsageError, match="outside"):
        write(out)
    assert precious.read_text() == "precious"


def test_a_report_does_not_overwrite_its_measurements(tmp_path: Path) -> None:
    measured = tmp_path / "report.json"
    measured.write_text(json.dumps({"format": PROFILE_FORMAT, "measured": MEASURED.as_json()}))
    before = measured.read_bytes()
    with pytest.raises(UsageError, match="an input would be overwritten"):
        write_report(tmp_path, [], [], [measured], lambda done: None)
    assert measured.read_bytes() == before


def test_an_export_does_not_overwrite_its_checkpoint(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoints", 3)
    before = (path / "a.safetensors").read_bytes()
    with pytest.raises(UsageError, match="an input would be overwritten"):
        export_weights(tmp_path, path / "a.safetensors", "fp32")
    assert (path / "a.safetensors").read_bytes() == before


def test_a_conversion_does_not_overwrite_its_source(tmp_path: Path) -> None:
    file, hub = tmp_path / "a.pth", tmp_path / "hub"
    torch.save({"model": systems.finetuned_state(systems.classifier())}, file)
    systems.classifier().save_pretrained(hub)
    (tmp_path / "link.pth").symlink_to(file)
    before = file.read_bytes(), (hub / "config.json").read_bytes()
    for source, target, system in (
        (file, file, "videomae"),
        (tmp_path / "link.pth", file, "videomae"),
        (file, tmp_path / "link.pth", "everest"),
        (hub, hub, "transformers"),
        (hub / "model.safetensors", hub, "transformers"),
    ):
        with pytest.raises(UsageError, match="an input would be overwritten"):
            convert_weights(source, target, system, CLIP)
    assert (file.read_bytes(), (hub / "config.json").read_bytes()) == before


def test_commands_do_not_overwrite_the_videos_and_manifests_that_they_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], motion_data: Path, tmp_path: Path
) -> None:
    video, manifest, hub = tmp_path / "kept_tokens.mp4", tmp_path / "list.txt", tmp_path / "hub"
    shutil.copy(motion_data / "test/00001.mp4", video)
    manifest.write_text(f"{motion_data / 'test/00002.mp4'} 1\n")
    systems.classifier().save_pretrained(hub)
    before = video.read_bytes(), manifest.read_bytes()
    for words in (
        ["predict", str(video), "--model", str(hub), "--picture", str(video)],
        ["visualize", str(hub), str(video), "data.frame_stride=2", "--out", str(tmp_path)],
        ["data", "reencode", str(manifest), "--out", str(tmp_path)],
    ):
        assert run_main(monkeypatch, *words) == 2
        assert "an input would be overwritten" in capsys.readouterr().err
    assert (video.read_bytes(), manifest.read_bytes()) == before


def test_an_index_stays_in_its_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], motion_data: Path, tmp_path: Path
) -> None:
    videos, out, precious = tmp_path / "videos", tmp_path / "out", tmp_path / "precious"
    for name in ("a", "b"):
        (videos / name).mkdir(parents=True)
        for number in range(3):
            shutil.copy(motion_data / f"test/{number:05d}.mp4", videos / name)
    precious.write_text("precious")
    out.mkdir()
    (out / "val.txt").symlink_to(precious)
    assert run_main(monkeypatch, "data", "index", str(videos), "--out", str(out)) == 2
    assert "would be written outside" in capsys.readouterr().err and precious.read_text() == "precious"
