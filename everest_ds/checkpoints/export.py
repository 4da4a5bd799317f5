"""A checkpoint's weights as one safetensors file: a stream, whatever the number of ranks that wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from everest_ds.checkpoints.folder import find_checkpoint
from everest_ds.checkpoints.reader import WEIGHT, CheckpointReader
from everest_ds.checkpoints.tensor_file import TensorSpec, load_tensors, open_tensors, publish_tensors
from everest_ds.errors import CheckpointError

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
    with CheckpointReader(path, manifest) as reader:
        tensors = (tensor.to(DTYPES[dtype]) for _, tensor in reader.weights())
        try:
            publish_tensors(file, specs, tensors, metadata)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be written", given=error.strerror) from None
    return path


class StoredWeights(NamedTuple):
    """Weights on the disk.

    Attributes:
        shapes: by name.
        read: one of them, float32.
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


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
