"""Test of the measured time of a token cache, against that of its checksums and copies alone."""

from __future__ import annotations

import time
import zlib

from everest_ds.data.store.token_cache import DrawShape
from everest_ds.profiling.cache_reading import measure_cache
from tests.profiling.test_loading_stages import experiment


def test_a_draw_takes_longer_than_its_checksum_and_a_copy() -> None:
    repeats = 4
    config = experiment(draws=2, repeats=repeats)
    cost = measure_cache(config)
    draw, checks, copies = bytearray(DrawShape.of(config).num_bytes), [], []
    for _ in range(100):
        began = time.perf_counter()
        zlib.crc32(draw)
        checked = time.perf_counter()
        bytes(draw)
        checks.append(checked - began)
        copies.append(time.perf_counter() - checked)
    assert cost.decode_ms > 1e3 * (min(checks) + min(copies)) / repeats
    assert cost.collate_ms > 1e3 * min(copies) / repeats
    assert cost.clip_ms(1, packs=True) < 50
