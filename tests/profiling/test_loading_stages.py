"""Tests of the measured stages of loading a clip, on small videos that are encoded here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest

from everest_ds.config import Experiment
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError
from everest_ds.models.selection.packer import Packer
from everest_ds.profiling import faster_copies, loading_stages
from everest_ds.profiling.faster_copies import FASTER_FORMS, measure_form, representatives
from everest_ds.profiling.loading_stages import measure_stages
from tests.data.conftest import noisy_pictures, write_video


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Write three videos with a single key frame each."""
    folder = tmp_path_factory.mktemp("videos")
    return [Sample(write_video(folder / f"{n}.mp4", noisy_pictures(60 + n), g="250"), 0) for n in range(3)]


def experiment(**data: Any) -> Experiment:
    settings = {"decoder": "pyav", "frame_stride": 2, "num_workers": 0, **data}
    model, tokens = {"image_size": 64, "num_frames": 8}, {"selection": "rero", "score": "pixel"}
    return Experiment.model_validate({"task": "pretrain", "model": model, "tokens": tokens, "data": settings})


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processor's clock advance by a second whenever it is read, so that times can be foretold."""
    monkeypatch.setattr(loading_stages, "time", SimpleNamespace(process_time=count().__next__))


@pytest.mark.usefixtures("ticking")
def test_stages_are_timed_apart_and_add_up(samples: list[Sample]) -> None:
    """The clock is read before all, around decoding, after cropping and after collating."""
    found = measure_stages(samples, experiment(), None, 1e9)
    assert set(found.decode_ms) == set(samples) and found.num_clips == 96
    cost = found.cost
    assert (cost.decode_ms, cost.crop_ms, cost.collate_ms, cost.pack_ms) == (1e3, 2e3, 1e3, 0)
    sizes = [sample.path.stat().st_size for sample in samples]
    assert cost.read_bytes == pytest.approx(sum(sizes) / 3, rel=0.1)  # a decoder reads a small file whole


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("packs", [False, True])
def test_costs_are_per_sample_or_per_clip(samples: list[Sample], packs: bool) -> None:
    """Four clips are cut from a decoded sample; selecting tokens is timed even if the run does not pack."""
    config = experiment(repeats=4, pack_tokens=packs)
    cost = measure_stages(samples, config, Packer(config), 1e9).cost
    assert (cost.decode_ms, cost.pack_ms, cost.collate_ms) == (1e3, 1e3, 250)
    # Cropping is what is left of reading: four more readings of the clock if tokens are selected meanwhile.
    assert cost.crop_ms == (1500 if packs else 500)


def test_the_times_are_those_of_the_processor(samples: list[Sample]) -> None:
    cost = measure_stages(samples, experiment(), None, 10.0).cost
    assert cost.decode_ms > cost.crop_ms > 0 and cost.collate_ms > 0


def test_a_budget_ends_the_measurement_and_damaged_videos_do_not_count(
    samples: list[Sample], tmp_path: Path
) -> None:
    broken = Sample(tmp_path / "broken.mp4", 0)
    broken.path.write_bytes(b"no video")
    found = measure_stages([broken, *samples], experiment(), None, 10.0)
    assert set(found.decode_ms) == set(samples)
    assert measure_stages(samples, experiment(), None, 0.0).num_clips == 1
    with pytest.raises(DataError, match="cannot be read"):
        measure_stages([broken], experiment(), None, 1.0)


def test_representatives_spread_over_the_decoding_times() -> None:
    times = {Sample(Path(f"{ms}.mp4"), 0): float(ms) for ms in range(1, 41)}
    assert [times[sample] for sample in representatives(times)] == [3, 8, 13, 18, 23, 28, 33, 38]
    few = {sample: times[sample] for sample in list(times)[:3]}
    assert set(representatives(few)) == set(few)


def test_reencoded_copies_are_of_the_middle_and_have_key_frames_close_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = Sample(write_video(tmp_path / "long.mp4", noisy_pictures(120), g="300"), 0)
    made: list[Sample] = []

    def copy(samples: Sequence[Sample], folder: Path) -> list[Sample]:
        assert [sample.span for sample in samples] == [(35, 85)]  # 50 of 120 frames
        made.extend(FASTER_FORMS["reencode"].copy(samples, folder))
        with av.open(str(made[0].path)) as container:
            keys = [bool(packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
        assert len(keys) == 50 and all(any(keys[i : i + 8]) for i in range(0, 48, 8))
        return made

    monkeypatch.setattr(faster_copies, "_MOST_FRAMES", 50)
    form = FASTER_FORMS["reencode"]._replace(copy=copy)
    cost = measure_form(form, [video], experiment(), None)
    assert cost.decode_ms > 0 and cost.read_bytes > 0 and not made[0].path.exists()


@pytest.mark.slow
def test_packed_copies_lie_in_a_store_and_decode_faster(samples: list[Sample]) -> None:
    made: list[Sample] = []

    def copy(parts: Sequence[Sample], folder: Path) -> list[Sample]:
        made.extend(FASTER_FORMS["pack"].copy(parts, folder))
        return made

    config = experiment()
    after = measure_form(FASTER_FORMS["pack"]._replace(copy=copy), samples, config, None)
    assert all(sample.stored for sample in made) and len(made) == len(samples)
    assert 0 < after.decode_ms < measure_stages(samples, config, None, 10.0).cost.decode_ms
    stored = [sample.stored.num_bytes for sample in made if sample.stored]
    assert 0 < after.read_bytes < max(stored)  # eight of the frames, not all


def test_a_form_that_cannot_be_made_is_an_error_that_names_the_video(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.mp4"):
        measure_form(FASTER_FORMS["reencode"], [Sample(tmp_path / "gone.mp4", 0)], experiment(), None)
