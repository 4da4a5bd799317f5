"""Tests of IIFS: the drawn slots against exact inclusion probabilities, and edge cases."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everest_ds.models import PretrainModel, build_model
from everest_ds.models.selection.slots import draw_slots, gather_slots, tokens_per_slot
from everest_ds.models.tubelets import from_tubelets, to_tubelets
from tests.models import experiment, random_clips


def inclusion_probabilities(counts: tuple[int, ...], num_drawn: int) -> list[float]:
    """Compute the probability that each slot is drawn, by enumerating all orders of sequential drawing."""

    @cache
    def given_left(left: frozenset[int], draws: int) -> tuple[float, ...]:
        included = [0.0] * len(counts)
        total = sum(counts[i] for i in left)
        if draws == 0:
            return tuple(included)
        for i in left:
            chance = counts[i] / total if total else 1 / len(left)  # only empty slots are left: uniform
            if chance:
                later = given_left(left - {i}, draws - 1)
                for j in range(len(counts)):
                    included[j] += chance * (1.0 if j == i else later[j])
        return tuple(included)

    return list(given_left(frozenset(range(len(counts))), num_drawn))


@pytest.mark.parametrize(
    ("counts", "num_drawn"),
    [
        ((40, 30, 20, 10, 5, 1), 4),
        ((7, 7, 7, 7), 2),
        ((100, 1, 1, 1, 1, 1), 3),
        ((9, 0, 0, 4, 0, 1), 4),  # fewer non-empty slots than are drawn
        ((0, 0, 0, 0, 0), 3),  # a still clip
    ],
)
def test_draw_has_the_exact_inclusion_probabilities(counts: tuple[int, ...], num_drawn: int) -> None:
    draws = 40_000
    drawn = draw_slots(torch.tensor(counts).expand(draws, -1), num_drawn, torch.arange(draws) * 7919)
    often = torch.bincount(drawn.flatten(), minlength=len(counts)) / draws
    for seen, exact in zip(often.tolist(), inclusion_probabilities(counts, num_drawn), strict=True):
        deviation = math.sqrt(exact * (1 - exact) / draws)
        assert abs(seen - exact) <= 5 * deviation + 1e-12


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=12), key=st.integers(0, 2**62), data=st.data()
)
def test_drawn_slots_are_distinct_in_time_order_busy_first_and_replay(
    counts: list[int], key: int, data: st.DataObject
) -> None:
    num_drawn = data.draw(st.integers(1, len(counts)))
    count_BS, key_B = torch.tensor([counts]), torch.tensor([key])
    drawn = draw_slots(count_BS, num_drawn, key_B)
    assert bool((drawn.diff(dim=1) > 0).all()) and drawn.shape == (1, num_drawn)
    assert torch.equal(drawn, draw_slots(count_BS, num_drawn, key_B))
    busy = sum(count > 0 for count in counts)
    assert sum(counts[i] > 0 for i in drawn[0].tolist()) == min(busy, num_drawn)


def test_counts_are_of_kept_tokens_by_slot() -> None:
    keep = torch.tensor([[0, 1, 5, 11], [4, 5, 6, 7]])
    assert tokens_per_slot(keep, 3, 4).tolist() == [[2, 1, 1], [0, 4, 0]]


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_a_model_on_candidates_is_the_model_on_the_drawn_frames(task: str) -> None:
    """A plain model on the clip of the drawn slots gives the same output as the model with IIFS."""
    plain = experiment(task, "rero")
    iifs = experiment(task, "rero", frame_oversampling=1.5)
    torch.manual_seed(0)
    model: Any = build_model(plain).eval()
    chosen: Any = build_model(iifs).eval()
    chosen.load_state_dict(model.state_dict())
    clips, keys = random_clips(iifs, 3), torch.tensor([4, 5, 6])
    assert clips.shape[1] == 12
    geometry = plain.model.geometry
    slots = chosen.selector(clips, chosen.encoder.embed(), keys).slots_BT
    drawn = gather_slots(to_tubelets(clips, iifs.candidate_geometry), slots, geometry.tokens_per_slot)
    expected, output = model(from_tubelets(drawn, geometry), keys), chosen(clips, keys)
    if isinstance(model, PretrainModel):
        expected, output = expected.prediction_BMP, output.prediction_BMP
    assert torch.equal(output, expected)


def test_busy_slots_are_drawn_and_still_ones_are_not() -> None:
    config = experiment("finetune", "rero", 0.2, frame_oversampling=2.0)
    clip = random_clips(config, 1)
    clip[:, 6:] = clip[:, 6:7]  # slots 3 to 7 show one picture; only slot 3 differs from its predecessor
    model: Any = build_model(config)
    for key in range(20):
        slots = model.selector(clip, model.encoder.embed(), torch.tensor([key])).slots_BT
        assert set(slots[0].tolist()) == {0, 1, 2, 3}


def test_without_oversampling_every_slot_is_used() -> None:
    config = experiment("pretrain", "rero")
    output = build_model(config)(random_clips(config, 2), torch.tensor([1, 2]))
    assert output.slots_BT.tolist() == [[0, 1, 2, 3]] * 2
