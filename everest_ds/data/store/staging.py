"""Staging: the shards of a frame store or token cache are copied to a node, and its ranks read the copies.

    STAGE/everest-ds-DIGEST/00000.tar             a copy: it gets this name once it is checked and on the disk
    STAGE/everest-ds-DIGEST/.00000.tar.partial    a copy in progress, locked by the process that writes it

The digest stands for the folder of the store's shards and for the user. A copy has the size and modification
time of its shard, which tell whether it is up to date, and by which ledgers identify the file. Any number of
processes may stage into one folder at once: each shard is copied by one of them, and the others wait.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from everest_ds.data.ledger import Stamp, stamp
from everest_ds.data.store.index import StoredSamples
from everest_ds.data.store.layout import ShardedStore, shard_name
from everest_ds.data.store.token_cache import TokenCache
from everest_ds.data.video_list import Sample
from everest_ds.errors import ConfigError, DataError
from everest_ds.units import format_bytes

# The samples of a data set, or its token cache.
Staged = TypeVar("Staged", bound=Sequence[Sample] | TokenCache)

STAGE_FIX = "free disk space, name another folder in data.stage, or read the shards in place: data.stage=null"
_COARSE_NS = 10**9  # some file systems keep whole seconds only


class ShardCopy(NamedTuple):
    """A shard and its copy on this node.

    Attributes:
        source: the shard in the store.
        target: the copy.
        version: size and modification time of the shard.
        parts: int64 (parts, 3): start, size in bytes and CRC-32 of each sample or draw in the shard.
    """

    source: Path
    target: Path
    version: Stamp
    parts: NDArray[np.int64]

    @property
    def num_bytes(self) -> int:
        """Size of the shard."""
        return self.version[0]

    @property
    def partial(self) -> Path:
        """The copy in progress."""
        return self.target.with_name(f".{self.target.name}.partial")

    @property
    def is_staged(self) -> bool:
        """True if the copy exists and is up to date."""
        size, changed = stamp(self.target)
        return size == self.num_bytes and 0 <= self.version[1] - changed < _COARSE_NS

    @property
    def missing_bytes(self) -> int:
        """Additional disk space that the copy needs."""
        if self.is_staged:
            return 0
        replaced = sum(max(0, stamp(file)[0]) for file in (self.target, self.partial))
        return max(0, self.num_bytes - replaced)


class StageRoom(NamedTuple):
    """The disk space for staging on one node, in bytes.

    Attributes:
        missing_bytes: additional space that the shards need.
        free_bytes: free space.
    """

    missing_bytes: int
    free_bytes: int

    @classmethod
    def of(cls, folder: Path, copies: Sequence[ShardCopy]) -> StageRoom:
        """Compare the space that `copies` need with the free space of the existing `folder`."""
        return cls(sum(shard.missing_bytes for shard in copies), shutil.disk_usage(folder).free)

    @property
    def is_short(self) -> bool:
        """True if the shards do not fit."""
        return self.missing_bytes > self.free_bytes

    def __str__(self) -> str:
        return f"{format_bytes(self.missing_bytes)} to copy, {format_bytes(self.free_bytes)} free"


def stage_folder(stage: Path) -> Path:
    """Return the folder that `data.stage` names on this node, with environment variables and ~ replaced.

    Raises:
        ConfigError: if a variable is not set.
    """
    folder = os.path.expanduser(os.path.expandvars(stage))
    if "$" in folder:
        raise ConfigError(
            "data.stage names an environment variable that is not set on this node",
            given=str(stage),
            fix="name a local folder of every node, or read the store in place: data.stage=null",
        )
    return Path(folder).absolute()


def read_from_stage(store: Staged, stage: Path | None) -> Staged:
    """Return the samples of a store, or a token cache, as they are read from this node's copy of the shards.

    They are the same in all but the files that are read. Samples of a manifest, and everything if `stage` is
    None, are returned as they are.
    """
    if stage is None or not isinstance(store, (StoredSamples, TokenCache)):
        return store
    shards = _staged_shards(stage_folder(stage), store.shards)
    if isinstance(store, TokenCache):
        return replace(store, shards=shards)
    staged = copy(store)
    staged.shards = shards
    return staged


def plan_copies(folder: Path, stores: Iterable[ShardedStore]) -> list[ShardCopy]:
    """Return the copies that `folder`, from `stage_folder`, needs of the shards that hold the samples.

    Raises:
        DataError: if a shard is missing.
    """
    copies: dict[Path, ShardCopy] = {}
    for store in stores:
        staged = _staged_shards(folder, store.shards)
        for shard, parts in _parts_by_shard(store):
            source, target = store.shards / shard_name(shard), staged / shard_name(shard)
            version = stamp(source)
            if version[0] < 0:
                raise DataError(
                    f"{source}: this shard of the {store.kind.title} is missing",
                    fix=f"restore the file, or {store.kind.repair}",
                )
            copies[target] = ShardCopy(source, target, version, parts)
    return list(copies.values())


def _staged_shards(folder: Path, shards: Path) -> Path:
    """Return the folder for the copies of the shards in `shards`."""
    identity = f"{os.getuid()} {shards.resolve()}"
    return folder / f"everest-ds-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _parts_by_shard(store: ShardedStore) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield the number of each shard that holds samples, and their parts of it as in `ShardCopy`."""
    table = store.parts
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    numbers, firsts = np.unique(table[:, 0], return_index=True)
    for shard, rows_of_shard in zip(numbers.tolist(), np.split(table, firsts[1:]), strict=True):
        yield shard, rows_of_shard[:, 1:]
