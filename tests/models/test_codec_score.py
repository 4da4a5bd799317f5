"""Tests of the codec score against a naive loop, and of its tokens on real clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everest_ds.config.tokens import ClipGeometry
from everest_ds.data.decoding.open_video import open_video
from everest_ds.data.decoding.video import NoMotionError
from everest_ds.data.transforms import crop_motion, crop_pictures, needed_by, view_box
from everest_ds.errors import UsageError
from everest_ds.models import Classifier
from everest_ds.models.selection.codec import codec_importance
from everest_ds.models.selection.rero import score_map, select_tokens, token_importance
from everest_ds.models.tubelets import to_tubelets
from tests.models import experiment

VIDEOS = Path(__file__).parents[3] / "shared" / "data" / "videos"


def naive_codec(clip: np.ndarray, moved: np.ndarray, patch: int, frames: int) -> np.ndarray:
    """Score every tubelet by its 4 x 4 samples of green, as the formula of docs/selection.md says."""
    num_slots, grid = len(clip) // frames, clip.shape[1] // patch
    step = patch // 4
    scores = np.zeros((num_slots, grid, grid))

    def samples(slot: int, row: int, column: int) -> np.ndarray:
        at = np.arange(4) * step + step // 2
        rows, columns = row * patch + at, column * patch + at
        pictures = clip[slot * frames : (slot + 1) * frames, :, :, 1].astype(float)
        return np.stack([picture[np.ix_(rows, columns)] for picture in pictures])

    def quarters(values: np.ndarray) -> np.ndarray:
        return np.array([[v[r : r + 2, c : c + 2].mean() for r in (0, 2) for c in (0, 2)] for v in values])

    for slot in range(1, num_slots):
        for row, column in np.ndindex(grid, grid):
            here, before = samples(slot, row, column), samples(slot - 1, row, column)
            brightness = np.mean((quarters(here) - quarters(before)) ** 2)
            down, right = moved[slot, row, column]
            slope_down = np.mean(((here[:, 1:] - here[:, :-1]) / step) ** 2)
            slope_right = np.mean(((here[:, :, 1:] - here[:, :, :-1]) / step) ** 2)
            variance = np.mean(here**2) - np.mean(quarters(here) ** 2)
            shift = min(slope_down * down**2 + slope_right * right**2, 2 * variance)
            scores[slot, row, column] = np.sqrt(brightness + shift)
    scores[0] = scores[1]
    return scores.flatten()


@settings(max_examples=15, deadline=None)
@given(
    patch=st.sampled_from([4, 8, 16]),
    frames=st.sampled_from([1, 2]),
    levels=st.sampled_from([2, 256]),
    pace=st.sampled_from([0.0, 0.3, 5.0]),
    seed=st.integers(0, 99),
)
def test_the_score_is_that_of_a_naive_loop(
    patch: int, frames: int, levels: int, pace: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    geometry = ClipGeometry(3 * frames, frames, 3 * patch, patch)
    clip = rng.integers(0, levels, (3 * frames, 3 * patch, 3 * patch, 3), dtype=np.uint8)
    moved = (pace * rng.normal(size=(3, 3, 3, 2))).astype(np.float32)
    scores = codec_importance(torch.from_numpy(clip), torch.from_numpy(moved), geometry)
    np.testing.assert_allclose(scores, naive_codec(clip, moved, patch, frames), rtol=1e-3, atol=0.02)


@pytest.mark.skipif(not VIDEOS.is_dir(), reason=f"needs the real clips in {VIDEOS}")
def test_most_tokens_are_those_of_the_exact_score_on_real_clips() -> None:
    config = experiment("finetune", "rero", image_size=224, patch_size=16, num_frames=16)
    torch.manual_seed(0)
    score = score_map("embedding", Classifier(config).encoder.embed())
    geometry, num_kept = config.model.geometry, 470
    shares = []
    for path in sorted(VIDEOS.iterdir()):
        try:
            with open_video(path, with_motion=True) as video:
                stride = max(1, min(4, (video.num_frames - 1) // 15))
                pictures = video.read_needed(
                    [stride * index for index in range(16)],
                    lambda size: needed_by([view_box(size.height, size.width, 0, 1)], 224),
                )
        except NoMotionError:
            continue
        box = view_box(pictures.size.height, pictures.size.width, 0, 1)
        clip = crop_pictures(pictures, box, 224)
        assert pictures.motion is not None
        quick = codec_importance(clip, crop_motion(pictures.motion, box, geometry), geometry)[None]
        exact = token_importance(to_tubelets(clip[None], geometry), geometry.num_slots, score, "l2")
        found, wanted = (set(select_tokens(s, num_kept)[0].tolist()) for s in (quick, exact))
        shares.append(len(found & wanted) / num_kept)
    assert len(shares) == 6 and np.mean(shares) >= 0.8


def test_a_model_that_gets_no_kept_tokens_says_so() -> None:
    config = experiment("finetune", "rero", score="codec")
    model, clip = Classifier(config), torch.zeros(1, 8, 64, 64, 3, dtype=torch.uint8)
    with pytest.raises(UsageError, match="score=codec .*motion vectors.*arguments"):
        model(clip, torch.zeros(1, dtype=torch.int64))
