"""Redundancy-robust (ReRo) token selection, shared by pre-training and fine-tuning.

The importance of a token is the distance between the features of its tubelet and those of the tubelet one
slot earlier at the same place (EVEREST, ICML 2024, section 3). Selection returns index tensors of a fixed
size, so all later tensors have static shapes. No function here carries gradient.

Shape legend: B clips, T slots, L places per slot, N = T·L tokens, K kept, P values of one tubelet, D width,
s features that a score compares.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from everest_ds.config.selections import GPU_CHUNK_TOKENS, sketch_width
from everest_ds.models.linear import linear
from everest_ds.models.sampling import random_bits
from everest_ds.models.tubelets import MIDDLE_GREY, PixelMap, normalization_of_pixels, normalize_pixels

# Tubelets scored at a time on a CPU: few enough to stay in its caches. A GPU gets larger chunks, since every
# kernel launch costs host time.
_CPU_CHUNK_TOKENS = 2**12
_SKETCH_KEY, _SKETCH_STREAM = 20240721, 0  # fixed: every run, rank and restart draws the same projection


def token_importance(tubelets_BNP: Tensor, num_slots: int, score: PixelMap | None, distance: str) -> Tensor:
    """Compute how much each token differs from its predecessor in time.

    Args:
        tubelets_BNP: uint8 tubelets, slot by slot.
        num_slots: T, at least 2.
        score: map from pixels to the features to compare (see `score_map`); None compares the pixels.
        distance: `l2`, `l1`, or `cosine` (one minus the cosine of the angle).

    Returns:
        float32 (B, N). Slot 0 has no predecessor and takes the importance of slot 1 (released EVEREST code).
    """
    clips_BTLP = tubelets_BNP.unflatten(1, (num_slots, -1))
    chunk_tokens = GPU_CHUNK_TOKENS if tubelets_BNP.is_cuda else _CPU_CHUNK_TOKENS
    step = max(1, chunk_tokens // tubelets_BNP.shape[1])
    if distance == "cosine":
        changes = [_turns(chunk, score) for chunk in clips_BTLP.split(step)]
    else:
        per_level = None if score is None else score.weight_DP / MIDDLE_GREY
        changes = [_changes(chunk, per_level, distance) for chunk in clips_BTLP.split(step)]
    change = torch.cat(changes)
    return torch.cat([change[:, :1], change], dim=1).flatten(1)


def score_map(kind: str, embedding: PixelMap) -> PixelMap | None:
    """Return the map from pixels to the features that a score compares.

    `embedding` is the patch embedding itself, as in the paper. `sketch` is a fixed random projection of it to
    a tenth of its width, which preserves distances in expectation (Johnson and Lindenstrauss). `pixel`
    compares the normalised pixels, which needs no weights (None).
    """
    if kind == "pixel":
        return None
    weight, bias = (t.detach() for t in embedding)
    if kind == "embedding":
        return PixelMap(weight, bias)
    sketch = _sketch(weight.shape[0], weight.device).to(weight.dtype)
    return PixelMap(sketch @ weight, sketch @ bias)


def select_tokens(importance_BN: Tensor, num_kept: int) -> Tensor:
    """Select the K most important tokens over each whole clip, as indices in ascending order.

    Ties go to the earlier token, so that still clips (all distances zero) give the same tokens on any device.

    Returns:
        int64 (B, K).
    """
    by_importance = importance_BN.argsort(dim=1, descending=True, stable=True)
    return by_importance[:, :num_kept].sort(dim=1).values


def _turns(chunk_BTLP: Tensor, score: PixelMap | None) -> Tensor:
    """Compute one minus the cosine between the features of neighbouring slots: (B, T - 1, L)."""
    features = normalize_pixels(chunk_BTLP) if score is None else score(chunk_BTLP)
    unit = F.normalize(features.float(), dim=-1)
    # One minus the cosine of unit vectors is half their squared distance, which is exactly 0 for equal ones.
    return (unit[:, 1:] - unit[:, :-1]).square().sum(dim=-1) / 2


def _changes(chunk_BTLP: Tensor, per_level_sP: Tensor | None, distance: str) -> Tensor:
    """Compute the distance between the features of neighbouring slots: (B, T - 1, L).

    The change of pixels is mapped, not the pixels themselves: the map is affine, so the result is the change
    of the features. The difference of two nearly equal embeddings would be mostly rounding error, above all
    in half precision, while the difference of pixels is exact.
    """
    values = chunk_BTLP.to(torch.float32 if per_level_sP is None else per_level_sP.dtype)
    change = values[:, 1:] - values[:, :-1]
    if per_level_sP is None:
        change = change * (normalization_of_pixels(change.shape[-1], change.device)[0] / MIDDLE_GREY)
    else:
        change = linear(change, per_level_sP)
    return torch.linalg.vector_norm(change, ord=1 if distance == "l1" else 2, dim=-1, dtype=torch.float32)


def _sketch(width: int, device: torch.device) -> Tensor:
    """Draw the fixed random signs (s, width), scaled to preserve squared lengths in expectation."""
    rows = sketch_width(width)
    key = torch.full((1,), _SKETCH_KEY, dtype=torch.int64, device=device)
    signs = (random_bits(key, _SKETCH_STREAM, rows * width) & 1) * 2 - 1
    return signs.view(rows, width).float() / rows**0.5
