"""The model architectures. They use no distributed code and no environment variables.

The inputs of a model are uint8 pixels and one random key per clip.
"""

from torch import nn

from everest_ds.config.schema import Experiment
from everest_ds.models.classifier import Classifier
from everest_ds.models.pretrain import PretrainModel

__all__ = ["Classifier", "PretrainModel", "build_model"]


def build_model(config: Experiment) -> nn.Module:
    """Build the model that the experiment trains, with its initial weights."""
    return PretrainModel(config) if config.task == "pretrain" else Classifier(config)
