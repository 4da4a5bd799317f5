"""Tests of feature tables: correct vectors for all readable videos, also after interruptions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everest_ds import load_model, read_clip
from everest_ds.data.data_set import list_samples
from everest_ds.errors import DataError, UsageError
from everest_ds.inference import features
from everest_ds.inference.feature_table import FeatureTable, check_table_file, read_table, write_table
from everest_ds.inference.features import Extracted, extract
from everest_ds.inference.views import Views
from tests.interchange import systems
from tests.interchange.systems import CLIP

SETTINGS = [*CLIP, "data.num_workers=0", "batch.micro_batch_size=3"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "a.pth"
    torch.save(systems.finetuned_state(systems.classifier()), file)
    return file


@pytest.fixture(scope="module")
def model(weights: Path) -> Any:
    return load_model(weights, *SETTINGS, features=True)


@pytest.fixture
def videos(motion_data: Path, tmp_path: Path) -> Path:
    """Return a folder of eight videos, one of them damaged and one in a subfolder."""
    folder = tmp_path / "videos"
    (folder / "deeper").mkdir(parents=True)
    for number in range(8):
        shutil.copy(motion_data / f"test/{number:05d}.mp4", folder / f"{number}.mp4")
    (folder / "0.mp4").rename(folder / "deeper" / "z.mp4")
    (folder / "3.mp4").write_bytes(b"damaged")
    return folder


def run(model: Any, videos: Path, file: Path, on_progress: Any = lambda done: None) -> Extracted:
    samples = list_samples(videos)
    root = videos if videos.is_dir() else videos.parent
    return extract(model, samples, root, file, Views(), on_progress)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_every_video_has_the_vector_of_its_middle(
    model: Any, videos: Path, tmp_path: Path, suffix: str
) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    file = tmp_path / f"table.{suffix}"
    done = run(model, videos, file)
    table = read_table(file)
    assert table.video.tolist() == ["1.mp4", "2.mp4", "4.mp4", "5.mp4", "6.mp4", "7.mp4", "deeper/z.mp4"]
    assert table.label.tolist() == [-1] * 7 and table.features.dtype == np.float32
    for name, vector in zip(table.video, table.features, strict=True):
        batch = read_clip(videos / str(name), model.config)
        with torch.no_grad():
            np.testing.assert_allclose(vector, model(batch.clip, batch.key)[0].numpy(), rtol=1e-4, atol=1e-5)
    (problem,) = done.problems
    assert problem.sample.path.name == "3.mp4" and "not a readable video" in problem.reason


def test_views_are_averaged(model: Any, videos: Path, tmp_path: Path) -> None:
    samples = list_samples(videos / "1.mp4")
    vectors = []
    for views in (Views(2, 1), Views(1, 1)):
        table = extract(
            model, samples, videos, tmp_path / f"{views.segments}.npz", views, lambda _: None
        ).table
        assert table is not None
        vectors.append(table.features[0])
    assert not np.allclose(vectors[0], vectors[1], atol=1e-4)


def test_a_stopped_run_goes_on_and_gives_the_same(
    model: Any, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_PART", 2)

    def stop(done: int) -> None:
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, videos, tmp_path / "stopped.npz", stop)
    assert not (tmp_path / "stopped.npz").exists()
    again = run(model, videos, tmp_path / "stopped.npz")
    whole = run(model, videos, tmp_path / "whole.npz")
    assert again.table is not None and whole.table is not None
    assert again.num_known == 2 and again.problems == whole.problems
    assert again.table.video.tolist() == whole.table.video.tolist()
    np.testing.assert_allclose(again.table.features, whole.table.features, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "stopped.npz.parts").exists()


def test_a_second_run_reads_only_what_is_new_or_was_repaired(
    model: Any, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, videos, tmp_path / "a.npz")
    shutil.copy(videos / "1.mp4", videos / "3.mp4")
    shutil.copy(videos / "1.mp4", videos / "new.mp4")
    seen: list[str] = []
    over_views = features.over_views

    def spy(model: Any, samples: Any, *rest: Any) -> Any:
        seen.extend(sample.path.name for sample in samples)
        return over_views(model, samples, *rest)

    monkeypatch.setattr(features, "over_views", spy)
    done = run(model, videos, tmp_path / "a.npz")
    assert seen == ["3.mp4", "new.mp4"] and done.problems == [] and done.num_known == 7
    run(model, videos / "new.mp4", tmp_path / "a.npz")
    assert len(read_table(tmp_path / "a.npz").video) == 9  # rows of videos that are not asked for are kept


def test_a_table_of_another_model_or_other_tokens_is_refused(
    model: Any, weights: Path, videos: Path, tmp_path: Path
) -> None:
    run(model, videos / "1.mp4", tmp_path / "a.npz")
    shutil.copy(weights, tmp_path / "moved.pth")
    same = load_model(tmp_path / "moved.pth", *SETTINGS, "data.num_workers=1", features=True)
    run(same, videos / "1.mp4", tmp_path / "a.npz")
    torch.save(systems.finetuned_state(systems.classifier()), tmp_path / "other.pth")
    for other in ([tmp_path / "other.pth"], [weights, "tokens.selection=rero"]):
        with pytest.raises(DataError, match="features of another model, other views or other tokens"):
            run(load_model(*other, *SETTINGS, features=True), videos / "1.mp4", tmp_path / "a.npz")


def test_labels_come_from_a_manifest(model: Any, motion_data: Path, tmp_path: Path) -> None:
    done = run(model, motion_data / "test.txt", tmp_path / "a.npz")
    assert done.table is not None and done.table.label.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert done.table.video[0] == "test/00000.mp4"


def test_names_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="allowed: .npz or .parquet"):
        check_table_file(tmp_path / "a.csv")
    (tmp_path / "a.npz").write_bytes(b"damaged")
    with pytest.raises(DataError, match="not a feature table"):
        read_table(tmp_path / "a.npz")


def test_a_table_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = FeatureTable(np.array(["a"]), np.array([0]), np.zeros((1, 2), np.float32), "")
    with pytest.raises(DataError, match="cannot be written"):
        write_table(tmp_path / "file" / "a.npz", table)
