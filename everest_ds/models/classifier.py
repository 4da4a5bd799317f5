"""The classifier: fine-tuning and inference on the kept tokens (`rero`) or on all of them (`none`).

Shape legend: B clips, F frames, H x W pixels, N tokens, K kept, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everest_ds.config.schema import Experiment
from everest_ds.models.encoder import Encoder
from everest_ds.models.rero import select_tokens
from everest_ds.models.tubelets import gather_tokens, to_tubelets
from everest_ds.models.vit import LAYER_NORM_EPS, init_weights


class Classifier(nn.Module):
    """Encoder, mean over its tokens, LayerNorm, linear head; no class token.

    Args:
        config: an experiment whose task is `finetune`.
    """

    def __init__(self, config: Experiment) -> None:
        super().__init__()
        if config.model.num_classes is None:
            raise ValueError("model.num_classes is not set")
        width = config.model.shape.encoder.width
        self.geometry = config.model.geometry
        self.counts = config.token_counts
        self.selection = config.tokens.selection
        self.encoder = Encoder(config)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(width, config.model.num_classes)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, clip_BFHWC: Tensor, key_B: Tensor) -> Tensor:
        """Class logits (B, classes) of uint8 clips (B, F, H, W, 3); the keys (B,) drive drop path."""
        tubelets_BNP = to_tubelets(clip_BFHWC, self.geometry)
        keep_BK = self.choose_tokens(tubelets_BNP)
        x_BKD = self.encoder(gather_tokens(tubelets_BNP, keep_BK), keep_BK, key_B)
        return self.head(self.norm(x_BKD.mean(dim=1)))

    def choose_tokens(self, tubelets_BNP: Tensor) -> Tensor:
        """Token indices (B, K) to compute on."""
        if self.selection == "rero":
            return select_tokens(self.encoder.importance(tubelets_BNP), self.counts.num_kept)
        everything = torch.arange(tubelets_BNP.shape[1], device=tubelets_BNP.device)
        return everything.expand(tubelets_BNP.shape[0], -1)
