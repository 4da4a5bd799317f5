"""Benchmark of the token cache: clips per second of a core, beside decoding the same clips.

Example:
    python tools/bench_cache.py FOLDER_OF_VIDEOS --rounds 5 --json cache.json

The clips are those of VideoMAE's pre-training: 16 frames at stride 4, cropped to 224. The cache is read from
the page cache of the system; figures are CPU times, and medians over rounds.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_sources import fill_cache
from torch.utils.data import default_collate

from everest_ds.cli.options import JsonFile
from everest_ds.cli.program import run_program
from everest_ds.config import BatchPlan, Experiment
from everest_ds.console import print_facts, write_json
from everest_ds.data.clips import CachedClips, TrainingClips, training_batches
from everest_ds.data.data_set import list_samples
from everest_ds.data.order import Visit
from everest_ds.data.store.token_cache import TokenCache
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError
from everest_ds.models.selection.packer import Packer
from everest_ds.training.run_folder import describe_environment

_DRAWS, _BATCH = 2, 8


def main(
    videos: Annotated[Path, typer.Argument(help="A folder of videos, a manifest or a frame store.")],
    samples: Annotated[int, typer.Option(help="Samples in the cache; the videos repeat.")] = 64,
    rounds: Annotated[int, typer.Option(help="Measurements of each figure.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Fill a token cache, then measure reading, checking and collating its clips, and decoding them."""
    torch.set_num_threads(1)
    given = list_samples(videos)
    repeated = [given[i % len(given)] for i in range(samples)]
    with tempfile.TemporaryDirectory() as folder:
        config = experiment(Path(folder))
        cache = fill_cache(config, repeated)
        facts = measure(config, repeated, cache, rounds)
    print_facts("Token cache", facts)
    write_json(json_file, {"environment": describe_environment(1), **facts})


def experiment(cache: Path) -> Experiment:
    """Build the config of a pre-training that reads `cache`."""
    return Experiment.model_validate(
        {
            "task": "pretrain",
            "tokens": {"score": "pixel"},
            "data": {
                "decoder": "pyav",
                "num_workers": 1,
                "draws": _DRAWS,
                "token_cache": cache,
                "short_videos": "hold_last_frame",
            },
            "batch": {"micro_batch_size": _BATCH},
        }
    )


def measure(config: Experiment, samples: Sequence[Sample], cache: TokenCache, rounds: int) -> dict[str, Any]:
    """Return the CPU times per clip, and the rates that follow from them."""
    cached = CachedClips(samples, config, cache)
    decoded = TrainingClips(samples, config, Packer(config))
    visits = [Visit(draw, sample) for draw in range(_DRAWS) for sample in range(len(samples))]

    def read(source: TrainingClips, visits: Sequence[Visit]) -> int:
        for first in range(0, len(visits), _BATCH):
            default_collate([source[visit].clips[0] for visit in visits[first : first + _BATCH]])
        return len(visits)

    def load() -> int:
        plan, steps = BatchPlan(_BATCH, 1, 1), range(10 * len(visits) // _BATCH)
        batches = training_batches(samples, config, plan, 0, steps, False, _refuse, cache=cache)
        return sum(len(batch.clip) for batch in batches)

    read_ms = _cpu_ms(lambda: read(cached, visits), rounds)
    decode_ms = _cpu_ms(lambda: read(decoded, visits[: len(samples)]), min(rounds, 3))
    loader_ms = _cpu_ms(load, rounds)
    return {
        "bytes_per_clip": cache.shape.num_bytes,
        "read_check_collate_cpu_ms": round(read_ms, 3),
        "clips_per_s_per_core": round(1000 / read_ms),
        "with_worker_and_rank_cpu_ms": round(loader_ms, 3),
        "decode_select_collate_cpu_ms": round(decode_ms, 1),
        "speedup": round(decode_ms / read_ms),
    }


def _cpu_ms(act: Callable[[], int], rounds: int) -> float:
    """Return the median CPU time per clip of this process and its workers, in milliseconds."""
    times = []
    for _ in range(rounds):
        before = _cpu_seconds()
        clips = act()
        times.append(1000 * (_cpu_seconds() - before) / clips)
    return statistics.median(times)


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _refuse(failure: object) -> None:
    raise DataError("a clip cannot be read", given=failure)


if __name__ == "__main__":
    run_program(main)
