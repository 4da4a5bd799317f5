"""The encoder weights that a run starts from, read from an earlier run or a checkpoint of any system."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from everest_ds.config import Experiment
from everest_ds.errors import CheckpointError
from everest_ds.interchange.files import open_raw
from everest_ds.interchange.layouts import detect_layout
from everest_ds.interchange.source import as_source
from everest_ds.interchange.tensors import TensorShape


class EncoderWeights(NamedTuple):
    """Stored weights that include those of an encoder.

    Attributes:
        path: file or folder that is read.
        shapes: shape of each tensor, by its EVEREST-DS name.
        read: function that reads the tensor of a name, as float32.
    """

    path: Path
    shapes: dict[str, TensorShape]
    read: Callable[[str], Tensor]


@contextmanager
def open_encoder(path: Path, config: Experiment) -> Iterator[EncoderWeights]:
    """Open the weights that `model.init_from` names, for the encoder of `config`.

    Args:
        path: a run (its newest checkpoint), or any source that `open_source` accepts.
        config: config of the new run.

    Raises:
        CheckpointError: if the weights cannot be read, or were trained with other positions.
    """
    with open_raw(path, prefer_best=False) as raw:
        if detect_layout(raw.shapes, raw.path).system == "everest":
            model = json.loads(raw.metadata.get("config", "{}")).get("model", {})
            _check_positions(raw.path, model.get("positions", "flat"), config)
            yield EncoderWeights(raw.path, raw.shapes, raw.read)
        else:
            source = as_source(raw)
            _check_positions(raw.path, source.config.model.positions, config)
            yield EncoderWeights(raw.path, source.shapes, source.read)


def _check_positions(path: Path, found: str, config: Experiment) -> None:
    if found != config.model.positions:
        raise CheckpointError(
            f"{path}: the encoder was trained with other positions than this run uses",
            given=f"model.positions={config.model.positions}",
            allowed=f"model.positions={found}",
            fix=f"set model.positions={found}",
        )
