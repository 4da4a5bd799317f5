"""Tubelets of a clip: cutting, gathering, embedding, positions and reconstruction targets.

Pixels stay uint8 until a tubelet is needed; only gathered tubelets become floating point.

Shape legend: B clips, F frames, H x W pixels, C = 3 colours, T slots, L places per slot, N = T·L tokens,
K any number of gathered tokens, P = t·p·p·3 values of one tubelet (frame, row, column, colour), D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.linear import XavierLinear, linear

# Mean and standard deviation of ImageNet's RGB values in [0, 1], with which VideoMAE normalises.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
MIDDLE_GREY = 128


def to_tubelets(clip_BFHWC: Tensor, geometry: ClipGeometry) -> Tensor:
    """Cut pixels (B, F, H, W, 3) into tubelets (B, N, P), slot by slot and row by row."""
    t, p = geometry.tubelet_size, geometry.patch_size
    return rearrange(
        clip_BFHWC, "b (s t) (h p) (w q) c -> b (s h w) (t p q c)", t=t, p=p, q=p, s=geometry.num_slots
    )


def from_tubelets(tubelets_BNP: Tensor, geometry: ClipGeometry) -> Tensor:
    """Assemble tubelets (B, N, P) into pixels (B, F, H, W, 3); the inverse of `to_tubelets`."""
    t, p, g = geometry.tubelet_size, geometry.patch_size, geometry.grid_size
    return rearrange(tubelets_BNP, "b (s h w) (t p q c) -> b (s t) (h p) (w q) c", t=t, p=p, q=p, h=g, w=g)


def gather_tokens(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    """Gather the rows of `x_BND` at the token indices `index_BK`: (B, N, D) and (B, K) -> (B, K, D)."""
    num_clips, num_tokens = x_BND.shape[:2]
    first = torch.arange(0, num_clips * num_tokens, num_tokens, device=index_BK.device)
    rows = (index_BK + first[:, None]).flatten()
    return x_BND.flatten(0, 1).index_select(0, rows).unflatten(0, index_BK.shape)  # copies whole rows


def reconstruction_targets(tubelets_BKP: Tensor, normalize: bool) -> Tensor:
    """Compute the targets of the decoder: pixels in [0, 1], normalised within each tubelet and colour.

    The mean is subtracted, then the result is divided by the unbiased standard deviation plus 1e-6 (VideoMAE,
    NeurIPS 2022, section 3).

    Args:
        tubelets_BKP: uint8 tubelets of the predicted tokens.
        normalize: False gives plain pixels in [0, 1].
    """
    values = tubelets_BKP.unflatten(-1, (-1, 3)).float()
    if not normalize:
        return (values / 255).flatten(-2)
    # float32 sums of 0..255 values are exact, so the targets of a uniform tubelet are 0, not rounding
    # errors divided by 1e-6
    mean = values.mean(dim=-2, keepdim=True)
    return ((values - mean) / (values.var(dim=-2, keepdim=True).sqrt() + 255e-6)).flatten(-2)


def sincos_positions(count: int, width: int) -> Tensor:
    """Compute VideoMAE's fixed sine-cosine table over the flat token index: float32 (count, width)."""
    channel = torch.arange(width, dtype=torch.float64)
    frequency = 10000.0 ** (-2 * (channel // 2) / width)
    angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


class PixelMap(NamedTuple):
    """An affine map of the raw pixels of a tubelet: `weight · (pixels - 128) / 128 + bias`.

    The centred pixels, and differences of pixels, are integers of at most 8 bits and a sign, divided by a
    power of two. bfloat16 represents them exactly, so a clip is never rounded on its way into the first GEMM.

    Attributes:
        weight_DP: change of the output per 128 levels of a pixel.
        bias_D: output for a tubelet whose pixels are all 128 (grey).
    """

    weight_DP: Tensor
    bias_D: Tensor

    def __call__(self, tubelets_BKP: Tensor) -> Tensor:
        """Apply the map to uint8 tubelets: (B, K, P) -> (B, K, D), in the dtype of the weight."""
        centered = (tubelets_BKP.to(self.weight_DP.dtype) - MIDDLE_GREY) / MIDDLE_GREY
        return linear(centered, self.weight_DP, self.bias_D)


class TubeletEmbedding(XavierLinear):
    """The patch embedding: VideoMAE's Conv3d with kernel = stride, written as a linear map.

    Input values are in (frame, row, column, colour) order, as in `to_tubelets` and in the targets of the
    decoder, so a tubelet is gathered once for both.
    """

    def __init__(self, geometry: ClipGeometry, width: int) -> None:
        super().__init__(geometry.tubelet_values, width)

    def forward(self) -> PixelMap:  # type: ignore[override]
        """Return the embedding as a map of raw pixels, with the normalisation folded into its weights.

        The map is computed once per step, for scoring and for embedding. The method takes no pixels because
        under ZeRO-3 a weight can only be read in the forward pass of its own module: it is thus gathered
        once.
        """
        scale_P, grey_P = normalization_of_pixels(self.in_features, self.weight.device)
        folded = self.weight * scale_P  # float32 in any weight precision, as scale_P is float32
        bias = self.bias + (self.weight * grey_P).sum(dim=1)
        return PixelMap(folded.to(self.weight.dtype), bias.to(self.weight.dtype))


def normalization_of_pixels(num_values: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ImageNet's normalisation of the P values of a tubelet, as a scale and an offset.

    Returns:
        float32 (P,) and (P,): the normalised change per 128 levels, and the normalised value of level 128.
    """
    scale = _per_colour([MIDDLE_GREY / (255 * std) for std in PIXEL_STD], device)
    grey = [(MIDDLE_GREY / 255 - m) / std for m, std in zip(PIXEL_MEAN, PIXEL_STD, strict=True)]
    repeats = num_values // len(PIXEL_STD)
    return scale.repeat(repeats), _per_colour(grey, device).repeat(repeats)


def normalize_pixels(tubelets_BKP: Tensor) -> Tensor:
    """Normalise uint8 RGB by ImageNet's statistics to float32 of zero mean and unit variance."""
    scale_P, grey_P = normalization_of_pixels(tubelets_BKP.shape[-1], tubelets_BKP.device)
    return (tubelets_BKP.float() - MIDDLE_GREY) / MIDDLE_GREY * scale_P + grey_P


def _per_colour(values: list[float], device: torch.device) -> Tensor:
    # Filled on the device, because torch.tensor would copy from the host and synchronise. A module buffer
    # would not do, because a half-precision engine would cast it.
    return torch.cat([torch.full((1,), value, device=device) for value in values])
