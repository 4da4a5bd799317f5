"""The model that turns a clip into one feature vector, for linear probes, retrieval and clustering.

Shape legend: B clips, F frames, H x W pixels, K kept tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everest_ds.config.schema import Experiment
from everest_ds.models.encoder import Encoder
from everest_ds.models.selection.selector import Selector
from everest_ds.models.tubelets import gather_tokens


class FeatureModel(nn.Module):
    """An encoder of the kept tokens that returns one vector per clip: their normalised mean.

    The LayerNorm is applied as in training: a pre-trained model normalises each token before the mean; a
    classifier normalises the mean, so the vector is what its head reads. No token is masked. The parameters
    have the same names as in `PretrainModel` and `Classifier`.

    Args:
        config: an experiment of either task; with tube masks (`tube`, `dual`), all tokens are kept.
    """

    def __init__(self, config: Experiment) -> None:
        super().__init__()
        model, self.norm_first = config.model, config.task == "pretrain"
        self.selector = Selector(config)
        self.encoder = Encoder(config)
        eps = model.norm_eps if self.norm_first else model.last_norm_eps
        self.norm = nn.LayerNorm(model.shape.encoder.width, eps=eps)

    @classmethod
    def around(cls, model: nn.Module, config: Experiment) -> FeatureModel:
        """Return a feature model that shares encoder and LayerNorm with a model that is being trained.

        Args:
            model: a `PretrainModel` or `Classifier`; its parameters may be sharded.
            config: config of the feature model, with the task and the architecture of `model`.
        """
        with torch.device("meta"):
            shared = cls(config)
        shared.encoder, shared.norm = model.encoder, model.norm  # type: ignore[assignment]
        return shared

    def tokens(
        self, clip_BFHWC: Tensor, key_B: Tensor, keep_BK: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode the kept tokens; see `forward` for the arguments.

        Returns:
            The encoded tokens (B, K, D), normalised if the LayerNorm is applied to tokens, and their indices
            (B, K).
        """
        embedding = self.encoder.embed()
        pixels_BNP, _, keep_BK = self.selector.kept(clip_BFHWC, embedding, key_B, keep_BK)
        x_BKD = self.encoder(gather_tokens(pixels_BNP, keep_BK), keep_BK, embedding, key_B)
        return self.norm(x_BKD) if self.norm_first else x_BKD, keep_BK

    def summary(self, x_BKD: Tensor) -> Tensor:
        """Return the feature vectors (B, D) of the tokens that `tokens` returns."""
        x_BD = x_BKD.mean(dim=1)
        return x_BD if self.norm_first else self.norm(x_BD)

    def forward(self, clip_BFHWC: Tensor, key_B: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Compute the features (B, D) of uint8 clips (B, F, H, W, 3).

        Args:
            clip_BFHWC: uint8 RGB clips.
            key_B: int64 random keys, one per clip.
            keep_BK: indices of the kept tokens, if they have already been chosen.
        """
        return self.summary(self.tokens(clip_BFHWC, key_B, keep_BK)[0])
