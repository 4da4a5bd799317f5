"""Safetensors files written as a stream: header first, then one tensor after the other, hashed on the way.

The safetensors library writes a dictionary of tensors that are all in memory; a checkpoint is written from
tensors that are never together there.
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
    """What the header of a file says of a tensor, before the tensor itself exists."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in the file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class FileSeal(NamedTuple):
    """Size and SHA-256 of a file: enough to tell whether it is still what was written."""

    num_bytes: int
    sha256: str


def write_tensors(
    file: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> FileSeal:
    """Write a new safetensors file and flush it to the disk.

    Args:
        specs: of every tensor, in the order in which `tensors` yields them.
        tensors: on the host; each is let go before the next is asked for.

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
    """`write_tensors`, but a reader of `file` sees what was there before until all of it is on the disk."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        write_tensors(temporary, specs, tensors, metadata)
        os.replace(temporary, file)
        sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save_weights(weights: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Publish tensors that are in memory."""
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    publish_tensors(file, specs, weights.values(), metadata)


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: if it is missing or not a safetensors file.
    """
    with open_tensors(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """An open safetensors file, of which only what is asked for is read: safetensors' own reader.

    Raises:
        CheckpointError: if it is missing or not a safetensors file.
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
    """The seal of a file as it is now."""
    digest, num_bytes = hashlib.sha256(), 0
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileSeal(num_bytes, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries: files created or renamed in it are there after a power cut."""
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
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was announced as {spec}")
        yield tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length, JSON, and spaces up to a multiple of 8 so that tensors lie aligned."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in specs.items():
        end = offset + specs[name].num_bytes
        entries[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
