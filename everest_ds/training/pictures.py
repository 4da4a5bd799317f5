"""Pictures of what a pre-training model saw, kept and predicted.

Shape legend: B clips, F frames, H x W pixels, T slots, N tokens, P values of a tubelet.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.frame_selection import gather_slots
from everest_ds.models.pretrain import Reconstruction
from everest_ds.models.tubelets import from_tubelets, gather_tokens, to_tubelets

_DIM = 0.2  # brightness of what a row does not show
_GAP = 1  # white pixels around each frame


def draw_reconstruction(
    clip_BFHWC: Tensor, shown: Reconstruction, geometry: ClipGeometry, normalized: bool, max_clips: int = 2
) -> Tensor:
    """Four rows a clip, one column a slot: the clip, its kept tokens, its visible tokens, the prediction.

    Args:
        clip_BFHWC: the uint8 clips that `shown` came from, candidate slots of IIFS included.
        normalized: whether predictions are of per-tubelet normalised pixels; they are then drawn with the
            true mean and deviation of their tubelet, as VideoMAE does.

    Returns:
        uint8 (rows, columns, 3) on the host.
    """
    candidates = replace(geometry, num_frames=clip_BFHWC.shape[1])
    tubelets = to_tubelets(clip_BFHWC[:max_clips], candidates)
    tubelets = gather_slots(tubelets, shown.slots_BT[:max_clips], geometry.tokens_per_slot)
    visible, predicted = shown.visible_BV[:max_clips], shown.predicted_BM[:max_clips]
    pixels = tubelets.float() / 255
    guess = shown.prediction_BMP[:max_clips].float()
    if normalized:
        guess = _denormalize(guess, gather_tokens(pixels, predicted))
    kept = torch.cat([visible, predicted], dim=1)
    canvas = _highlight(pixels, visible)
    canvas = canvas.scatter(1, predicted[:, :, None].expand_as(guess), guess)
    rows = [pixels, _highlight(pixels, kept), _highlight(pixels, visible), canvas]
    frames = torch.stack([from_tubelets(row, geometry)[:, :: geometry.tubelet_size] for row in rows], dim=1)
    return _grid(frames)


def _grid(frames_BRTHWC: Tensor) -> Tensor:
    """(B, rows, T, H, W, 3) in [0, 1] -> one uint8 picture, a white line between frames."""
    framed = F.pad(frames_BRTHWC, (0, 0, _GAP, _GAP, _GAP, _GAP), value=1.0)
    b, r, t, h, w, c = framed.shape
    picture = framed.permute(0, 1, 3, 2, 4, 5).reshape(b * r * h, t * w, c)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _highlight(pixels_BNP: Tensor, index_BK: Tensor) -> Tensor:
    """The tokens `index_BK` as they are, all others dimmed."""
    bright = gather_tokens(pixels_BNP, index_BK)
    return (pixels_BNP * _DIM).scatter(1, index_BK[:, :, None].expand_as(bright), bright)


def _denormalize(guess_BMP: Tensor, truth_BMP: Tensor) -> Tensor:
    truth = truth_BMP.unflatten(-1, (-1, 3))
    mean, std = truth.mean(dim=-2, keepdim=True), truth.std(dim=-2, keepdim=True) + 1e-6
    return (guess_BMP.unflatten(-1, (-1, 3)) * std + mean).flatten(-2)
