"""Tests of the predicted shared memory against the batches that workers send."""

from __future__ import annotations

from pathlib import Path

import pytest

from everest_ds.config import BatchPlan, batch_bytes, shared_memory_bytes
from everest_ds.data.clips import training_batches
from everest_ds.data.video_list import read_manifest
from everest_ds.models.selection.packer import Packer
from tests.training.runs import experiment

PIXEL = {"score": "pixel", "keep_ratio": 0.5, "mask_ratio": 0.75}


@pytest.mark.parametrize(
    ("tokens", "packs"),
    [({}, False), ({"frame_oversampling": 2.0, "keep_ratio": 0.5, "mask_ratio": 0.75}, False), (PIXEL, True)],
)
def test_a_batch_has_the_predicted_bytes(
    motion_data: Path, tmp_path: Path, tokens: dict[str, object], packs: bool
) -> None:
    data = {"pack_tokens": packs, "num_workers": 0}
    config = experiment(motion_data, tmp_path, data=data, tokens=tokens)
    samples = read_manifest(motion_data / "train.txt", root=None, num_classes=6, labelled=True)
    pack = Packer(config) if packs else None
    (batch,) = training_batches(
        samples, config, BatchPlan(4, 1, 1), 0, range(1), False, lambda failure: None, pack
    )
    clips = [batch.clip, *([batch.kept] if packs else [])]
    assert batch_bytes(config) == sum(tensor.nbytes for tensor in clips)


def test_workers_and_ranks_multiply(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(motion_data, tmp_path, data={"num_workers": 3})
    assert shared_memory_bytes(config, 4) == 4 * (3 * 2 + 3) * batch_bytes(config)
    assert shared_memory_bytes(experiment(motion_data, tmp_path, data={"num_workers": 0}), 4) == 0
