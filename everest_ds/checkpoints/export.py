"""Export of a checkpoint of any number of ranks into one safetensors file, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from everest_ds.checkpoints.folder import find_checkpoint
from everest_ds.checkpoints.names import BEST_WEIGHTS_FILE
from everest_ds.checkpoints.reader import CheckpointReader
from everest_ds.checkpoints.sealed_manifest import WEIGHT
from everest_ds.checkpoints.tensor_file import TensorSpec, load_tensors, open_tensors, publish_tensors
from everest_ds.errors import CheckpointError
from everest_ds.output_paths import refuse_input

_NOT_OF_WEIGHTS = ("init_from", "compile")  # keys of section `model` that no reader of the weights needs
_CLIP_KEYS = (
    "frame_stride",
    "sampling",
    "short_videos",
)  # keys of section `data` that define how a clip is cut
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_weights(source: Path, file: Path, dtype: Literal["fp32", "bf16"]) -> Path:
    """Write the weights of a checkpoint, or of a run's newest checkpoint, to `file`, tensor by tensor.

    Args:
        source: a checkpoint or a run folder.
        file: the safetensors file to write.
        dtype: precision of the written weights.

    Returns:
        The checkpoint that was read.

    Raises:
        CheckpointError: if the checkpoint is damaged or `file` cannot be written.
        UsageError: if `file` belongs to the checkpoint.
    """
    path, manifest = find_checkpoint(source)
    refuse_input(file, {part.resolve() for part in path.iterdir()})
    specs = {name: TensorSpec(DTYPES[dtype], p.shape) for name, p in manifest.parameters.items()}
    metadata = {"task": manifest.facts.task, "step": str(manifest.facts.step)}
    metadata |= config_entry(manifest.facts.config)
    with CheckpointReader(path, manifest) as reader:
        tensors = (tensor.to(DTYPES[dtype]) for _, tensor in reader.weights())
        try:
            publish_tensors(file, specs, tensors, metadata)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be written", given=error.strerror) from None
    return path


def config_entry(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings needed to interpret a run's weights, as file metadata; they contain no paths."""
    if not config:
        return {}
    model = {key: value for key, value in config["model"].items() if key not in _NOT_OF_WEIGHTS}
    data = {key: config["data"][key] for key in _CLIP_KEYS if key in config["data"]}
    part = {"task": config["task"], "model": model, "tokens": config["tokens"], "data": data}
    return {"config": json.dumps({**part, "loss": config["loss"]})}


class StoredWeights(NamedTuple):
    """Weights on the disk, readable one tensor at a time.

    Attributes:
        shapes: shape of each tensor, by name.
        read: function that reads the tensor of a name, as float32.
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def find_weights(source: Path, prefer_best: bool = False) -> Path:
    """Find the weights at a path: a file, a checkpoint, or a run's best weights or newest checkpoint.

    Args:
        source: a file of weights, a checkpoint or a run folder.
        prefer_best: for a run, return the weights of its best validation, if saved.

    Raises:
        CheckpointError: if `source` holds no complete weights.
    """
    best = source / BEST_WEIGHTS_FILE
    if source.is_file() or (prefer_best and best.is_file()):
        return source if source.is_file() else best
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: no such file or folder", allowed="a run folder, a checkpoint, or a file of weights"
        )
    return find_checkpoint(source)[0]


@contextmanager
def open_weights(source: Path) -> Iterator[StoredWeights]:
    """Open a safetensors file or a complete checkpoint, to read its weights one tensor at a time.

    Raises:
        CheckpointError: if `source` is missing, damaged or neither of the two.
    """
    if not source.is_dir():
        with open_tensors(source) as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
            yield StoredWeights(shapes, lambda name: opened.get_tensor(name).float())
        return
    path, manifest = find_checkpoint(source)
    with CheckpointReader(path, manifest) as reader:
        shapes = {name: parameter.shape for name, parameter in manifest.parameters.items()}
        yield StoredWeights(shapes, partial(reader.whole, WEIGHT))


def load_weights(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load the weights and metadata of a safetensors file or of a complete checkpoint.

    Raises:
        CheckpointError: if `source` is missing, damaged or neither of the two.
    """
    if not source.is_dir():
        return load_tensors(source)
    path, manifest = find_checkpoint(source)
    with CheckpointReader(path, manifest) as reader:
        return dict(reader.weights()), {"task": manifest.facts.task}
