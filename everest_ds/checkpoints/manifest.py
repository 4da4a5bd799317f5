"""The manifest of a checkpoint: what it is of, which files it has, and where each parameter lies in them.

`manifest.json` is written after all other files, and `manifest.sha256`, one line as sha256sum writes it,
after that: a folder without both, agreeing, is not a checkpoint. Reading is checking; nothing in either can
run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from everest_ds.checkpoints.tensor_file import FileSeal
from everest_ds.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
SEAL_FILE = "manifest.sha256"

Count = Annotated[int, Field(ge=0)]


def _plain_name(name: str) -> str:
    """A manifest from elsewhere must not point out of its own folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


FileName = Annotated[str, AfterValidator(_plain_name)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cut(NamedTuple):
    """How the ranks of a tensor group share a parameter: shard `rank` of `degree`.

    The flattened whole is `outer` rows of `degree` runs each; a shard is its run of every row, in order. So
    rows, columns and the three matrices of q, k and v are cut, by the right number of rows.
    """

    rank: int
    degree: int
    outer: int

    def take(self, whole: Tensor) -> Tensor:
        """The flattened shard of a whole tensor."""
        return whole.reshape(self.outer, self.degree, -1)[:, self.rank].reshape(-1)


WHOLE = Cut(0, 1, 1)


class Piece(NamedTuple):
    """Elements `start` .. `start + numel` of a flattened shard, and the file that holds them."""

    file: FileName
    shard: Count
    start: Count
    numel: Count


class Parameter(_Part):
    """A parameter's shape, and the pieces that make it up.

    Attributes:
        shape: of the whole.
        degree: shards that it is cut into; 1 if each piece is a range of the whole.
        outer: rows of the cut, see `Cut`.
        pieces: by shard and start.
    """

    shape: tuple[Count, ...]
    degree: Annotated[int, Field(ge=1)] = 1
    outer: Annotated[int, Field(ge=1)] = 1
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @model_validator(mode="after")
    def check_whole(self) -> Parameter:
        """Every element is in exactly one piece."""
        share, rest = divmod(self.numel, self.degree)
        if rest or self.numel % (self.degree * self.outer):
            raise ValueError(f"{self.numel} elements do not cut into {self.degree} x {self.outer}")
        at = 0
        for piece in self.pieces:
            if piece.shard * share + piece.start != at or piece.start + piece.numel > share:
                raise ValueError(f"element {at} is in no piece, or in two")
            at += piece.numel
        if at != self.numel:
            raise ValueError(f"{at} of {self.numel} elements are there")
        return self


class Facts(_Part):
    """What a checkpoint is of.

    Attributes:
        step: optimiser steps done.
        position: where in the data the next step begins.
        world: ranks, tensor degree, ZeRO stage and precision of who wrote it; others may go on from it.
        optimizer_step: AdamW's own count, by which it corrects its moments.
        loss_scale: state of the fp16 loss scaler; None in other precisions.
        schedule: learning rates of the run.
        random: where everything random comes from.
        config: the run's config, resolved.
        versions: of the packages that wrote it.
    """

    step: Count
    task: str
    global_batch_size: Count
    position: dict[str, int]
    world: dict[str, int | str]
    optimizer_step: Count
    loss_scale: dict[str, int | float] | None
    schedule: dict[str, int | float]
    random: dict[str, int | str]
    config: dict[str, Any]
    versions: dict[str, str | None]


class Manifest(_Part):
    """Everything about a checkpoint but its tensors."""

    format: Literal["everest-ds checkpoint 1"] = "everest-ds checkpoint 1"
    facts: Facts
    files: dict[FileName, FileSeal]
    parameters: dict[str, Parameter]

    @model_validator(mode="after")
    def check_files(self) -> Manifest:
        """Pieces lie in files that the manifest seals."""
        for name, parameter in self.parameters.items():
            for piece in parameter.pieces:
                if piece.file not in self.files:
                    raise ValueError(f"{name} lies in {piece.file}, which is not listed")
        return self

    @property
    def num_bytes(self) -> int:
        """Size of the files listed."""
        return sum(seal.num_bytes for seal in self.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and then its seal, each flushed to the disk."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1).encode()
    _write_flushed(folder / MANIFEST_FILE, text)
    _write_flushed(folder / SEAL_FILE, _seal_line(text))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest; not the files that it lists.

    Raises:
        CheckpointError: saying what is missing or damaged.
    """
    text, seal = _read(folder / MANIFEST_FILE), _read(folder / SEAL_FILE)
    if seal != _seal_line(text):
        raise CheckpointError(f"{folder / MANIFEST_FILE}: damaged", given=f"not what {SEAL_FILE} seals")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{folder / MANIFEST_FILE}: not a manifest of this version", given=f"{where}: {first['msg']}"
        ) from None


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent}: not a complete checkpoint", given=f"no {file.name}") from None
    except OSError as error:
        raise CheckpointError(f"{file}: not readable", given=error.strerror) from None


def _seal_line(text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST_FILE}\n".encode()


def _write_flushed(file: Path, text: bytes) -> None:
    with open(file, "xb") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
