"""Reader of a checkpoint by parameter and range, independent of the number of ranks that wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from everest_ds.checkpoints.sealed_manifest import WEIGHT, WHOLE, Cut, Manifest
from everest_ds.errors import CheckpointError


def entry(state: str, name: str) -> str:
    """Return the name of a parameter's state inside a file of a checkpoint."""
    return f"{state}/{name}"


class CheckpointReader:
    """Context manager of an open checkpoint. Only requested tensors are read from the disk."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, state: str, name: str, start: int, numel: int, cut: Cut = WHOLE) -> Tensor:
        """Read a range of elements from a flattened shard of a parameter's state, as float32 on the host.

        Args:
            state: one of `STATES`.
            name: name of the parameter.
            start: first element of the range.
            numel: number of elements.
            cut: shard to read from; it may be cut in another way than the saved shards.

        Raises:
            CheckpointError: if a file does not match the manifest.
        """
        parameter = self.manifest.parameters[name]
        if (cut.degree, cut.outer) == (parameter.degree, parameter.outer):
            return self._elements(state, name, cut.rank * parameter.share + start, numel)
        return cut.take(self.whole(state, name))[start : start + numel]

    def whole(self, state: str, name: str) -> Tensor:
        """Read the whole state of a parameter, in the shape of the parameter."""
        parameter = self.manifest.parameters[name]
        shards = self._elements(state, name, 0, parameter.numel).view(parameter.degree, parameter.outer, -1)
        return shards.transpose(0, 1).reshape(parameter.shape)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the float32 weight of every parameter, one at a time."""
        for name in self.manifest.parameters:
            yield name, self.whole(WEIGHT, name)

    def _elements(self, state: str, name: str, start: int, numel: int) -> Tensor:
        """Read a range of elements of all shards, laid end to end in the order of their ranks."""
        parameter, values = self.manifest.parameters[name], torch.empty(numel)
        share = parameter.share
        for piece in parameter.pieces:
            begin = piece.shard * share + piece.start
            first, last = max(start, begin), min(start + numel, begin + piece.numel)
            if first < last:
                part = self._slice(piece.file, entry(state, name), first - begin, last - begin)
                values[first - start : last - start] = part
        return values

    def _slice(self, file: str, key: str, start: int, stop: int) -> Tensor:
        try:
            if file not in self._files:
                self._files[file] = self._stack.enter_context(safe_open(self.path / file, framework="pt"))
            part: Tensor = self._files[file].get_slice(key)[start:stop]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / file}: damaged", given=str(error)) from None
        if part.dtype != torch.float32 or part.shape != (stop - start,):
            raise CheckpointError(
                f"{self.path / file}: `{key}` does not match the manifest",
                given=f"{part.dtype} {tuple(part.shape)}",
                allowed=f"{torch.float32} {(stop - start,)}",
            )
        return part
