"""The encoder: what pre-training hands on to fine-tuning.

Shape legend: B clips, N tokens, K any number of them, P values of a tubelet, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everest_ds.config.schema import Experiment
from everest_ds.models.rero import token_importance
from everest_ds.models.tubelets import TubeletEmbedding, sincos_positions
from everest_ds.models.vit import Blocks


class Encoder(nn.Module):
    """Tubelet embedding, fixed positions and blocks; computes on the tokens it is given, no others."""

    def __init__(self, config: Experiment) -> None:
        super().__init__()
        geometry, shape = config.model.geometry, config.model.shape.encoder
        self.num_slots = geometry.num_slots
        self.embed = TubeletEmbedding(geometry, shape.width)
        self.blocks = Blocks(shape, config.model.drop_path)
        self.register_buffer(
            "positions", sincos_positions(geometry.num_tokens, shape.width), persistent=False
        )
        self.positions: Tensor

    def importance(self, tubelets_BNP: Tensor) -> Tensor:
        """ReRo importance (B, N) of every tubelet; carries no gradient."""
        with torch.no_grad():
            return token_importance(self.embed(tubelets_BNP), self.num_slots)

    def forward(self, tubelets_BKP: Tensor, index_BK: Tensor, key_B: Tensor) -> Tensor:
        """Embed the tubelets at token indices `index_BK` and run the blocks on them: (B, K, D)."""
        x_BKD = self.embed(tubelets_BKP)
        x_BKD = x_BKD + self.positions[index_BK].to(x_BKD.dtype)
        return self.blocks(x_BKD, key_B)
