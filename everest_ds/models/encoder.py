"""The encoder, which all models share: fine-tuning starts from its pre-trained weights.

Shape legend: B clips, N tokens, K any number of tokens, P values of one tubelet, D width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from everest_ds.config.schema import Experiment
from everest_ds.models.positions import encoder_positions
from everest_ds.models.tubelets import PixelMap, TubeletEmbedding
from everest_ds.models.vit import Blocks


class Encoder(nn.Module):
    """Tubelet embedding, fixed positions and transformer blocks, applied to the given tokens only."""

    def __init__(self, config: Experiment) -> None:
        super().__init__()
        model, shape = config.model, config.model.shape.encoder
        self.embed = TubeletEmbedding(model.geometry, shape.width)
        self.blocks = Blocks(shape, model.drop_path, model.attention, model.norm_eps)
        self.table = partial(encoder_positions, model, shape.width)
        self.positions: Tensor
        self.register_buffer(
            "positions", torch.empty(model.geometry.num_tokens, shape.width), persistent=False
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Compute the fixed positions."""
        self.positions = self.table()

    def forward(self, tubelets_BKP: Tensor, index_BK: Tensor, embedding: PixelMap, key_B: Tensor) -> Tensor:
        """Encode the tubelets at token indices `index_BK` into features (B, K, D).

        Args:
            tubelets_BKP: uint8 tubelets of the tokens to encode.
            index_BK: token indices of the tubelets, which select the positions.
            embedding: the result of `embed()` in this step, shared with token selection.
            key_B: int64 random keys, one per clip, for drop path.
        """
        x_BKD = embedding(tubelets_BKP)
        x_BKD = x_BKD + self.positions[index_BK].to(x_BKD.dtype)
        return self.blocks(x_BKD, key_B)
