"""The encoder that a run starts from: of a run of ours, or of any system's checkpoint."""

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
from everest_ds.interchange.layouts import detect
from everest_ds.interchange.source import as_source
from everest_ds.interchange.tensors import Shape


class Encoder(NamedTuple):
    """Weights on the disk, the encoder's among them.

    Attributes:
        path: what is read.
        shapes: by our names.
        read: one of them, float32.
    """

    path: Path
    shapes: dict[str, Shape]
    read: Callable[[str], Tensor]


@contextmanager
def open_encoder(path: Path, config: Experiment) -> Iterator[Encoder]:
    """Open the weights that `model.init_from` names, for the encoder of `config`.

    Args:
        path: a run (its newest checkpoint), or whatever `open_source` takes.

    Raises:
        CheckpointError: if they cannot be read, or were trained with other positions.
    """
    with open_raw(path, prefer_best=False) as raw:
        if detect(raw.shapes, raw.path).system == "everest":
            model = json.loads(raw.metadata.get("config", "{}")).get("model", {})
            _check_positions(raw.path, model.get("positions", "flat"), config)
            yield Encoder(raw.path, raw.shapes, raw.read)
        else:
            source = as_source(raw)
            _check_positions(raw.path, source.config.model.positions, config)
            yield Encoder(raw.path, source.shapes, source.read)


def _check_positions(path: Path, found: str, config: Experiment) -> None:
    if found != config.model.positions:
        raise CheckpointError(
            f"{path}: an encoder of other positions than this run's",
            given=f"model.positions={config.model.positions}",
            allowed=f"model.positions={found}",
            fix=f"set model.positions={found}",
        )
