"""Tests of interpolated position tables against an independent linear interpolation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from everest_ds.config import Experiment
from everest_ds.config.schema import ModelConfig
from everest_ds.models import build_model
from everest_ds.models.positions import encoder_positions, fixed_positions

_WIDTH = 32


def neighbours(new: int, place: int, old: int) -> list[tuple[int, float]]:
    """Return the old places between which the centre of a new place lies, with their weights."""
    centre = min(max((place + 0.5) * old / new - 0.5, 0), old - 1)
    below = math.floor(centre)
    return [(below, 1 - (centre - below)), (min(below + 1, old - 1), centre - below)]


@pytest.mark.parametrize("kind", ["flat", "grid"])
@pytest.mark.parametrize(
    ("frames", "pixels"), [(4, 64), (16, 64), (32, 64), (8, 32), (8, 96), (12, 80), (6, 48)]
)
def test_a_table_is_interpolated_over_slots_rows_and_columns(kind: str, frames: int, pixels: int) -> None:
    learned = {"num_frames": 8, "image_size": 64}
    model = ModelConfig(num_frames=frames, image_size=pixels, positions=kind, positions_from=learned)
    table = fixed_positions(kind, ModelConfig(**learned).geometry, _WIDTH)
    old = table.double().numpy().reshape(4, 4, 4, _WIDTH)
    num_slots, side = model.geometry.num_slots, model.geometry.grid_size
    expected = np.zeros((num_slots, side, side, _WIDTH))
    for slot, row, column in np.ndindex(num_slots, side, side):
        axes = (neighbours(num_slots, slot, 4), neighbours(side, row, 4), neighbours(side, column, 4))
        for (t, a), (y, b), (x, c) in itertools.product(*axes):
            expected[slot, row, column] += a * b * c * old[t, y, x]
    found = encoder_positions(model, _WIDTH)
    assert found.shape == (model.geometry.num_tokens, _WIDTH)
    np.testing.assert_allclose(found.numpy(), expected.reshape(-1, _WIDTH), atol=1e-6)


def test_the_own_clip_shape_needs_no_interpolation() -> None:
    own = ModelConfig(num_frames=8, image_size=64)
    same = ModelConfig(num_frames=8, image_size=64, positions_from={"num_frames": 8, "image_size": 64})
    assert torch.equal(encoder_positions(same, _WIDTH), encoder_positions(own, _WIDTH))


@pytest.mark.parametrize("kind", ["flat", "grid"])
def test_a_new_decoder_numbers_the_tokens_of_the_long_clip(kind: str) -> None:
    """Pre-training goes on from an encoder of short clips, but its decoder has learned no positions yet."""
    clip = {"backbone": "vit_tiny", "num_frames": 32, "image_size": 64, "positions": kind}
    learned = {"num_frames": 8, "image_size": 64}
    config = {"task": "pretrain", "model": {**clip, "positions_from": learned}}
    model: Any = build_model(Experiment.model_validate(config))
    own, width = ModelConfig(**clip), 64
    assert torch.equal(model.decoder_positions, fixed_positions(kind, own.geometry, width))
    assert not torch.equal(model.encoder.positions, encoder_positions(own, 128))


@pytest.mark.parametrize(
    ("learned", "says"),
    [
        ({"num_frames": 9, "image_size": 64}, "positions_from.num_frames=9 is not a multiple"),
        ({"num_frames": 8, "image_size": 65}, "positions_from.image_size=65 is not a multiple"),
        ({"num_frames": 8}, "image_size"),
    ],
)
def test_a_clip_shape_that_does_not_exist_is_refused(learned: dict[str, int], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ModelConfig(positions_from=learned)
