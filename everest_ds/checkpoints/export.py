"""A checkpoint's weights as one safetensors file: a stream, whatever the number of ranks that wrote it."""

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
from everest_ds.checkpoints.reader import WEIGHT, CheckpointReader
from everest_ds.checkpoints.tensor_file import TensorSpec, load_tensors, open_tensors, publish_tensors
from everest_ds.errors import CheckpointError

_NOT_OF_WEIGHTS = ("init_from", "compile")  # of section model
_CLIP_KEYS = ("frame_stride", "sampling", "short_videos")  # of section data: how a clip is cut
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_weights(source: Path, file: Path, dtype: Literal["fp32", "bf16"]) -> Path:
    """Write the weights of a checkpoint, or of a run's newest, to `file`, one tensor at a time.

    Returns:
        The checkpoint that was read.

    Raises:
        CheckpointError: if the checkpoint is damaged or `file` cannot be written.
    """
    path, manifest = find_checkpoint(source)
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
    """Of a run's config, what its weights are not understood without, for a file's metadata; no paths."""
    if not config:
        return {}
    model = {key: value for key, value in config["model"].items() if key not in _NOT_OF_WEIGHTS}
    data = {key: config["data"][key] for key in _CLIP_KEYS if key in config["data"]}
    part = {"task": config["task"], "model": model, "tokens": config["tokens"], "data": data}
    return {"config": json.dumps({**part, "loss": config["loss"]})}


class StoredWeights(NamedTuple):
    """Weights on the disk.

    Attributes:
        shapes: by name.
        read: one of them, float32.
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def find_weights(source: Path, prefer_best: bool = False) -> Path:
    """What `load_weights` reads for a path: a file, or a run folder's newest checkpoint (or best weights).

    Raises:
        CheckpointError: if there is none.
    """
    best = source / BEST_WEIGHTS_FILE
    if source.is_file() or (prefer_best and best.is_file()):
        return source if source.is_file() else best
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: no weights there", allowed="a run folder, a checkpoint, or a file of weights"
        )
    return find_checkpoint(source)[0]


@contextmanager
def open_weights(source: Path) -> Iterator[StoredWeights]:
    """Weights of a safetensors file, or of a checkpoint that is complete, to read one at a time.

    Raises:
        CheckpointError: if it is missing, damaged or something else.
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
    """Weights and metadata of a safetensors file, or of a checkpoint that is complete.

    Raises:
        CheckpointError: if it is missing, damaged or something else.
    """
    if not source.is_dir():
        return load_tensors(source)
    path, manifest = find_checkpoint(source)
    with CheckpointReader(path, manifest) as reader:
        return dict(reader.weights()), {"task": manifest.facts.task}
