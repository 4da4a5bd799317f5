"""The change of tokens by which Run-Length Tokenization (RLT) finds runs of repeated patches.

RLT (Choudhury et al., NeurIPS 2024, arXiv 2411.05222, section 3.1) compares the first frame of a tubelet with
the last frame of the tubelet one slot later at the same place. If their pixels hardly differ, the later token
continues the run of the earlier one and is dropped. RLT drops at a fixed threshold, so that the number of
tokens varies; here the caller keeps a fixed number, which sets the threshold of each clip. The run lengths,
which RLT adds to the positions, are left out: rules differ in the kept tokens alone.

Shape legend: B clips, T slots, t frames per slot, L places per slot, N = T·L tokens, P values of one tubelet,
X values of one of its frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.tubelets import MIDDLE_GREY, PIXEL_STD, normalization_of_pixels


def run_change(tubelets_BNP: Tensor, geometry: ClipGeometry) -> Tensor:
    """Compute the mean absolute change of the normalised pixels against the run that a token would continue.

    The differences are summed per colour in integers, which is exact in any order and keeps pixels at 8 bits.

    Returns:
        float32 (B, N), infinite in slot 0, whose tokens continue no run.
    """
    clips_BTLP = tubelets_BNP.unflatten(1, (geometry.num_slots, -1))
    frames_BTLtX = clips_BTLP.unflatten(3, (geometry.tubelet_size, -1))
    later, earlier = frames_BTLtX[:, 1:, :, -1], frames_BTLtX[:, :-1, :, 0]
    difference = torch.maximum(later, earlier) - torch.minimum(later, earlier)
    by_colour = difference.unflatten(3, (-1, len(PIXEL_STD))).sum(dim=3, dtype=torch.int32)
    per_level, _ = normalization_of_pixels(len(PIXEL_STD), tubelets_BNP.device)
    num_values = tubelets_BNP.shape[2] // geometry.tubelet_size
    change = (by_colour * per_level).sum(dim=3) / (MIDDLE_GREY * num_values)
    start = change.new_full((len(change), 1, geometry.tokens_per_slot), torch.inf)
    return torch.cat([start, change], dim=1).flatten(1)
