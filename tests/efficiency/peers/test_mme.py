"""Tests of MME's training step: counts, masking, loss, trajectory targets, and learning on real clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from everest_ds.config.backbones import TransformerShape
from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers.hog import hog_targets
from everest_ds.efficiency.peers.mme import MME, build_mme, tracked_tokens, trajectory_targets
from everest_ds.models.selection.masks import split_tubes
from everest_ds.models.tubelets import to_tubelets
from everest_ds.profiling.mac_counter import count_forward
from tests.efficiency.peers.real_clips import real_clips

GEOMETRY = ClipGeometry(num_frames=4, image_size=64)  # 2 slots of 4 x 4 places, 8 x 8 points
KEYS = torch.tensor([5, 6])


def small_mme(attention: str = "fused") -> MME:
    torch.manual_seed(0)
    return build_mme(
        GEOMETRY, TransformerShape(64, 2, 4), TransformerShape(32, 1, 2), mask_ratio=0.7, attention=attention
    )


def random_inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    clips = torch.randint(0, 256, (2, 4, 64, 64, 3), generator=g).byte()
    trajectories = torch.randint(-20, 21, (2, 2, 8, 8, 4, 2), generator=g)
    return clips, KEYS, trajectories, torch.rand(2, 2, 8, 8, generator=g) > 0.4


def test_counts_of_the_published_size() -> None:
    with torch.device("meta"):
        model = build_mme()
    count = count_forward(model, *model.blank_inputs(1))
    assert count.macs == 48_046_587_904
    assert count.layer_norm_elements == 9_874_944
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 87_089_356


@pytest.mark.parametrize("attention", ["fused", "unfused"])
def test_learns_real_clips(attention: str) -> None:
    model = small_mme(attention)
    _, keys, *tracks = random_inputs()
    clips = real_clips(GEOMETRY, "bikes.mp4", "carphone_pristine.mp4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(clips, keys, *tracks)
        optimizer.zero_grad()
        loss.backward()
        still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert still == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_attention_kernels_agree() -> None:
    inputs = random_inputs()
    torch.testing.assert_close(small_mme("fused")(*inputs), small_mme("unfused")(*inputs))


def test_blank_inputs_fit() -> None:
    assert small_mme()(*small_mme().blank_inputs(2)).isfinite()


def test_masked_tubelets_do_not_reach_the_prediction() -> None:
    model = small_mme()
    visible_BV, masked_BM = split_tubes(GEOMETRY, model.num_visible, KEYS)
    tubelets = to_tubelets(random_inputs()[0], GEOMETRY)
    before = model.encoder(tubelets, visible_BV, KEYS)
    tubelets[torch.arange(2)[:, None], masked_BM] = 0
    assert torch.equal(model.encoder(tubelets, visible_BV, KEYS), before)
    tubelets[torch.arange(2)[:, None], visible_BV] = 0
    assert not torch.equal(model.encoder(tubelets, visible_BV, KEYS), before)


def test_loss_is_half_the_squared_errors_over_the_masked_tokens() -> None:
    """The loss follows from the targets alone if the heads always predict 0.5 and 0."""
    model = small_mme()
    for head in (model.hog_head, model.trajectory_head):
        torch.nn.init.zeros_(head.get_parameter("1.weight"))
    clips, keys, trajectories, valid = random_inputs()
    hog = (hog_targets(clips, GEOMETRY) - 0.5).square().sum(-1)
    motion = trajectory_targets(trajectories, GEOMETRY).square().sum(-1)
    motion[~tracked_tokens(valid, GEOMETRY)] = 0
    masked = torch.zeros(2, GEOMETRY.num_tokens, dtype=torch.bool)
    masked[torch.arange(2)[:, None], split_tubes(GEOMETRY, model.num_visible, keys)[1]] = True
    expected = (hog[masked].sum() + motion[masked].sum()) / masked.sum() / 2
    torch.testing.assert_close(model(clips, keys, trajectories, valid), expected)


def test_trajectory_targets_are_standardised_over_the_points_of_a_patch() -> None:
    trajectories = random_inputs()[2]
    targets = trajectory_targets(trajectories, GEOMETRY).unflatten(-1, (2, 4, 2, 2))
    for clip, slot, row, column, step, axis in np.ndindex(2, 2, 4, 4, 4, 2):
        rows, columns = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
        points = trajectories[clip, slot, rows, columns, step, axis].double().numpy() / 20
        expected = (points - points.mean()) / (points.std(ddof=1) + 1e-6)
        ours = targets[clip, 16 * slot + 4 * row + column, axis, step]
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_camera_that_pans_is_no_motion() -> None:
    steps = torch.tensor([3.0, -7.0]).expand(1, 2, 8, 8, 4, 2)
    assert not trajectory_targets(steps, GEOMETRY).any()


def test_a_token_is_tracked_if_one_of_its_points_is() -> None:
    valid = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    valid[0, 1, 3, 4] = True  # slot 1, row 1 and column 2 of the patches
    assert tracked_tokens(valid, GEOMETRY)[0].nonzero().tolist() == [[16 + 4 + 2]]
