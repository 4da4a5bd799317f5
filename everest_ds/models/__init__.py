"""Architecture only: no distributed code, no environment, no files. In: uint8 pixels and a key a clip."""

from torch import nn

from everest_ds.config.schema import Experiment
from everest_ds.models.classifier import Classifier
from everest_ds.models.pretrain import PretrainModel

__all__ = ["Classifier", "PretrainModel", "build_model"]


def build_model(config: Experiment) -> nn.Module:
    """The model that the experiment trains."""
    return PretrainModel(config) if config.task == "pretrain" else Classifier(config)
