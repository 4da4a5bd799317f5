"""The manifest of a checkpoint: facts about its run, its files, and the place of each parameter in them.

`manifest.json` is written after all other files, followed by `manifest.sha256`, one line in the format of
sha256sum: a folder is a checkpoint only if both files exist and agree. Every read validates both; neither can
execute code.
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

# The bound is that of torch's sizes; booleans and fractions are refused.
Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
PositiveCount = Annotated[Count, Field(ge=1)]
_MOST_AXES = 8
# A checkpoint stores three states per parameter: the weight and AdamW's two moments, all of them float32.
WEIGHT = "weight"
STATES = (WEIGHT, "exp_avg", "exp_avg_sq")
_ELEMENT_BYTES = 4 * len(STATES)


def _plain_name(name: str) -> str:
    """Reject file names that lead out of the checkpoint's folder, as an untrusted manifest might hold."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


FileName = Annotated[str, AfterValidator(_plain_name)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cut(NamedTuple):
    """A tensor-parallel shard of a parameter: shard `rank` of `degree`.

    The flattened parameter consists of `outer` rows of `degree` equal runs each; a shard joins its run of
    every row, in order. Different values of `outer` express cuts along rows, along columns, and of each of
    the three stacked matrices of q, k and v.
    """

    rank: int
    degree: int
    outer: int

    def take(self, whole: Tensor) -> Tensor:
        """Return the flattened shard of a whole tensor."""
        return whole.reshape(self.outer, self.degree, -1)[:, self.rank].reshape(-1)


WHOLE = Cut(0, 1, 1)


class Piece(NamedTuple):
    """The elements `start` .. `start + numel` of a flattened shard, and the file that holds them."""

    file: FileName
    shard: Count
    start: Count
    numel: PositiveCount


class Parameter(_Part):
    """The shape of a parameter, and the pieces that make it up.

    Attributes:
        shape: shape of the whole parameter.
        degree: number of shards; 1 if each piece is a range of the whole parameter.
        outer: rows of the cut, see `Cut`.
        pieces: pieces in the order of shard and start.
    """

    shape: Annotated[tuple[PositiveCount, ...], Field(max_length=_MOST_AXES)]
    degree: PositiveCount = 1
    outer: PositiveCount = 1
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """The number of elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def share(self) -> int:
        """The number of elements of each shard."""
        return self.numel // self.degree

    @model_validator(mode="after")
    def check_whole(self) -> Parameter:
        """Check that every element is in exactly one piece."""
        if self.numel % (self.degree * self.outer):
            raise ValueError(f"{self.numel} elements cannot be cut into {self.degree} x {self.outer}")
        at, share = 0, self.share
        for piece in self.pieces:
            if piece.shard * share + piece.start != at or piece.start + piece.numel > share:
                raise ValueError(f"element {at} is in no piece, or in two")
            at += piece.numel
        if at != self.numel:
            raise ValueError(f"{at} of {self.numel} elements are in the pieces")
        return self


class Facts(_Part):
    """Facts about the run and the training state that a checkpoint was saved from.

    Attributes:
        step: number of completed optimiser steps.
        task: task of the run, `pretrain` or `finetune`.
        global_batch_size: clips per optimiser step over all ranks.
        position: position in the data at which the next step starts.
        world: ranks, tensor-parallel degree, ZeRO stage and precision of the saving run; a run with other
            values may resume from the checkpoint.
        optimizer_step: step count of AdamW, which corrects the bias of its moments.
        loss_scale: state of the fp16 loss scaler; None in other precisions.
        schedule: learning rates of the run.
        random: seed of the run, and the values that its random numbers derive from.
        config: resolved config of the run.
        versions: versions of the packages in the saving run.
    """

    step: Count
    task: str
    global_batch_size: Count
    position: dict[str, Count]
    world: dict[str, int | str]
    optimizer_step: Count
    loss_scale: dict[str, int | float] | None
    schedule: dict[str, int | float]
    random: dict[str, int | str]
    config: dict[str, Any]
    versions: dict[str, str | None]


class Manifest(_Part):
    """The complete description of a checkpoint, apart from its tensors."""

    format: Literal["everest-ds checkpoint 1"] = "everest-ds checkpoint 1"
    facts: Facts
    files: dict[FileName, FileSeal]
    parameters: dict[str, Parameter]

    @model_validator(mode="after")
    def check_files(self) -> Manifest:
        """Check that all pieces lie in files that the manifest lists, and are no larger than these.

        Readers allocate memory by the shapes of the manifest, and verify the sizes of its files before.
        """
        needed = dict.fromkeys(self.files, 0)
        for name, parameter in self.parameters.items():
            for piece in parameter.pieces:
                if piece.file not in self.files:
                    raise ValueError(f"{name} lies in {piece.file}, which is not listed")
                needed[piece.file] += _ELEMENT_BYTES * piece.numel
        for file, num_bytes in needed.items():
            if num_bytes > self.files[file].num_bytes:
                listed = self.files[file].num_bytes
                raise ValueError(f"the parameters in {file} need {num_bytes} bytes, but it has {listed}")
        return self

    @property
    def num_bytes(self) -> int:
        """The total size of the listed files, in bytes."""
        return sum(seal.num_bytes for seal in self.files.values())


def write_checkpoint_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and then its seal, each flushed to the disk."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1).encode()
    _write_flushed(folder / MANIFEST_FILE, text)
    _write_flushed(folder / SEAL_FILE, _seal_line(text))


def read_checkpoint_manifest(folder: Path) -> Manifest:
    """Read and check the manifest, without the files that it lists.

    Raises:
        CheckpointError: if the manifest or its seal is missing or damaged.
    """
    text, seal = _read(folder / MANIFEST_FILE), _read(folder / SEAL_FILE)
    if seal != _seal_line(text):
        raise CheckpointError(
            f"{folder / MANIFEST_FILE}: damaged", given=f"its checksum is not the one in {SEAL_FILE}"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{folder / MANIFEST_FILE}: not a manifest of this version",
            given=f"{where}: {first['msg']}",
            fix="use another checkpoint, or the version that wrote this one",
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
