"""Tests of ReRo against a naive loop over tokens: all scores and distances, ties and real clips."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everest_ds.models import Classifier
from everest_ds.models.selection import rero
from everest_ds.models.selection.rero import score_map, select_tokens, token_importance
from everest_ds.models.tubelets import (
    PIXEL_MEAN,
    PIXEL_STD,
    PixelMap,
    TubeletEmbedding,
    normalize_pixels,
    to_tubelets,
)
from tests.models import experiment, random_clips

VIDEOS = Path(__file__).parents[3] / "shared" / "data" / "videos"


def naive_distance(later: list[float], earlier: list[float], distance: str) -> float:
    if distance == "l2":
        return math.dist(later, earlier)
    if distance == "l1":
        return sum(abs(a - b) for a, b in zip(later, earlier, strict=True))
    lengths = math.hypot(*later) * math.hypot(*earlier)
    return 1 - sum(a * b for a, b in zip(later, earlier, strict=True)) / lengths


def naive_importance(features_ND: list[list[float]], num_slots: int, distance: str = "l2") -> list[float]:
    """Compute the distance of each token to its predecessor in time; slot 0 takes the distance of slot 1."""
    places = len(features_ND) // num_slots
    importance = []
    for token in range(len(features_ND)):
        later = token if token >= places else token + places
        importance.append(naive_distance(features_ND[later], features_ND[later - places], distance))
    return importance


def naive_selection(importance_N: list[float], num_kept: int) -> list[int]:
    """Select the most important tokens; of two equally important tokens, the earlier has priority."""
    ranked = sorted(range(len(importance_N)), key=lambda token: (-importance_N[token], token))
    return sorted(ranked[:num_kept])


class Case(NamedTuple):
    """Tubelets of few pixel levels, which give many ties, with an integer map of them, T and K."""

    tubelets_BNP: Tensor
    score: PixelMap
    num_slots: int
    num_kept: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    slots, places, colours = draw(st.integers(2, 9)), draw(st.integers(1, 12)), 3 * draw(st.integers(1, 3))
    levels = draw(st.integers(1, 4))  # 1: a still clip
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = (draw(st.integers(1, 3)), slots * places, colours)
    tubelets = torch.randint(0, levels, size, generator=generator).byte()
    weight = torch.randint(-3, 4, (draw(st.integers(1, 4)), colours), generator=generator).float()
    bias = torch.full((len(weight),), 500.0)  # keeps features away from zero, where a cosine is undefined
    return Case(tubelets, PixelMap(weight * 128, bias), slots, draw(st.integers(1, slots * places)))


@settings(deadline=None)
@given(case=cases(), distance=st.sampled_from(["l2", "l1"]))
def test_selection_equals_a_naive_loop_whatever_the_ties(case: Case, distance: str) -> None:
    importance_BN = token_importance(case.tubelets_BNP, case.num_slots, case.score, distance)
    keep_BK = select_tokens(importance_BN, case.num_kept)
    for features_ND, keep_K in zip(case.score(case.tubelets_BNP), keep_BK, strict=True):
        importance = naive_importance(features_ND.tolist(), case.num_slots, distance)
        assert keep_K.tolist() == naive_selection(importance, case.num_kept)


@settings(deadline=None)
@given(case=cases(), distance=st.sampled_from(["l2", "l1", "cosine"]), of_pixels=st.booleans())
def test_importance_equals_a_naive_loop(case: Case, distance: str, of_pixels: bool) -> None:
    features = normalize_pixels(case.tubelets_BNP) if of_pixels else case.score(case.tubelets_BNP)
    score = None if of_pixels else case.score
    importance_BN = token_importance(case.tubelets_BNP, case.num_slots, score, distance)
    expected = [naive_importance(clip.tolist(), case.num_slots, distance) for clip in features]
    torch.testing.assert_close(importance_BN, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_importance_of_half_precision_features_is_float32() -> None:
    tubelets = torch.tensor([0, 0, 255, 255], dtype=torch.uint8)[None, :, None].expand(1, 4, 3)
    wide = PixelMap(torch.full((300, 3), 80.0).half(), torch.zeros(300).half())  # squares overflow float16
    importance_BN = token_importance(tubelets, 2, wide, "l2")
    assert importance_BN.dtype == torch.float32
    expected = torch.full((1, 4), 3 * 80 * 255 / 128 * math.sqrt(300))
    torch.testing.assert_close(importance_BN, expected, rtol=1e-3, atol=0)


def test_scoring_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = experiment("finetune", "rero")
    embedding = TubeletEmbedding(config.model.geometry, 16)()
    tubelets = to_tubelets(random_clips(config, 5), config.model.geometry)
    whole = token_importance(tubelets, 4, embedding, "l2")
    monkeypatch.setattr(rero, "_CPU_CHUNK_TOKENS", 2 * 64)
    torch.testing.assert_close(token_importance(tubelets, 4, embedding, "l2"), whole)


def test_the_sketch_keeps_squared_distances_in_expectation() -> None:
    """The sketch preserves the mean squared distance, with a deviation of about √(2/72) at 72 features."""
    directions = torch.randn(768, 4000, generator=torch.Generator().manual_seed(0))
    weight = PixelMap(directions / directions.norm(dim=0), torch.zeros(768))
    sketch = score_map("sketch", weight)
    assert sketch is not None and sketch.weight_DP.shape == (72, 4000)
    squares = sketch.weight_DP.square().sum(dim=0)
    assert squares.mean().item() == pytest.approx(1, abs=0.02)
    assert squares.std().item() == pytest.approx(math.sqrt(2 / 72), rel=0.1)
    assert torch.equal(sketch.weight_DP, score_map("sketch", weight).weight_DP)  # type: ignore[union-attr]


@pytest.mark.skipif(not VIDEOS.is_dir(), reason=f"no real clips: {VIDEOS} is missing")
@pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is not installed")
@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4"])
def test_selection_on_a_real_clip_equals_conv3d_and_a_naive_loop(name: str) -> None:
    config = experiment("finetune", "rero", keep_ratio=0.6, num_frames=16, image_size=224)
    clip = decode(VIDEOS / name)
    torch.manual_seed(0)
    model = Classifier(config)
    keep = set(model.selector(clip, model.encoder.embed(), torch.tensor([0])).visible_BV[0].tolist())
    importance = naive_importance(conv3d_embedding(model.encoder.embed.weight, clip).tolist(), num_slots=8)
    naive = set(naive_selection(importance, num_kept=940))
    threshold = min(importance[token] for token in naive)
    assert len(keep) == 940
    for token in keep ^ naive:  # float32 may only swap tokens whose importance is almost equal in float64
        assert importance[token] == pytest.approx(threshold, rel=1e-5)
    assert len(keep ^ naive) <= 4


def decode(path: Path) -> Tensor:
    """Read 16 frames at stride 4 and their central crop: uint8 (1, 16, 224, 224, 3)."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    frames = reader.get_batch(np.arange(16) * 4 % len(reader)).asnumpy()
    top, left = (frames.shape[1] - 224) // 2, (frames.shape[2] - 224) // 2
    return torch.from_numpy(frames[None, :, top : top + 224, left : left + 224].copy())


def conv3d_embedding(weight_DP: Tensor, clip: Tensor) -> Tensor:
    """Compute VideoMAE's patch embedding of a clip without bias, which distances cancel: float64 (N, D)."""
    kernel = weight_DP.detach().double().view(-1, 2, 16, 16, 3).permute(0, 4, 1, 2, 3)
    pixels = (clip.double() / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    volume = F.conv3d(pixels.permute(0, 4, 1, 2, 3), kernel, stride=(2, 16, 16))
    return volume.flatten(2).transpose(1, 2)[0]
