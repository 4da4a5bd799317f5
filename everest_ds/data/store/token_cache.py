"""Token caches: the kept tokens of a few random draws of each training sample, ready to be trained on.

    CACHE/cache.json              settings, totals, samples that others replace, and the name of the index
    CACHE/index-DIGEST.npz        the place of every sample and the checksums of its draws
    CACHE/samples.csv             names, labels, shards and folders, for people
    CACHE/excluded.json           the samples that the ledger excluded when the cache was begun
    CACHE/filling.jsonl           the record of filling, from which it resumes
    CACHE/shards/00000.tar        the draws

All draws have the same size, so the draws of a sample lie at equal distances, and each is read at once:

    00000042/draw.00.npy          uint8 (repeats, K, P): the kept tubelets of draw 0 of sample 42
    00000042/draw.00.kept.npy     int32 (repeats, K): the indices of their tokens

A cache belongs to one list of samples and to the settings that decide its content; others are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from everest_ds.config import Experiment, flatten
from everest_ds.data.order import Visit, fingerprint
from everest_ds.data.store.index import read_arrays, read_facts
from everest_ds.data.store.layout import (
    BLOCK_BYTES,
    NPY_HEADER_BYTES,
    SHARDS,
    StoreKind,
    padded,
    shard_name,
)
from everest_ds.data.video_list import Sample
from everest_ds.errors import ConfigError, DataError

EXCLUDED_FILE, LOG_FILE = "excluded.json", "filling.jsonl"
CACHE = StoreKind(
    "token cache",
    "cache.json",
    "everest-ds token cache, version 1",
    "data.token_cache",
    "repeat `everest-ds data cache` with the same config; it writes this file again",
    "repeat `everest-ds data cache` with the same config; it repairs the cache and keeps what is intact",
    (EXCLUDED_FILE, LOG_FILE),
)
INDEX_BYTES = 4  # of the index of a kept token
# The config keys that decide the content of a cache, beside the samples and the number of draws.
SETTINGS = (
    *("model.num_frames", "model.tubelet_size", "model.image_size", "model.patch_size"),
    *("tokens.selection", "tokens.keep_ratio", "tokens.score", "tokens.distance"),
    *("tokens.frame_oversampling", "data.frame_stride", "data.sampling", "data.short_videos"),
    *("data.train_crop", "data.horizontal_flip", "data.repeats", "data.decode_short_side", "run.seed"),
)


class DrawShape(NamedTuple):
    """The size of a draw: what one visit of a sample reads.

    Attributes:
        repeats: number of its clips.
        num_kept: kept tokens of a clip, K.
        values: values of a tubelet, P.
    """

    repeats: int
    num_kept: int
    values: int

    @classmethod
    def of(cls, config: Experiment) -> DrawShape:
        """Return the size of the draws of a run."""
        return cls(config.data.repeats, config.token_counts.num_kept, config.model.geometry.tubelet_values)

    @property
    def tubelet_bytes(self) -> int:
        """Bytes of the tubelets."""
        return self.repeats * self.num_kept * self.values

    @property
    def kept_bytes(self) -> int:
        """Bytes of the indices of the kept tokens."""
        return self.repeats * self.num_kept * INDEX_BYTES

    @property
    def num_bytes(self) -> int:
        """Bytes of a draw in a shard: two tar members."""
        return sum(BLOCK_BYTES + padded(NPY_HEADER_BYTES + n) for n in (self.tubelet_bytes, self.kept_bytes))


class Replaced(NamedTuple):
    """A draw whose sample could not be read when the cache was filled, so that it holds another sample.

    Attributes:
        item: index of the sample that was read instead.
        failures: the samples that could not be read: index, reason, and whether the file is damaged.
    """

    item: int
    failures: Sequence[tuple[int, str, bool]]


@dataclass(frozen=True)
class TokenCache:
    """An open token cache.

    Attributes:
        shards: folder of the shards: that of the cache, or a copy on this node.
        shape: size of its draws.
        shard: int32 (samples,), the number of the shard that holds each sample.
        start: int64 (samples,), the offset of the sample's first draw in it.
        checksum: uint32 (samples, draws), CRC-32 of each draw.
        replaced: the draws that hold another sample.
    """

    shards: Path
    shape: DrawShape
    shard: NDArray[np.int32]
    start: NDArray[np.int64]
    checksum: NDArray[np.uint32]
    replaced: Mapping[Visit, Replaced]

    @property
    def kind(self) -> StoreKind:
        """The kind of store."""
        return CACHE

    @property
    def parts(self) -> NDArray[np.int64]:
        """The shard, the start, the size in bytes and the CRC-32 of each draw, (draws, 4)."""
        size = np.int64(self.shape.num_bytes)
        starts = self.start[:, None] + size * np.arange(self.checksum.shape[1])
        columns = np.broadcast_arrays(self.shard[:, None], starts, size, self.checksum)
        return np.stack([column.ravel().astype(np.int64) for column in columns], axis=1)

    def place(self, draw: Visit) -> tuple[Path, int]:
        """Return the shard that holds a draw, and the offset of the draw in it."""
        shard = self.shards / shard_name(int(self.shard[draw.sample]))
        return shard, int(self.start[draw.sample]) + draw.epoch * self.shape.num_bytes


def open_token_cache(config: Experiment, samples: Sequence[Sample]) -> TokenCache | None:
    """Open the token cache that a run reads from, or return None if the config names none.

    Args:
        config: config of the run.
        samples: its training samples.

    Raises:
        ConfigError: if the cache was filled with other settings, or holds fewer draws than the run takes.
        DataError: if the cache is missing, unfinished or damaged, or holds other samples.
    """
    folder = config.data.token_cache
    if folder is None:
        return None
    if not (folder / CACHE.facts_file).is_file():
        raise DataError(
            "data.token_cache: this folder is not a complete token cache",
            given=str(folder.absolute()),
            fix="`everest-ds data cache` with this config fills it",
        )
    facts = read_facts(folder, CACHE)
    try:
        check_content(folder, facts["content"], config, samples)
        replaced = {
            Visit(draw, slot): Replaced(item, [(one, reason, damaged) for one, reason, damaged in failures])
            for slot, draw, item, failures in facts["replaced"]
        }
        arrays = read_arrays(folder, facts, CACHE)
        columns = {name: arrays[name] for name in ("shard", "start", "checksum")}
        return TokenCache(folder / SHARDS, DrawShape.of(config), **columns, replaced=replaced)
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{folder / CACHE.facts_file}: the description of the token cache is damaged", fix=CACHE.fix
        ) from None


def content_of(config: Experiment, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return everything that decides the content of a cache, as `cache.json` records it."""
    values = dict(flatten(config.model_dump(mode="json")))
    return {
        "settings": {key: values[key] for key in SETTINGS},
        "draws": config.data.draws,
        "samples": len(samples),
        "fingerprint": fingerprint(samples, config.run.seed),
    }


def check_content(
    folder: Path,
    content: Mapping[str, Any],
    config: Experiment,
    samples: Sequence[Sample],
    fill: bool = False,
) -> None:
    """Check that a cache with this recorded content suits a run, or that it can be filled for it.

    Args:
        folder: the cache.
        content: as `content_of` returns it.
        config: config of the run.
        samples: its training samples.
        fill: True if the cache is to be filled; it must then hold as many draws as the config says.

    Raises:
        ConfigError: if settings differ, or the number of draws does not suit.
        DataError: if the samples differ.
    """
    here = content_of(config, samples)
    old, new = content["settings"], here["settings"]
    changed = [
        f"{key}={new[key]} (in the cache: {old.get(key)})" for key in SETTINGS if old.get(key) != new[key]
    ]
    other = "or choose another data.token_cache, which `everest-ds data cache` with this config fills"
    if changed:
        fix = f"undo the change, {other}"
        raise ConfigError(f"{folder}: filled with other settings", given=", ".join(changed), fix=fix)
    held, wanted = content["draws"], here["draws"]
    if wanted > held or (fill and wanted != held):
        raise ConfigError(
            f"{folder}: data.draws is not the number of draws in the token cache",
            given=f"data.draws={wanted} (in the cache: {held})",
            allowed=f"{held}" if fill else f"1 to {held}",
            fix=f"set data.draws={held}, {other}",
        )
    if content["fingerprint"] != here["fingerprint"]:
        raise DataError(
            f"{folder}: filled from other training samples",
            given=f"{len(samples)} samples in data.train now",
            allowed=f"the {content['samples']} samples of the cache, with the same paths, labels and spans,"
            " in the same order",
            fix=f"restore data.train, {other}",
        )
