"""ReRo, redundancy-robust token selection: THE selector, one for pre-training and fine-tuning.

A token matters as much as its tubelet changed: its importance is the distance between its features and
those of the tubelet one slot earlier at the same place (EVEREST, ICML 2024, section 3). Selection returns
index tensors of a fixed size, so everything downstream has static shapes. Nothing here carries gradient.

Shape legend: B clips, T slots, L places a slot, N = T·L tokens, K kept, P values of a tubelet, D width,
s features of a score.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from everest_ds.config.tokens import sketch_width
from everest_ds.models.linear import linear
from everest_ds.models.sampling import random_bits
from everest_ds.models.tubelets import MIDDLE_GREY, PixelMap, normalization_of_pixels, normalize_pixels

# Tubelets scored at a time: enough to fill a GEMM, few enough that their features are never a peak of memory
# (a quarter of a gigabyte with ViT-L). A CPU has them in its caches; a GPU's host pays for every launch.
_CHUNK_TOKENS, _CHUNK_TOKENS_ON_GPU = 2**12, 2**15
_SKETCH_KEY, _SKETCH_STREAM = 20240721, 0  # fixed: every run, rank and restart draws the same projection


def token_importance(tubelets_BNP: Tensor, num_slots: int, score: PixelMap | None, distance: str) -> Tensor:
    """How much each token differs from its predecessor in time.

    Args:
        tubelets_BNP: uint8 tubelets, slot by slot.
        num_slots: T, at least 2.
        score: the features to compare, as a map of pixels (see `score_map`); None compares the pixels.
        distance: `l2`, `l1`, or `cosine` (one minus the cosine of the angle).

    Returns:
        float32 (B, N). Slot 0 has no predecessor and takes slot 1's (released EVEREST code).
    """
    clips_BTLP = tubelets_BNP.unflatten(1, (num_slots, -1))
    chunk_tokens = _CHUNK_TOKENS_ON_GPU if tubelets_BNP.is_cuda else _CHUNK_TOKENS
    step = max(1, chunk_tokens // tubelets_BNP.shape[1])
    if distance == "cosine":
        changes = [_turns(chunk, score) for chunk in clips_BTLP.split(step)]
    else:
        per_level = None if score is None else score.weight_DP / MIDDLE_GREY
        changes = [_changes(chunk, per_level, distance) for chunk in clips_BTLP.split(step)]
    change = torch.cat(changes)
    return torch.cat([change[:, :1], change], dim=1).flatten(1)


def score_map(kind: str, embedding: PixelMap) -> PixelMap | None:
    """The features that a score compares.

    `embedding`: the patch embedding itself, the paper's. `sketch`: a fixed random projection of it to a tenth
    of its width; by Johnson and Lindenstrauss distances keep their size in expectation. `pixel`: the
    normalised pixels, for which no weight is needed (None).
    """
    if kind == "pixel":
        return None
    weight, bias = (t.detach() for t in embedding)
    if kind == "embedding":
        return PixelMap(weight, bias)
    sketch = _sketch(weight.shape[0], weight.device).to(weight.dtype)
    return PixelMap(sketch @ weight, sketch @ bias)


def select_tokens(importance_BN: Tensor, num_kept: int) -> Tensor:
    """Indices of the K most important tokens of each clip, over the whole clip, in ascending order.

    Ties go to the earlier token, so that still clips (all distances zero) select the same on any device.

    Returns:
        int64 (B, K).
    """
    by_importance = importance_BN.argsort(dim=1, descending=True, stable=True)
    return by_importance[:, :num_kept].sort(dim=1).values


def _turns(chunk_BTLP: Tensor, score: PixelMap | None) -> Tensor:
    """(B, T - 1, L): one minus the cosine between each tubelet's features and those before."""
    features = normalize_pixels(chunk_BTLP) if score is None else score(chunk_BTLP)
    unit = F.normalize(features.float(), dim=-1)
    # for unit vectors half the squared distance; exactly zero where nothing changed
    return (unit[:, 1:] - unit[:, :-1]).square().sum(dim=-1) / 2


def _changes(chunk_BTLP: Tensor, per_level_sP: Tensor | None, distance: str) -> Tensor:
    """(B, T - 1, L): the distance of each tubelet's features to those before.

    The map is linear: the change of the features is that of the pixels, mapped. The difference of two nearly
    equal embeddings would be mostly rounding, above all in half precision; that of pixels is exact.
    """
    values = chunk_BTLP.to(torch.float32 if per_level_sP is None else per_level_sP.dtype)
    change = values[:, 1:] - values[:, :-1]
    if per_level_sP is None:
        change = change * (normalization_of_pixels(change.shape[-1], change.device)[0] / MIDDLE_GREY)
    else:
        change = linear(change, per_level_sP)
    return torch.linalg.vector_norm(change, ord=1 if distance == "l1" else 2, dim=-1, dtype=torch.float32)


def _sketch(width: int, device: torch.device) -> Tensor:
    """Fixed random signs (s, width), scaled so that the square of a length is kept in expectation."""
    rows = sketch_width(width)
    key = torch.full((1,), _SKETCH_KEY, dtype=torch.int64, device=device)
    signs = (random_bits(key, _SKETCH_STREAM, rows * width) & 1) * 2 - 1
    return signs.view(rows, width).float() / rows**0.5
