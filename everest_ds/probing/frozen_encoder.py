"""The frozen encoder that probes judge: one vector per clip, and a coarse grid of its tokens.

Shape legend: B clips, F frames, H x W pixels, K kept tokens, N tokens, G cells, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from everest_ds.config import Experiment, build_experiment
from everest_ds.config.tokens import ClipGeometry

# Settings with which the encoder sees the whole clip, whatever tokens it was pre-trained on.
ALL_TOKENS = (
    "tokens.selection=none",
    "tokens.frame_oversampling=1",
    "data.pack_tokens=false",
    "data.token_cache=null",
)
_SIDE = 2  # cells per slot, along each side


def see_all_tokens(config: Experiment) -> Experiment:
    """Return the config of a run with the settings of `ALL_TOKENS`."""
    return build_experiment(config.model_dump(mode="json"), ALL_TOKENS, config.run.dir)


class GridFeatures(nn.Module):
    """A feature model that also returns the mean token of each cell of a grid: every slot x 2 x 2 places.

    The grid keeps apart what happens when and where, at a small part of the size of all tokens.

    Args:
        model: the feature model; its attribute `config` is the experiment, as `load_model` sets it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.cell_N: Tensor
        cells = cells_of(model.config.model.geometry).to(next(model.parameters()).device)
        self.register_buffer("cell_N", cells, persistent=False)
        self.num_cells = int(cells[-1]) + 1

    def forward(self, clip_BFHWC: Tensor, key_B: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Return the vector of each clip, followed by the means of its cells: (B, 1 + G, D).

        A cell without kept tokens is zero.
        """
        x_BKD, keep_BK = self.model.tokens(clip_BFHWC, key_B, keep_BK)
        inside_BKG = nn.functional.one_hot(self.cell_N[keep_BK], self.num_cells).to(x_BKD.dtype)
        # A matrix product, because adding by index is not deterministic on a GPU.
        sum_BGD = inside_BKG.transpose(1, 2) @ x_BKD
        count_BG = inside_BKG.sum(dim=1).clamp(min=1)
        return torch.cat([self.model.summary(x_BKD)[:, None], sum_BGD / count_BG[..., None]], dim=1)


def cells_of(geometry: ClipGeometry) -> Tensor:
    """Return the cell of each token (N,); the last token lies in the last cell."""
    size = geometry.grid_size
    side = min(_SIDE, size)
    place = torch.arange(size) * side // size
    slot = torch.arange(geometry.num_slots)
    return ((slot[:, None, None] * side + place[:, None]) * side + place).flatten()
