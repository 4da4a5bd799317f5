"""The selector against a naive loop over tokens, and the fairness of what is shown and hidden."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everest_ds.models import Classifier
from everest_ds.models.rero import select_tokens, split_kept, split_tubes, token_importance
from everest_ds.models.tubelets import PIXEL_MEAN, PIXEL_STD, to_tubelets
from tests.models import experiment

VIDEOS = Path(__file__).parents[3] / "shared" / "data" / "videos"


def naive_importance(embedding_ND: list[list[float]], num_slots: int) -> list[float]:
    """One token at a time: the distance to its predecessor in time; slot 0 takes slot 1's."""
    places = len(embedding_ND) // num_slots
    importance = []
    for token in range(len(embedding_ND)):
        later = token if token >= places else token + places
        importance.append(math.dist(embedding_ND[later], embedding_ND[later - places]))
    return importance


def naive_selection(importance_N: list[float], num_kept: int) -> list[int]:
    """The most important first, the earlier of two equals first."""
    ranked = sorted(range(len(importance_N)), key=lambda token: (-importance_N[token], token))
    return sorted(ranked[:num_kept])


@st.composite
def embeddings_with_ties(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Small whole numbers, whose distances are exact and often equal; with T and K."""
    slots, places, width = draw(st.integers(2, 9)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    largest = draw(st.integers(0, 3))  # 0: a still clip
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = (draw(st.integers(1, 3)), slots * places, width)
    values = torch.randint(-largest, largest + 1, size, generator=generator).float()
    return values, slots, draw(st.integers(1, slots * places))


@settings(deadline=None)
@given(case=embeddings_with_ties())
def test_selection_equals_a_naive_loop_whatever_the_ties(case: tuple[Tensor, int, int]) -> None:
    embedding_BND, num_slots, num_kept = case
    keep_BK = select_tokens(token_importance(embedding_BND, num_slots), num_kept)
    for embedding_ND, keep_K in zip(embedding_BND, keep_BK, strict=True):
        importance = naive_importance(embedding_ND.tolist(), num_slots)
        assert keep_K.tolist() == naive_selection(importance, num_kept)


@settings(deadline=None)
@given(slots=st.integers(2, 8), places=st.integers(1, 10), seed=st.integers(0, 2**31))
def test_importance_equals_a_naive_loop(slots: int, places: int, seed: int) -> None:
    embedding_BND = torch.randn(2, slots * places, 16, generator=torch.Generator().manual_seed(seed))
    importance_BN = token_importance(embedding_BND, slots)
    expected = [naive_importance(clip.tolist(), slots) for clip in embedding_BND]
    torch.testing.assert_close(importance_BN, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_importance_of_half_precision_embeddings_is_float32() -> None:
    embedding_BND = torch.full((1, 4, 300), 100.0, dtype=torch.float16)
    embedding_BND[0, 2:] = -100.0  # the squares' sum is beyond float16
    importance_BN = token_importance(embedding_BND, 2)
    assert importance_BN.dtype == torch.float32
    torch.testing.assert_close(importance_BN, torch.full((1, 4), 200 * math.sqrt(300)))


@settings(deadline=None)
@given(num_kept=st.integers(1, 60), data=st.data(), keys=st.lists(st.integers(0, 2**62), max_size=4))
def test_visible_and_predicted_partition_the_kept(
    num_kept: int, data: st.DataObject, keys: list[int]
) -> None:
    num_visible = data.draw(st.integers(0, num_kept))
    generator = torch.Generator().manual_seed(num_kept)
    rows = [torch.randperm(100, generator=generator)[:num_kept].sort().values for _ in (0, *keys)]
    keep_BK = torch.stack(rows)
    visible, predicted = split_kept(keep_BK, num_visible, torch.tensor([7, *keys]))
    assert visible.shape[1] == num_visible
    assert torch.equal(torch.cat([visible, predicted], dim=1).sort(dim=1).values, keep_BK)
    for part in (visible, predicted):
        assert bool((part.diff(dim=1) > 0).all())


def test_every_kept_token_is_equally_often_visible() -> None:
    draws, num_kept, num_visible = 5000, 60, 20
    keep_BK = torch.arange(3, 3 + 2 * num_kept, 2).expand(draws, -1)
    visible, _ = split_kept(keep_BK, num_visible, torch.arange(draws))
    assert_equally_often(torch.bincount((visible.flatten() - 3) // 2, minlength=num_kept), draws, num_visible)


def test_every_place_is_equally_often_visible_through_a_tube() -> None:
    draws, places, num_slots = 5000, 49, 2
    visible, _ = split_tubes(num_slots, places, 2 * 10, torch.arange(draws))
    assert_equally_often(torch.bincount(visible[:, :10].flatten(), minlength=places), draws, 10)


@settings(deadline=None)
@given(slots=st.integers(1, 8), places=st.integers(1, 30), data=st.data())
def test_tubes_show_the_same_places_in_every_slot(slots: int, places: int, data: st.DataObject) -> None:
    shown = data.draw(st.integers(0, places))
    visible, predicted = split_tubes(slots, places, slots * shown, torch.tensor([5, 6]))
    by_slot = visible.view(2, slots, shown)
    assert torch.equal(by_slot % places, (by_slot % places)[:, :1].expand_as(by_slot))
    everything = torch.cat([visible, predicted], dim=1).sort(dim=1).values
    assert everything.tolist() == [list(range(slots * places))] * 2
    assert bool((visible.diff(dim=1) > 0).all()) and bool((predicted.diff(dim=1) > 0).all())


@pytest.mark.skipif(not VIDEOS.is_dir(), reason=f"no real clips: {VIDEOS} is missing")
@pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is not installed")
@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4"])
def test_selection_on_a_real_clip_equals_conv3d_and_a_naive_loop(name: str) -> None:
    config = experiment("finetune", "rero", keep_ratio=0.6, num_frames=16, image_size=224)
    clip = decode(VIDEOS / name)
    torch.manual_seed(0)
    model = Classifier(config)
    keep = set(model.choose_tokens(to_tubelets(clip, config.model.geometry))[0].tolist())
    importance = naive_importance(conv3d_embedding(model.encoder.embed.weight, clip).tolist(), num_slots=8)
    naive = set(naive_selection(importance, num_kept=940))
    threshold = min(importance[token] for token in naive)
    assert len(keep) == 940
    for token in keep ^ naive:  # float32 may swap only what float64 can hardly tell apart
        assert importance[token] == pytest.approx(threshold, rel=1e-5)
    assert len(keep ^ naive) <= 4


def decode(path: Path) -> Tensor:
    """uint8 (1, 16, 224, 224, 3): frames at stride 4, the middle of each."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    frames = reader.get_batch(np.arange(16) * 4 % len(reader)).asnumpy()
    top, left = (frames.shape[1] - 224) // 2, (frames.shape[2] - 224) // 2
    return torch.from_numpy(frames[None, :, top : top + 224, left : left + 224].copy())


def conv3d_embedding(weight_DP: Tensor, clip: Tensor) -> Tensor:
    """float64 (N, D): VideoMAE's patch embedding of the clip, without the bias that distances cancel."""
    kernel = weight_DP.detach().double().view(-1, 2, 16, 16, 3).permute(0, 4, 1, 2, 3)
    pixels = (clip.double() / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    volume = F.conv3d(pixels.permute(0, 4, 1, 2, 3), kernel, stride=(2, 16, 16))
    return volume.flatten(2).transpose(1, 2)[0]


def assert_equally_often(counts: Tensor, draws: int, taken: int) -> None:
    """Chi-square of taking `taken` of len(counts) without replacement, within 5 standard deviations."""
    size = len(counts)
    expected = draws * taken / size
    assert counts.sum() == draws * taken
    variance = expected * (1 - taken / size)
    chi_square = ((counts - expected) ** 2).sum().item() / variance * (size - 1) / size
    assert abs(chi_square - (size - 1)) < 5 * math.sqrt(2 * (size - 1))
