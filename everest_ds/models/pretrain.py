"""The masked video autoencoder for pre-training: EVEREST (`rero`), VideoMAE (`tube`) and controls.

Data flow: uint8 clip -> importance -> kept tokens -> visible tokens through the encoder -> kept tokens
through the decoder -> pixels of the kept tokens that are not visible. Only gathered tubelets are embedded
with gradient, decoded or turned into targets.

Shape legend: B clips, F frames, H x W pixels, N tokens, T slots, K kept, V visible, M = K - V predicted,
P values of one tubelet, D encoder width, d decoder width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.config.schema import Experiment
from everest_ds.models.encoder import Encoder
from everest_ds.models.linear import Linear
from everest_ds.models.positions import fixed_positions
from everest_ds.models.selection.selector import Selector
from everest_ds.models.tubelets import gather_tokens, reconstruction_targets
from everest_ds.models.vit import Blocks


class Reconstruction(NamedTuple):
    """Output of a pre-training forward pass. A NamedTuple, because DeepSpeed's hooks look inside tuples only.

    Attributes:
        loss: mean squared error over the predicted tokens, float32 scalar.
        slots_BT: indices of the slots that were used: all slots of the clip, unless IIFS draws some.
        visible_BV: indices of the tokens that the encoder received.
        predicted_BM: indices of the tokens that the decoder predicted.
        prediction_BMP: output of the decoder, in the space of the targets.
    """

    loss: Tensor
    slots_BT: Tensor
    visible_BV: Tensor
    predicted_BM: Tensor
    prediction_BMP: Tensor


class PretrainModel(nn.Module):
    """The masked video autoencoder: token selection, encoder, and a light decoder that predicts pixels.

    Args:
        config: an experiment whose task is `pretrain`.
    """

    def __init__(self, config: Experiment) -> None:
        super().__init__()
        model, geometry = config.model, config.model.geometry
        self.normalize_targets = config.loss.normalize_targets
        width, shape = model.shape.encoder.width, model.shape.decoder
        self.selector = Selector(config)
        self.encoder = Encoder(config)
        self.norm = nn.LayerNorm(width, eps=model.norm_eps)
        self.to_decoder = Linear(width, shape.width, bias=False)
        self.mask_token = nn.Parameter(torch.empty(shape.width))
        self.decoder = Blocks(shape, attention=model.attention, norm_eps=model.norm_eps)
        self.decoder_norm = nn.LayerNorm(shape.width, eps=model.last_norm_eps)
        self.head = Linear(shape.width, geometry.tubelet_values)
        self.decoder_table = partial(fixed_positions, model.positions, geometry, shape.width)
        self.decoder_positions: Tensor
        self.register_buffer(
            "decoder_positions", torch.empty(geometry.num_tokens, shape.width), persistent=False
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the mask token and compute the decoder's fixed positions."""
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder_positions = self.decoder_table()

    def forward(self, clip_BFHWC: Tensor, key_B: Tensor, keep_BK: Tensor | None = None) -> Reconstruction:
        """Predict the hidden kept tokens of uint8 clips (B, F, H, W, 3) from the visible tokens.

        Args:
            clip_BFHWC: uint8 RGB clips.
            key_B: int64 random keys, one per clip; all randomness derives from them.
            keep_BK: indices of the kept tokens, if the loader has already chosen them.
        """
        embedding = self.encoder.embed()
        pixels_BNP, slots_BT, visible_BV, predicted_BM = self.selector(clip_BFHWC, embedding, key_B, keep_BK)
        x_BVD = self.encoder(gather_tokens(pixels_BNP, visible_BV), visible_BV, embedding, key_B)
        prediction_BMP = self.decode(self.to_decoder(self.norm(x_BVD)), visible_BV, predicted_BM, key_B)
        target_BMP = reconstruction_targets(gather_tokens(pixels_BNP, predicted_BM), self.normalize_targets)
        # mse_loss returns one value in a storage of the size of the errors. The clone frees that storage; a
        # run would otherwise hold it for every step until its next report.
        loss = F.mse_loss(prediction_BMP.float(), target_BMP).clone()
        return Reconstruction(loss, slots_BT, visible_BV, predicted_BM, prediction_BMP)

    def decode(self, x_BVd: Tensor, visible_BV: Tensor, predicted_BM: Tensor, key_B: Tensor) -> Tensor:
        """Decode visible features and mask tokens, each with its position, into predictions (B, M, P)."""
        positions = self.decoder_positions.to(x_BVd.dtype)
        full = torch.cat([x_BVd + positions[visible_BV], self.mask_token + positions[predicted_BM]], dim=1)
        full = self.decoder(full, key_B)
        return self.head(self.decoder_norm(full[:, visible_BV.shape[1] :]))
