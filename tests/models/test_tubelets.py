"""Tests of tubelets: cutting, joining, embedding, targets and positions against independent formulas."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.tubelets import (
    PIXEL_MEAN,
    PIXEL_STD,
    PixelMap,
    TubeletEmbedding,
    from_tubelets,
    gather_tokens,
    normalize_pixels,
    reconstruction_targets,
    sincos_positions,
    to_tubelets,
)

geometries = st.builds(
    lambda slots, tubelet, grid, patch: ClipGeometry(slots * tubelet, tubelet, grid * patch, patch),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([2, 4]),
)


def random_clip(geometry: ClipGeometry, count: int = 2) -> torch.Tensor:
    size = (count, geometry.num_frames, geometry.image_size, geometry.image_size, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@settings(deadline=None)
@given(geometry=geometries)
def test_tubelets_are_the_pixels_of_their_slot_and_place_and_join_to_the_clip(geometry: ClipGeometry) -> None:
    clip = random_clip(geometry)
    tubelets = to_tubelets(clip, geometry)
    assert tubelets.shape == (2, geometry.num_tokens, geometry.tubelet_values)
    t, p = geometry.tubelet_size, geometry.patch_size
    for token in range(geometry.num_tokens):
        slot, place = divmod(token, geometry.tokens_per_slot)
        row, column = divmod(place, geometry.grid_size)
        cut = clip[:, slot * t :, row * p :, column * p :][:, :t, :p, :p]
        assert torch.equal(tubelets[:, token], cut.flatten(1))
    assert torch.equal(from_tubelets(tubelets, geometry), clip)


def test_gather_takes_the_rows_named_for_each_clip() -> None:
    x = torch.arange(24).view(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(gather_tokens(x, index), torch.stack([x[0, [3, 0]], x[1, [1, 1]]]))


def test_embedding_is_a_conv3d_with_kernel_equal_to_stride() -> None:
    geometry, width = ClipGeometry(8, 2, 64, 16), 24
    embed, clip = TubeletEmbedding(geometry, width), random_clip(geometry)
    weight = embed.weight.view(width, 2, 16, 16, 3).permute(0, 4, 1, 2, 3)
    pixels = (clip / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    volume = F.conv3d(pixels.permute(0, 4, 1, 2, 3), weight, embed.bias, stride=(2, 16, 16))
    expected = volume.flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed()(to_tubelets(clip, geometry)), expected, rtol=1e-5, atol=1e-5)


def test_embedding_of_some_tubelets_is_that_part_of_the_embedding_of_all() -> None:
    geometry = ClipGeometry(4, 2, 32, 16)
    embed, tubelets = TubeletEmbedding(geometry, 16), to_tubelets(random_clip(geometry), geometry)
    index = torch.tensor([[5, 0, 7], [1, 2, 3]])
    embedding = embed()
    some = embedding(gather_tokens(tubelets, index))
    torch.testing.assert_close(some, gather_tokens(embedding(tubelets), index))


def test_pixels_are_normalised_by_the_statistics_of_imagenet() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat_interleave(3)[None, None]
    normal = normalize_pixels(pixels)
    for colour in range(3):
        expected = [(value / 255 - PIXEL_MEAN[colour]) / PIXEL_STD[colour] for value in range(256)]
        torch.testing.assert_close(normal[0, 0, colour::3], torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_weights_but_no_pixel(dtype: torch.dtype) -> None:
    """A half-precision map that selects a single pixel value returns this value exactly."""
    levels = torch.arange(256, dtype=torch.uint8)[None, :, None].expand(1, 256, 6)
    one = torch.eye(6)[:1].to(dtype)
    values = PixelMap(one, torch.zeros(1, dtype=dtype))(levels)
    assert values.dtype == dtype
    assert torch.equal(values[0, :, 0].float() * 128 + 128, torch.arange(256.0))


def test_the_embedding_of_a_half_precision_model_is_near_that_of_the_full_one() -> None:
    geometry = ClipGeometry(4, 2, 32, 16)
    embed, tubelets = TubeletEmbedding(geometry, 16), to_tubelets(random_clip(geometry), geometry)
    full = embed()(tubelets)
    half = embed.bfloat16()()(tubelets).float()
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.02)


def test_targets_are_pixels_normalised_within_tubelet_and_colour() -> None:
    geometry = ClipGeometry(2, 2, 8, 4)
    tubelets = to_tubelets(random_clip(geometry), geometry)
    targets = reconstruction_targets(tubelets, normalize=True)
    for clip in range(2):
        for token in range(geometry.num_tokens):
            for colour in range(3):
                values = [value / 255 for value in tubelets[clip, token, colour::3].tolist()]
                mean, deviation = statistics.fmean(values), statistics.stdev(values)
                expected = torch.tensor([(value - mean) / (deviation + 1e-6) for value in values])
                torch.testing.assert_close(targets[clip, token, colour::3], expected, rtol=1e-4, atol=1e-5)


def test_targets_without_normalisation_are_pixels_from_zero_to_one() -> None:
    tubelets = torch.tensor([[[0, 51, 255]]], dtype=torch.uint8)
    torch.testing.assert_close(reconstruction_targets(tubelets, False), torch.tensor([[[0.0, 0.2, 1.0]]]))


def test_targets_of_still_tubelets_are_zero() -> None:
    """A tubelet of zero variance has targets 0, not rounding errors of its mean divided by 1e-6."""
    grey = torch.arange(256, dtype=torch.uint8)[None, :, None].expand(1, 256, 1536)
    assert not reconstruction_targets(grey, normalize=True).any()


@pytest.mark.parametrize(("count", "width"), [(5, 4), (16, 128), (1568, 6)])
def test_positions_are_the_sines_and_cosines_of_the_transformer_paper(count: int, width: int) -> None:
    table = sincos_positions(count, width)
    assert table.shape == (count, width) and table.dtype == torch.float32
    for position in {0, 1, count // 2, count - 1}:
        for pair in range(width // 2):
            angle = position / math.pow(10000, 2 * pair / width)
            assert table[position, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
