"""The classifier for fine-tuning and inference, on the kept tokens (`rero`, `random`) or on all (`none`).

Shape legend: B clips, F frames, H x W pixels, N tokens, K kept tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from everest_ds.config.schema import Experiment
from everest_ds.models.encoder import Encoder
from everest_ds.models.sampling import drop_scale
from everest_ds.models.selection.selector import Selector
from everest_ds.models.tubelets import gather_tokens

HEAD_DROP_STREAM = 8  # stream of per-clip randomness


class Classifier(nn.Module):
    """Video classifier: encoder, mean over its tokens, LayerNorm, dropout, linear head; no class token.

    Args:
        config: an experiment whose task is `finetune`.
    """

    def __init__(self, config: Experiment) -> None:
        super().__init__()
        if config.model.num_classes is None:
            raise ValueError("model.num_classes is not set")
        width = config.model.shape.encoder.width
        self.selector = Selector(config)
        self.encoder = Encoder(config)
        self.norm = nn.LayerNorm(width, eps=config.model.last_norm_eps)
        self.head_drop = config.model.head_drop
        self.head = _Head(width, config.model.num_classes)

    def forward(self, clip_BFHWC: Tensor, key_B: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Compute the class logits (B, classes) of uint8 clips (B, F, H, W, 3).

        Args:
            clip_BFHWC: uint8 RGB clips.
            key_B: int64 random keys, one per clip.
            keep_BK: indices of the kept tokens, if the loader has already chosen them.
        """
        embedding = self.encoder.embed()
        pixels_BNP, _, keep_BK, _ = self.selector(clip_BFHWC, embedding, key_B, keep_BK)
        x_BKD = self.encoder(gather_tokens(pixels_BNP, keep_BK), keep_BK, embedding, key_B)
        x_BD = self.norm(x_BKD.mean(dim=1))
        if self.training and self.head_drop > 0.0:
            x_BD = x_BD * drop_scale(key_B, HEAD_DROP_STREAM, x_BD.shape[1], self.head_drop).to(x_BD.dtype)
        return self.head(x_BD)


class _Head(nn.Linear):
    def reset_parameters(self) -> None:
        """Draw small weights, so that the initial logits are close to each other."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
