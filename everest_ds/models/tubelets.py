"""Clips as tubelets: cutting, gathering, embedding and placing them.

Pixels stay uint8 until a tubelet is known to be needed; only gathered tubelets become floating point.

Shape legend: B clips, F frames, H x W pixels, C = 3 colours, T slots, L places a slot, N = T·L tokens,
K any number of gathered tokens, P = t·p·p·3 values of a tubelet (frame, row, column, colour), D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.linear import XavierLinear, linear

# Mean and standard deviation of ImageNet's RGB values in [0, 1], which VideoMAE normalises with.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
MIDDLE_GREY = 128


def to_tubelets(clip_BFHWC: Tensor, geometry: ClipGeometry) -> Tensor:
    """(B, F, H, W, 3) pixels -> (B, N, P) tubelets, slot by slot, row by row."""
    t, p = geometry.tubelet_size, geometry.patch_size
    return rearrange(
        clip_BFHWC, "b (s t) (h p) (w q) c -> b (s h w) (t p q c)", t=t, p=p, q=p, s=geometry.num_slots
    )


def from_tubelets(tubelets_BNP: Tensor, geometry: ClipGeometry) -> Tensor:
    """Inverse of `to_tubelets`."""
    t, p, g = geometry.tubelet_size, geometry.patch_size, geometry.grid_size
    return rearrange(tubelets_BNP, "b (s h w) (t p q c) -> b (s t) (h p) (w q) c", t=t, p=p, q=p, h=g, w=g)


def gather_tokens(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    """(B, N, D) and (B, K) -> (B, K, D): the rows named by `index_BK`."""
    num_clips, num_tokens = x_BND.shape[:2]
    first = torch.arange(0, num_clips * num_tokens, num_tokens, device=index_BK.device)
    rows = (index_BK + first[:, None]).flatten()
    return x_BND.flatten(0, 1).index_select(0, rows).unflatten(0, index_BK.shape)  # whole rows at a time


def reconstruction_targets(tubelets_BKP: Tensor, normalize: bool) -> Tensor:
    """What the decoder must predict: pixels in [0, 1], normalised within each tubelet and colour.

    Minus the mean, over the unbiased standard deviation plus 1e-6 (VideoMAE, NeurIPS 2022, section 3).

    Args:
        tubelets_BKP: uint8 tubelets of the predicted tokens.
        normalize: False gives plain pixels in [0, 1].
    """
    values = tubelets_BKP.unflatten(-1, (-1, 3)).float()
    if not normalize:
        return (values / 255).flatten(-2)
    # on the scale of 0..255 float32 sums are exact: a still tubelet's targets are 0, not rounding over 1e-6
    mean = values.mean(dim=-2, keepdim=True)
    return ((values - mean) / (values.var(dim=-2, keepdim=True).sqrt() + 255e-6)).flatten(-2)


def sincos_positions(count: int, width: int) -> Tensor:
    """Fixed sine-cosine table over the flat token index, float32 (count, width), as in VideoMAE."""
    channel = torch.arange(width, dtype=torch.float64)
    frequency = 10000.0 ** (-2 * (channel // 2) / width)
    angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


class PixelMap(NamedTuple):
    """An affine map of tubelets as raw pixels: `weight · (pixels - 128) / 128 + bias`.

    Such values, and differences of pixels, are whole numbers of at most 8 bits and a sign over a power of
    two, which bfloat16 holds exactly; so a clip is never rounded on its way into the first GEMM.

    Attributes:
        weight_DP: what 128 levels of a pixel are worth.
        bias_D: the value of an all-128 grey tubelet.
    """

    weight_DP: Tensor
    bias_D: Tensor

    def __call__(self, tubelets_BKP: Tensor) -> Tensor:
        """uint8 (B, K, P) -> (B, K, D) in the map's dtype."""
        centered = (tubelets_BKP.to(self.weight_DP.dtype) - MIDDLE_GREY) / MIDDLE_GREY
        return linear(centered, self.weight_DP, self.bias_D)


class TubeletEmbedding(XavierLinear):
    """The patch embedding: VideoMAE's Conv3d with kernel = stride, as the one linear map it is.

    Input values are in (frame, row, column, colour) order, as `to_tubelets` gives them and as the
    decoder's targets are, so a tubelet is gathered once for both.
    """

    def __init__(self, geometry: ClipGeometry, width: int) -> None:
        super().__init__(geometry.tubelet_values, width)

    def forward(self) -> PixelMap:  # type: ignore[override]
        """The embedding with the normalisation folded into it, once a step, for scoring and embedding.

        Takes no pixels: under ZeRO-3 a weight can be read in its own module's forward only, and this way it
        is gathered once.
        """
        scale_P, grey_P = normalization_of_pixels(self.in_features, self.weight.device)
        folded = self.weight * scale_P  # float32, whatever the weight's precision
        bias = self.bias + (self.weight * grey_P).sum(dim=1)
        return PixelMap(folded.to(self.weight.dtype), bias.to(self.weight.dtype))


def normalization_of_pixels(num_values: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's normalisation of a tubelet of P values: what 128 levels are worth, and what 128 itself is.

    Returns:
        float32 (P,) and (P,).
    """
    scale = _per_colour([MIDDLE_GREY / (255 * std) for std in PIXEL_STD], device)
    grey = [(MIDDLE_GREY / 255 - m) / std for m, std in zip(PIXEL_MEAN, PIXEL_STD, strict=True)]
    repeats = num_values // len(PIXEL_STD)
    return scale.repeat(repeats), _per_colour(grey, device).repeat(repeats)


def normalize_pixels(tubelets_BKP: Tensor) -> Tensor:
    """uint8 RGB -> float32 of zero mean and unit variance by ImageNet's statistics."""
    scale_P, grey_P = normalization_of_pixels(tubelets_BKP.shape[-1], tubelets_BKP.device)
    return (tubelets_BKP.float() - MIDDLE_GREY) / MIDDLE_GREY * scale_P + grey_P


def _per_colour(values: list[float], device: torch.device) -> Tensor:
    # filled on the device: torch.tensor would copy from the host and make it wait. No buffer of a module
    # either: a half-precision engine would cast it
    return torch.cat([torch.full((1,), value, device=device) for value in values])
