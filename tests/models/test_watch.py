"""Tests of the recorder: its record agrees with the tokens and attention of the forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everest_ds.models import build_model
from everest_ds.models.tubelets import to_tubelets
from everest_ds.models.watch import Seen, Watch, _rollout
from tests.models import TASKS_AND_SELECTIONS, experiment, random_clips

KEYS = torch.tensor([5, 6])


def watched(task: str, selection: str, **more: Any) -> tuple[Seen, Tensor]:
    config = experiment(task, selection, **more)
    torch.manual_seed(0)
    model, clip = build_model(config).eval(), random_clips(config, 2)
    with torch.no_grad(), Watch(model, num_clips=2) as watch:
        output = model(clip, KEYS)
    return watch.seen(output), clip


@pytest.mark.parametrize("task, selection", TASKS_AND_SELECTIONS)
def test_tokens_are_counted_and_attention_is_shared_out_among_the_encoded(task: str, selection: str) -> None:
    counts = experiment(task, selection).token_counts
    seen, clip = watched(task, selection)
    assert (seen.kept_BThw.sum((1, 2, 3)) == counts.num_kept).all()
    assert (seen.visible_BThw.sum((1, 2, 3)) == counts.num_visible).all()
    assert ((seen.attention_BThw > 0) == seen.visible_BThw).all()
    torch.testing.assert_close(seen.attention_BThw.sum((1, 2, 3)), torch.ones(2))
    assert (seen.counts_BS == seen.kept_BThw.flatten(2).sum(2)).all()
    assert (seen.clip_BFHWC == clip).all()
    assert (seen.restored_BFHWC is None) == (task == "finetune")


def test_rollout_is_the_mean_row_of_the_product_of_all_blocks() -> None:
    torch.manual_seed(0)
    blocks = [torch.rand(2, 9, 9).softmax(-1) for _ in range(4)]
    product = torch.eye(9).expand(2, 9, 9)
    for weights in blocks:
        product = (0.5 * weights + 0.5 * torch.eye(9)) @ product
    torch.testing.assert_close(_rollout(blocks), product.mean(dim=1))


def test_iifs_shows_the_counts_it_drew_by_and_the_frames_it_took() -> None:
    seen, clip = watched("finetune", "rero", frame_oversampling=2.0)
    assert seen.counts_BS.shape == (2, 8) and seen.slots_BT.shape == (2, 4)
    assert (seen.counts_BS.sum(dim=1) == int(0.3 * 8 * 16)).all()
    frames = (2 * seen.slots_BT[0][:, None] + torch.arange(2)).flatten()
    assert (seen.clip_BFHWC[0] == clip[0][frames]).all()


def test_a_perfect_prediction_restores_the_clip() -> None:
    config = experiment("pretrain", "rero")
    model, clip = build_model(config).eval(), random_clips(config, 1)
    with torch.no_grad(), Watch(model) as watch:
        output = model(clip, KEYS[:1])
    index = output.predicted_BM[0]
    truth = to_tubelets(clip, config.model.geometry)[:, index].unflatten(-1, (-1, 3)).double()
    normal = (truth - truth.mean(-2, keepdim=True)) / (truth.std(-2, keepdim=True) + 255e-6)
    seen = watch.seen(output._replace(prediction_BMP=normal.flatten(-2).float()))
    assert seen.restored_BFHWC is not None
    assert (seen.restored_BFHWC.int() - clip.int()).abs().max() <= 1
