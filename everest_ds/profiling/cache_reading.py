"""The work of loading clips from a token cache, measured on a cache of random tokens.

All draws of a cache have one size, and the time to read one does not depend on its content, so no video is
needed.

Shape legend: R repeats, K kept tokens, P values of a tubelet.
"""

from __future__ import annotations

import tempfile
import time
import zlib
from pathlib import Path
from statistics import median

import numpy as np
import torch

from everest_ds.config import Experiment
from everest_ds.costs.bottleneck import LoadingCost
from everest_ds.data.clips import CachedClips
from everest_ds.data.order import Visit
from everest_ds.data.store.cached_draws import draw_members
from everest_ds.data.store.layout import shard_name
from everest_ds.data.store.token_cache import DrawShape, TokenCache
from everest_ds.data.video_list import Sample
from everest_ds.models.threads import one_thread
from everest_ds.profiling.loading_stages import HandOver

_CACHE_BYTES, _MOST_DRAWS = 2**26, 64  # more than a core's own caches hold
_PASSES = 5


def measure_cache(config: Experiment) -> LoadingCost:
    """Measure how long the clips of a run take to load from a token cache in the page cache of the system.

    Args:
        config: config of the run, with a token score that allows `data.token_cache`.
    """
    with tempfile.TemporaryDirectory(prefix="everest-ds-") as folder, one_thread():
        cache = _random_cache(DrawShape.of(config), Path(folder))
        num_draws = len(cache.start)
        clips = CachedClips([Sample(Path(folder), 0)] * num_draws, config, cache)
        hand_over = HandOver(clips, config.batch.micro_batch_size)
        passes = [_read_all(clips, num_draws, hand_over) for _ in range(1 + _PASSES)]
    num_clips = num_draws * cache.shape.repeats
    read_s, collate_s = (median(times) for times in zip(*passes[1:], strict=True))  # the first one warms up
    return LoadingCost(1e3 * read_s / num_clips, collate_ms=1e3 * collate_s / num_clips)


def _random_cache(shape: DrawShape, folder: Path) -> TokenCache:
    """Write a cache that holds one draw of each of its samples."""
    number = min(max(2, _CACHE_BYTES // shape.num_bytes), _MOST_DRAWS)
    rng, checksums = np.random.default_rng(0), []
    with open(folder / shard_name(0), "wb") as shard:
        for sample in range(number):
            tubelets_RKP = rng.integers(
                256, size=(shape.repeats, shape.num_kept, shape.values), dtype=np.uint8
            )
            kept_RK = np.tile(np.arange(shape.num_kept), (shape.repeats, 1))
            draw = draw_members(Visit(0, sample), torch.from_numpy(tubelets_RKP), torch.from_numpy(kept_RK))
            checksums.append([zlib.crc32(draw)])
            shard.write(draw)
    starts = np.arange(number) * shape.num_bytes
    return TokenCache(folder, shape, np.zeros(number, np.int32), starts, np.array(checksums, np.uint32), {})


def _read_all(clips: CachedClips, num_draws: int, hand_over: HandOver) -> tuple[float, float]:
    """Return the CPU time of reading every draw, and that of handing the clips over."""
    began, collate_s = time.process_time(), 0.0
    for sample in range(num_draws):
        item = clips[Visit(0, sample)]
        read = time.process_time()
        hand_over(item.clips)
        collate_s += time.process_time() - read
    return time.process_time() - began - collate_s, collate_s
