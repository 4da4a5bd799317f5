"""Filling of a token cache: the loader of training reads every draw once, and this process writes them down.

The draws of a sample are appended to a shard one after the other, and the sample is then recorded. The cache
becomes valid in one step at the end.
"""

from __future__ import annotations

import csv
import io
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from everest_ds.config import Experiment
from everest_ds.data.clip_batches import PackedBatch
from everest_ds.data.clip_source import Pack
from everest_ds.data.clips import TrainingClips
from everest_ds.data.loader import load
from everest_ds.data.order import Visit
from everest_ds.data.reading import Failure
from everest_ds.data.store.cached_draws import draw_members, read_draw
from everest_ds.data.store.index import replace_index
from everest_ds.data.store.layout import LIST_FILE, SHARDS, folder_of, shard_name
from everest_ds.data.store.shards import SHARD_BYTES, ShardWriter, check_room, naming_errors, repair_shards
from everest_ds.data.store.token_cache import (
    CACHE,
    LOG_FILE,
    DrawShape,
    TokenCache,
    check_content,
    content_of,
)
from everest_ds.data.video_list import Sample, names_and_labels
from everest_ds.durable_files import append_row, iterate_json_rows, replace_file
from everest_ds.errors import DataError

_NUM_TIMED = 8  # draws from which the time is predicted


@dataclass(frozen=True)
class CachedSample:
    """The record of a sample whose draws are in a shard.

    Attributes:
        sample: its index.
        shard: number of the shard.
        start, stop: the part of the shard that holds its draws.
        checksums: CRC-32 of each draw.
        replaced: the draws that hold another sample: draw, index of that sample, and failures as `Replaced`
            has them.
    """

    sample: int
    shard: int
    start: int
    stop: int
    checksums: list[int]
    replaced: list[tuple[int, int, list[tuple[int, str, bool]]]]


class CacheEstimate(NamedTuple):
    """The prediction of filling a cache.

    Attributes:
        num_bytes: bytes that the draws that are not there yet will take; exact.
        minutes: time that they will take, in minutes.
    """

    num_bytes: int
    minutes: float


class CacheFiller:
    """The filling of a token cache; see `shards.packing_into`.

    Attributes:
        num_known: number of samples that were there already.

    Args:
        config: config of the training; `data.num_workers` processes read.
        samples: its training samples.
        pack: selects the kept tokens of a clip.
        out: the cache.
        shard_bytes: size at which a shard is closed.

    Raises:
        ConfigError: if the folder holds draws of other settings.
        DataError: if it holds draws of other samples, or cannot be written.
    """

    def __init__(
        self,
        config: Experiment,
        samples: Sequence[Sample],
        pack: Pack,
        out: Path,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        assert config.data.draws is not None
        self._samples, self._config, self._out = samples, config, out
        self._draws = config.data.draws
        self._source = TrainingClips(samples, config, pack)
        self._shape = DrawShape.of(config)
        self._shard_bytes = shard_bytes
        self._rows: dict[int, CachedSample] = {}
        with naming_errors(out, CACHE):
            out.mkdir(parents=True, exist_ok=True)
            self._read_log()
            lost = repair_shards(out / SHARDS, self._rows.values(), self._is_intact)
        for row in lost:
            del self._rows[row.sample]
        self.num_known = len(self._rows)
        self._slots = Counter(draw for row in self._rows.values() for draw, *_ in row.replaced)

    def verify(self, on_progress: Callable[[int], None]) -> None:
        """Compare all draws that are there with their checksums, and forget samples that are damaged.

        Args:
            on_progress: called with the number of samples that have been compared.
        """
        for done, row in enumerate(list(self._rows.values()), start=1):
            if not self._is_intact(row):
                del self._rows[row.sample]
            on_progress(done)
        self.num_known = len(self._rows)

    @property
    def failures(self) -> list[Failure]:
        """The samples that could not be read, for each draw that holds another sample instead."""
        return [
            Failure(draw, row.sample, *failure)
            for row in self._rows.values()
            for draw, _, failures in row.replaced
            for failure in failures
        ]

    @property
    def num_left(self) -> int:
        """Number of samples whose draws are not in the cache yet."""
        return len(self._samples) - len(self._rows)

    def estimate(self) -> CacheEstimate:
        """Predict the size of the samples that are left, and the time to read them, by reading a few.

        Raises:
            DataError: as `fill`.
        """
        num_draws = self.num_left * self._draws
        # One worker, because the first batches of several would come at about the same time.
        data = self._config.data.model_copy(update={"num_workers": 1})
        spread = np.linspace(0, len(self._samples) - 1, _NUM_TIMED + 1).astype(int).tolist()
        visits = ([Visit(0, sample)] for sample in spread)
        times = [time.perf_counter() for _ in load(self._source, visits, data, False, lambda failure: None)]
        seconds = (times[-1] - times[0]) / _NUM_TIMED * num_draws
        workers = max(1, self._config.data.num_workers)
        return CacheEstimate(num_draws * self._shape.num_bytes, seconds / workers / 60)

    def check_room(self, folder: Path) -> None:
        """Check that the disk of `folder` has room for the samples that are left.

        Raises:
            DataError: if it does not.
        """
        needed = self.num_left * self._draws * self._shape.num_bytes
        fix = "choose another data.token_cache, or lower data.draws, data.repeats or tokens.keep_ratio"
        check_room(folder, needed, CACHE, fix)

    def fill(self, on_progress: Callable[[int], None]) -> None:
        """Read and write the draws of all samples that are not in the cache yet.

        Args:
            on_progress: called with the number of samples that are in the cache.

        Raises:
            DataError: if too many samples cannot be read, or the disk is full.
        """
        left = [sample for sample in range(len(self._samples)) if sample not in self._rows]
        visits = ([Visit(draw, sample)] for sample, draw in product(left, range(self._draws)))
        noted: list[Failure] = []
        batches = load(self._source, visits, self._config.data, False, noted.append)
        next_shard = 1 + max((row.shard for row in self._rows.values()), default=-1)
        on_progress(len(self._rows))
        with (
            naming_errors(self._out, CACHE),
            ShardWriter(self._out / SHARDS, next_shard, self._shard_bytes) as shards,
        ):
            for sample in left:
                self._write(sample, batches, noted, shards)
                on_progress(len(self._rows))

    def _write(
        self, sample: int, batches: Iterator[PackedBatch], noted: list[Failure], shards: ShardWriter
    ) -> None:
        """Append the draws of a sample to a shard, and record it."""
        stream, shard, start = shards.begin()
        checksums, replaced = [], []
        for draw in range(self._draws):
            batch = next(batches)
            content = draw_members(Visit(draw, sample), batch.clip, batch.kept)
            stream.write(content)
            checksums.append(zlib.crc32(content))
            if noted:
                failures = [(each.sample, each.reason, each.damaged) for each in noted]
                replaced.append((draw, int(batch.item[0]), failures))
                self._slots[draw] += 1
                self._check_failures(draw, noted[0])
                noted.clear()
        stream.flush()
        row = CachedSample(sample, shard, start, stream.tell(), checksums, replaced)
        append_row(self._out / LOG_FILE, asdict(row))
        self._rows[sample] = row

    def finish(self) -> dict[str, Any]:
        """Make the cache valid, and return its totals.

        Raises:
            DataError: if the cache cannot be written.
        """
        rows = [self._rows[sample] for sample in range(len(self._samples))]
        cache = self._opened(rows)
        arrays = {name: getattr(cache, name) for name in ("shard", "start", "checksum")}
        replaced = [(row.sample, *each) for row in rows for each in row.replaced]
        facts = {
            "content": content_of(self._config, self._samples),
            "bytes": len(rows) * self._draws * self._shape.num_bytes,
            "shards": len({row.shard for row in rows}),
            "replaced": replaced,
        }
        with naming_errors(self._out, CACHE):
            replace_index(self._out, arrays, facts, CACHE)
            replace_file(self._out / LIST_FILE, self._list_text(rows))
        return {name: facts[name] for name in ("bytes", "shards")} | {"replaced_draws": len(replaced)}

    def _read_log(self) -> None:
        """Read the record, whose first line says what the cache holds, or begin one."""
        file = self._out / LOG_FILE
        lines = [line for line in iterate_json_rows(file) if line is not None]
        if not lines:
            append_row(file, content_of(self._config, self._samples))
        elif "settings" not in lines[0]:
            raise DataError(f"{file}: the record of the token cache is damaged", fix="remove its folder")
        else:
            check_content(self._out, lines[0], self._config, self._samples, fill=True)
        rows = [CachedSample(**line) for line in lines[1:]]
        self._rows = {row.sample: row for row in rows}

    def _is_intact(self, row: CachedSample) -> bool:
        cache = self._opened([row])
        try:
            for draw in range(self._draws):
                read_draw(cache, Visit(draw, 0))
        except DataError:
            return False
        return True

    def _opened(self, rows: Sequence[CachedSample]) -> TokenCache:
        """Return a cache of these samples, in this order."""
        return TokenCache(
            self._out / SHARDS,
            self._shape,
            np.array([row.shard for row in rows], np.int32),
            np.array([row.start for row in rows], np.int64),
            np.array([row.checksums for row in rows], np.uint32),
            {},
        )

    def _check_failures(self, draw: int, last: Failure) -> None:
        """Raise an error if more samples failed than an epoch of training may replace."""
        max_pct, num_failed = self._config.data.max_broken_pct, self._slots[draw]
        if num_failed > max_pct / 100 * len(self._samples):
            raise DataError(
                "too many videos cannot be read",
                given=f"{num_failed}, for example {self._samples[last.sample].name}: {last.reason}",
                allowed=f"{max_pct:g} % of {len(self._samples)} (data.max_broken_pct)",
                fix="repair the files, find all of them with `everest-ds data check`, or raise"
                " data.max_broken_pct",
            )

    def _list_text(self, rows: Sequence[CachedSample]) -> str:
        stream = io.StringIO()
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["name", "label", "shard", "folder"])
        for (name, label), row in zip(names_and_labels(self._samples), rows, strict=True):
            table.writerow([name, label, shard_name(row.shard), folder_of(row.sample)])
        return stream.getvalue()
