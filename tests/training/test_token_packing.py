"""Tests of token selection in the loader's workers: the same tokens as in the model, in fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from everest_ds.config import plan_ranks
from everest_ds.data.clip_batches import Batch, PackedBatch
from everest_ds.data.clips import training_batches
from everest_ds.errors import ConfigError
from everest_ds.inference.views import Views, over_views, read_clip
from everest_ds.models import build_model
from everest_ds.models.selection.packer import Packer
from everest_ds.training.optimization import build_objective
from everest_ds.training.run_folder import RunFolder
from everest_ds.training.samples import read_samples, read_training_samples
from everest_ds.training.token_packing import unpack
from tests.data.store.conftest import pack
from tests.ranks import run_ranks
from tests.training.runs import experiment, losses, train_rank

PIXEL: dict[str, Any] = {"score": "pixel"}


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
@pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
def test_packed_clips_cost_less_and_give_the_same_loss(
    motion_data: Path, tmp_path: Path, task: str, distance: str
) -> None:
    config = experiment(motion_data, tmp_path, task, tokens={**PIXEL, "distance": distance})
    samples = read_training_samples(config, RunFolder(tmp_path).excluded).samples
    plan = plan_ranks(config, 2)

    def first(pack: Packer | None) -> Batch:
        return next(training_batches(samples, config, plan, 0, range(1), False, print, pack))

    whole, packed = first(None), first(Packer(config))
    torch.manual_seed(0)
    model, objective = build_model(config).eval(), build_objective(config)
    unpacked = unpack(packed, config.model.geometry)  # type: ignore[arg-type]
    assert objective(model, unpacked).item() == objective(model, whole).item()
    kept = config.token_counts.num_kept
    assert packed.clip.numel() == whole.clip.numel() * kept // config.token_counts.num_tokens
    assert unpacked.clip.shape == whole.clip.shape


@pytest.mark.parametrize("score", ["pixel", "codec"])
def test_a_run_with_packed_tokens_is_the_run_without(score: str, motion_data: Path, tmp_path: Path) -> None:
    drawn = {"image_every_steps": 3, "log_every_steps": 1, "save_every_steps": 100}
    for name, packs in (("plain", False), ("packed", True)):
        config = experiment(
            motion_data,
            tmp_path / name,
            tokens={"score": score},
            data={"pack_tokens": packs},
            run={**drawn, "dir": str(tmp_path / name)},
        )
        run_ranks(train_rank, 1, config)
    assert losses(tmp_path / "plain") == losses(tmp_path / "packed")


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"tokens": {**PIXEL, "selection": "random"}},
        {"tokens": {**PIXEL, "frame_oversampling": 2.0}},
        {"tokens": PIXEL, "augment": {"erase_probability": 0.5}},
    ],
)
def test_what_workers_cannot_select_is_refused(tmp_path: Path, sections: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ValidationError, match="data.pack_tokens"):
        experiment(tmp_path, tmp_path, "finetune", **{"data": {"pack_tokens": True}, **sections})


@pytest.mark.parametrize(
    "sections, says",
    [
        ({"tokens": {"frame_oversampling": 2.0}}, "score=codec needs frame_oversampling=1"),
        ({"augment": {"erase_probability": 0.5}}, "score=codec selects tokens before augment"),
        ({"model": {"patch_size": 2}}, "samples along each side.*patch_size=2"),
        ({"tokens": {"distance": "cosine"}}, "score=codec does not preserve distance=cosine"),
    ],
)
def test_what_the_codec_score_cannot_do_is_refused(
    tmp_path: Path, sections: dict[str, dict[str, Any]], says: str
) -> None:
    tokens = {"score": "codec", **sections.pop("tokens", {})}
    with pytest.raises(ValidationError, match=says):
        experiment(tmp_path, tmp_path, "finetune", tokens=tokens, **sections)


def test_evaluation_by_the_codec_score_keeps_the_tokens_of_the_clips(
    motion_data: Path, tmp_path: Path
) -> None:
    config = experiment(motion_data, tmp_path, "finetune", tokens={"score": "codec"})
    model = build_model(config).eval()
    samples = read_samples(config, "train").samples[:5]
    outputs = dict(over_views(model, samples, config, Views(), print, lambda done: None))
    for index, sample in enumerate(samples):
        batch = read_clip(sample, config)
        assert isinstance(batch, PackedBatch) and batch.kept.shape == (1, config.token_counts.num_kept)
        torch.testing.assert_close(model(*batch.arguments)[0], outputs[index], rtol=1e-4, atol=1e-5)


def test_a_store_has_no_motion_vectors(motion_data: Path, tmp_path: Path) -> None:
    pack(motion_data / "test.txt", tmp_path / "store")
    config = experiment(
        motion_data, tmp_path, tokens={"score": "codec"}, data={"train": str(tmp_path / "store")}
    )
    with pytest.raises(ConfigError, match=r"score=codec .*data.train is a frame store.*score=pixel"):
        read_training_samples(config, tmp_path / "none")
