"""The index of a frame store: its samples and their places, as columns in a file of numpy arrays.

The index is written under a name of its own, and becomes valid when `store.json` names it. A store thus
changes in one step, and a reader never meets a half-written or a foreign index.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from everest_ds.data.manifest_lines import SampleColumns
from everest_ds.data.store.layout import (
    FACTS_FILE,
    FRAMES,
    SHARDS,
    Packing,
    ShardedStore,
    StoredFrames,
    StoreKind,
    shard_name,
)
from everest_ds.data.video_list import SampleTable
from everest_ds.durable_files import replace_json, replacing
from everest_ds.errors import DataError


class PlaceColumns(NamedTuple):
    """The places of a store's samples, one row for each: the fields of `StoredFrames`, as arrays."""

    shard: NDArray[np.int32]
    start: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    checksum: NDArray[np.uint32]
    records_at: NDArray[np.int64]
    records_checksum: NDArray[np.uint32]
    num_frames: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]


class StoredSamples(SampleTable):
    """The samples of a frame store.

    Attributes:
        places: the places of all samples of the store; the line of a sample, less one, is its row.
        packing: the settings of the store.
        shards: folder of the shards: that of the store, or a copy on this node.

    Args:
        folder: the store, after which its samples are named.
        columns: the samples.
        places: as the attribute.
        packing: as the attribute.
        shards: as the attribute.
    """

    def __init__(
        self, folder: Path, columns: SampleColumns, places: PlaceColumns, packing: Packing, shards: Path
    ) -> None:
        super().__init__(folder, columns)
        self.packing = packing
        self.shards = shards
        self.places = places

    @property
    def kind(self) -> StoreKind:
        """The kind of store."""
        return FRAMES

    @property
    def shard(self) -> NDArray[np.int32]:
        """The number of the shard that holds each sample."""
        return self.places.shard[self.columns.lines - 1]

    @property
    def parts(self) -> NDArray[np.int64]:
        """The shard, the start, the size in bytes and the CRC-32 of each sample, (samples, 4)."""
        rows = np.unique(self.columns.lines) - 1
        places = self.places
        columns = (places.shard, places.start, places.num_bytes, places.checksum)
        return np.unique(np.stack([column[rows].astype(np.int64) for column in columns], axis=1), axis=0)

    def _stored(self, line: int) -> StoredFrames:
        row = {name: int(column[line - 1]) for name, column in self.places._asdict().items()}
        shard = self.shards / shard_name(row.pop("shard"))
        return StoredFrames(shard=shard, every=self.packing.every, **row)


def is_store(folder: Path) -> bool:
    """Return whether a path is a frame store.

    Raises:
        DataError: if it is one that is not complete yet.
    """
    if (folder / FACTS_FILE).is_file():
        return True
    if (folder / SHARDS).is_dir() and next(folder.glob("packing-*.jsonl"), None) is not None:
        raise DataError(f"{folder}: packing this frame store was interrupted", fix=FRAMES.fix)
    return False


def open_store(folder: Path) -> StoredSamples:
    """Open a frame store.

    Raises:
        DataError: if the store is damaged, or belongs to another version of this program.
    """
    facts = read_store_facts(folder)
    arrays = read_arrays(folder, facts, FRAMES)
    columns = SampleColumns._make(arrays[f"sample_{name}"] for name in SampleColumns._fields)
    places = PlaceColumns._make(arrays[f"place_{name}"] for name in PlaceColumns._fields)
    return StoredSamples(folder, columns, places, Packing(**facts["packing"]), folder / SHARDS)


def read_store_facts(folder: Path) -> dict[str, Any]:
    """Read the settings and totals of a frame store from its `store.json`, like `read_facts`."""
    facts = read_facts(folder, FRAMES)
    try:
        Packing(**facts["packing"])
    except (KeyError, TypeError):
        raise _damaged(folder, FRAMES) from None
    return facts


def read_facts(folder: Path, kind: StoreKind) -> dict[str, Any]:
    """Read the settings and totals of a store.

    Raises:
        DataError: if the file is damaged, or belongs to another version of this program.
    """
    file = folder / kind.facts_file
    try:
        facts = json.loads(file.read_bytes())
        str(facts["index"]), str(facts["index_digest"])
    except OSError as error:
        raise DataError(f"{file}: cannot be read", given=error.strerror) from None
    except (ValueError, KeyError, TypeError):
        raise _damaged(folder, kind) from None
    if facts.get("form") != kind.form:
        raise DataError(
            f"{file}: not a {kind.title} of this version", given=facts.get("form"), allowed=kind.form
        )
    return dict(facts)


def _damaged(folder: Path, kind: StoreKind) -> DataError:
    return DataError(
        f"{folder / kind.facts_file}: the description of the {kind.title} is damaged", fix=kind.fix
    )


def read_arrays(folder: Path, facts: dict[str, Any], kind: StoreKind) -> dict[str, NDArray[Any]]:
    """Read the arrays of a store's index.

    Raises:
        DataError: if the index is missing or damaged.
    """
    file = folder / facts["index"]
    try:
        if _digest(file) != facts["index_digest"]:
            raise DataError(f"{file}: the index of the {kind.title} is damaged", fix=kind.fix)
        with np.load(file) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise DataError(f"{file}: the index of the {kind.title} is missing", fix=kind.fix) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read", given=error.strerror) from None


def write_store_index(
    folder: Path, columns: SampleColumns, places: PlaceColumns, facts: dict[str, Any]
) -> None:
    """Write the index of a frame store, like `replace_index`.

    Args:
        folder: the store.
        columns: its samples; the line of each is the number of its row, from 1.
        places: the places of their frames.
        facts: the settings (`packing`) and totals for `store.json`.
    """
    arrays = {f"sample_{name}": column for name, column in columns._asdict().items()}
    arrays |= {f"place_{name}": column for name, column in places._asdict().items()}
    replace_index(folder, arrays, facts, FRAMES)


def replace_index(
    folder: Path, arrays: Mapping[str, NDArray[Any]], facts: dict[str, Any], kind: StoreKind
) -> None:
    """Write the index of a store, make it valid, and remove older ones.

    Args:
        folder: the store.
        arrays: the index.
        facts: the settings and totals of the store.
        kind: the kind of store.

    Raises:
        OSError: if a file cannot be written; the store is then what it was before.
    """
    new = folder / f"index-new.{os.getpid()}.npz"
    with replacing(new) as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    digest = _digest(new)
    name = f"index-{digest}.npz"
    os.replace(new, folder / name)
    replace_json(
        folder / kind.facts_file, {"form": kind.form, **facts, "index": name, "index_digest": digest}
    )
    for other in folder.glob("index-*.npz"):
        if other.name != name:
            with suppress(OSError):
                other.unlink()


def write_part_of_store(folder: Path, samples: StoredSamples, rows: Sequence[int]) -> None:
    """Write a store that consists of some samples of another one, in this order, and uses its shards.

    Args:
        folder: folder of the new store; it is created.
        samples: the other store.
        rows: the samples; they may repeat.

    Raises:
        OSError: if a file cannot be written.
    """
    chosen = samples.columns.select(np.array(rows, np.int64))
    places = PlaceColumns._make(column[chosen.lines - 1] for column in samples.places)
    columns = chosen._replace(lines=np.arange(1, len(rows) + 1, dtype=np.int32))
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (folder / SHARDS).symlink_to(samples.shards.resolve(), target_is_directory=True)
    write_store_index(folder, columns, places, {"packing": asdict(samples.packing), "samples": len(rows)})


def shards_of(store: ShardedStore) -> Sequence[Path]:
    """Return the shards that hold a store's samples."""
    return [store.shards / shard_name(shard) for shard in np.unique(store.shard).tolist()]


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
