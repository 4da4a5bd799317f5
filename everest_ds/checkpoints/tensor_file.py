"""Safetensors files written as a stream: header first, then tensor after tensor, hashed while writing.

The safetensors library writes a dictionary of tensors that are all in memory; the tensors of a checkpoint are
never in memory together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from everest_ds.errors import CheckpointError

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_CHUNK_BYTES = 2**20


class TensorSpec(NamedTuple):
    """The dtype and shape of a tensor for the header of a file, known before the tensor exists."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the tensor in the file, in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class FileSeal(NamedTuple):
    """The size and SHA-256 of a file, which reveal any change since it was written."""

    num_bytes: int
    sha256: str


def write_tensors(
    file: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> FileSeal:
    """Write a new safetensors file and flush it to the disk.

    Args:
        file: the file to create.
        specs: dtype and shape of every tensor, by name, in the order in which `tensors` yields them.
        tensors: tensors on the host; each is released before the next is requested.
        metadata: entries of the header's metadata.

    Raises:
        OSError: if the file exists, or the disk is full.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with open(file, "xb") as stream:
        for chunk in _chunks(specs, tensors, metadata):
            stream.write(chunk)
            digest.update(chunk)
            num_bytes += len(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return FileSeal(num_bytes, digest.hexdigest())


def publish_tensors(
    file: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file atomically: readers see the previous file until the new one is complete."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        write_tensors(temporary, specs, tensors, metadata)
        os.replace(temporary, file)
        sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save_weights(weights: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors that are in memory to a safetensors file, atomically."""
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    publish_tensors(file, specs, weights.values(), metadata)


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load the tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: if `file` is missing or not a safetensors file.
    """
    with open_tensors(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file with the library's reader, which reads only the requested tensors.

    Raises:
        CheckpointError: if `file` is missing or not a safetensors file.
    """
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file}: not a readable weights file",
                given=str(error),
                allowed="a .safetensors file, a checkpoint, or a run folder",
            ) from None
        yield opened


def seal_of(file: Path) -> FileSeal:
    """Compute the size and SHA-256 of a file."""
    digest, num_bytes = hashlib.sha256(), 0
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileSeal(num_bytes, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder, so that created and renamed files survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _chunks(
    specs: Mapping[str, TensorSpec], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    yield _header(specs, metadata)
    for (name, spec), tensor in zip(specs.items(), tensors, strict=True):
        if (tensor.dtype, tuple(tensor.shape)) != spec:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} does not match its spec {spec}")
        yield tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Build the header: its length, JSON, and spaces up to a multiple of 8, so that tensors are aligned."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in specs.items():
        end = offset + specs[name].num_bytes
        entries[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
