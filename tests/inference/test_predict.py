"""Tests of predictions: class probabilities, class names, and pictures of the kept tokens."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from everest_ds import load_model, read_clip
from everest_ds.inference.predictions import see
from tests.cli.test_cli import run_main
from tests.interchange import systems
from tests.interchange.systems import CLIP

SPARSE = ["tokens.selection=rero", "tokens.keep_ratio=0.5"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    names = {number: f"sport {number}" for number in range(systems.CLASSES)}
    systems.classifier(id2label=names).save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


def predict(monkeypatch: pytest.MonkeyPatch, video: Path, model: Path, out: Path, *more: str) -> Any:
    monkeypatch.chdir(out.parent)
    arguments = ["predict", str(video), "--model", str(model), "data.frame_stride=2", *more]
    assert run_main(monkeypatch, *arguments, "--json", str(out)) == 0
    return json.loads(out.read_text())


def test_one_video_gives_five_classes_and_a_picture(
    monkeypatch: pytest.MonkeyPatch, motion_data: Path, model: Path, tmp_path: Path
) -> None:
    video = motion_data / "test/00001.mp4"
    shown = ["--picture", str(tmp_path / "kept.png")]
    said = predict(monkeypatch, video, model, tmp_path / "p.json", *SPARSE, *shown)["videos"][str(video)]
    network = load_model(model, "data.frame_stride=2", *SPARSE)
    batch = read_clip(video, network.config)
    with torch.no_grad():
        expected = 100 * network(batch.clip, batch.key)[0].softmax(dim=0).sort(descending=True).values
    assert [row["probability_pct"] for row in said] == pytest.approx(expected[:5].tolist(), abs=0.006)
    assert {row["class"] for row in said} < {f"sport {number}" for number in range(6)}
    assert imread(tmp_path / "kept.png").shape[:2] == (2 * 66, 4 * 66)  # two rows, one column per slot


def test_what_is_seen_is_what_the_model_keeps(motion_data: Path, model: Path) -> None:
    video = motion_data / "test/00001.mp4"
    network = load_model(model, "data.frame_stride=2", *SPARSE)
    batch = read_clip(video, network.config)
    seen: list[torch.Tensor] = []
    network.encoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    network(batch.clip, batch.key)
    sight = see(network, video)
    assert np.flatnonzero(sight.kept_Thw).tolist() == seen[0][0].tolist()
    assert np.array_equal(sight.clip_FHWC, batch.clip[0].numpy())


def test_a_folder_of_videos_and_a_list_of_names(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    motion_data: Path,
    model: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("everest_ds.cli.predict._MOST_SHOWN", 10)
    names = ["--classes", str(motion_data / "classes.txt"), "--csv", str(tmp_path / "p.csv")]
    said = predict(monkeypatch, motion_data / "test", model, tmp_path / "p.json", *names)
    assert len(said["videos"]) == 12
    with open(tmp_path / "p.csv") as file:
        rows = {row["video"]: row for row in csv.DictReader(file)}
    for video, (first, second, *_, fifth) in said["videos"].items():
        assert (rows[video]["class"], rows[video]["second"]) == (first["class"], second["class"])
        assert float(rows[video]["probability_pct"]) == first["probability_pct"]
        assert float(rows[video]["fifth_pct"]) == fifth["probability_pct"]
    printed = capsys.readouterr().out
    assert "the likeliest of 6 classes" in printed and "and 2 more; --csv FILE writes all" in printed
    assert (
        sum(line.startswith("│ 000") for line in printed.splitlines()) == 10
    )  # names relative to the folder
    assert not list(tmp_path.glob("*.png"))
    assert {row["class"] for rows in said["videos"].values() for row in rows} <= set(
        (motion_data / "classes.txt").read_text().split()
    )


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (["{videos}/00001.mp4", "data.frame_stride=4"], "video too short for a clip", 3),
        (["nothing.mp4"], "no such video file", 3),
        (["{videos}", "--picture", "a.png"], "--picture was given for 12 videos; fix:", 2),
        (["{videos}/00001.mp4", "--classes", "two.txt"], "given: 2 names; allowed: 6", 2),
        (["{videos}/00001.mp4", "model.num_clases=3"], "did you mean model.num_classes", 2),
    ],
)
def test_mistakes_have_a_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    motion_data: Path,
    model: Path,
    tmp_path: Path,
    arguments: list[str],
    says: str,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("a\nb\n")
    given = [argument.format(videos=motion_data / "test") for argument in arguments]
    assert run_main(monkeypatch, "predict", *given, "--model", str(model)) == code
    printed = capsys.readouterr()
    assert says in printed.out.replace("\n", " ") + printed.err


def test_an_autoencoder_names_no_classes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], motion_data: Path, tmp_path: Path
) -> None:
    torch.save(systems.pretrained_state(systems.autoencoder()), tmp_path / "a.pth")
    video = str(motion_data / "test/00001.mp4")
    assert run_main(monkeypatch, "predict", video, "--model", str(tmp_path / "a.pth"), *CLIP) == 2
    assert "this model is not a classifier; given: PretrainModel" in capsys.readouterr().err
