"""Measure a large frame store and a large token cache: time and memory to open them, and to read many clips.

Both have the index of a million different samples, whose frames or draws are those of a few synthetic videos.
Each measurement is a fresh process.

Example:
    python tools/bench_store.py --samples 1000000 --reads 10000
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from bench_sources import fill_cache

from everest_ds.cli.options import JsonFile
from everest_ds.cli.program import run_program
from everest_ds.config import Experiment
from everest_ds.console import print_facts, write_json
from everest_ds.data.data_set import read_data_set
from everest_ds.data.manifest_lines import SampleColumns
from everest_ds.data.store.index import PlaceColumns, open_store, replace_index, write_store_index
from everest_ds.data.store.layout import SHARDS, Packing
from everest_ds.data.store.pack import StorePacker
from everest_ds.data.store.token_cache import CACHE, content_of
from everest_ds.data.synthetic import SyntheticSpec, synthesize

_NUM_VIDEOS = 12
_DRAWS = 4
_MEASURE = """
import json, sys, time
import numpy as np, torch
from everest_ds.config import Experiment
from everest_ds.data.clips import CachedClips, TrainingClips
from everest_ds.data.order import Visit
from everest_ds.data.store.index import open_store
from everest_ds.data.store.token_cache import open_token_cache
from everest_ds.host_memory import resident_bytes
torch.set_num_threads(1)
config, reads = Experiment.model_validate_json(sys.argv[1]), int(sys.argv[2])
def opened(act):
    before, begin = resident_bytes(), time.perf_counter()
    found = act()
    facts = {"open_s": time.perf_counter() - begin, "kept_mib": (resident_bytes() - before) / 2**20}
    return found, facts
samples, facts = opened(lambda: open_store(config.data.train))
if config.data.token_cache is None:
    clips = TrainingClips(samples, config)
else:
    cache, facts = opened(lambda: open_token_cache(config, samples))
    clips = CachedClips(samples, config, cache)
rng, resident = np.random.default_rng(0), []
begin = time.process_time()
for number in range(reads):
    clips[Visit(number, int(rng.integers(len(samples))))]
    if number % (reads // 20) == reads // 40:
        resident.append(resident_bytes() / 2**20)
cpu_ms = 1000 * (time.process_time() - begin) / reads
print(json.dumps({**facts, "cpu_ms_per_clip": cpu_ms, "resident_mib": resident}))
"""


def main(
    samples: Annotated[int, typer.Option(min=1, help="Number of samples in each index.")] = 1_000_000,
    reads: Annotated[int, typer.Option(min=40, help="Number of clips to read from each.")] = 10_000,
    json_file: JsonFile = None,
) -> None:
    """Measure a frame store and a token cache with many samples."""
    with tempfile.TemporaryDirectory() as folder:
        few, many = _large_store(Path(folder), samples)
        in_store = _experiment(many)
        in_cache = _large_cache(Path(folder), few, many)
        facts: dict[str, Any] = {
            "samples": samples,
            "reads": reads,
            "frame_store": _measure(in_store, many, reads),
            "token_cache": _measure(in_cache, Path(folder) / "cache", reads),
        }
    for title, name in (("Frame store", "frame_store"), ("Token cache", "token_cache")):
        print_facts(title, {"samples": samples, "reads": reads, **facts[name]})
    write_json(json_file, facts)


def _experiment(store: Path, **data: object) -> Experiment:
    """Return the config of a pre-training on a store."""
    return Experiment.model_validate(
        {
            "task": "pretrain",
            "tokens": {"score": "pixel"},
            "data": {"train": store, "num_workers": 1, **data},
            "batch": {"micro_batch_size": 1},
        }
    )


def _large_store(folder: Path, num_samples: int) -> tuple[Path, Path]:
    """Pack a few videos, and write the index of a store in which they have many names; return both stores."""
    spec = SyntheticSpec(num_frames=80, size=256)
    (manifest,) = synthesize(folder / "videos", {"train": _NUM_VIDEOS}, spec, workers=os.cpu_count() or 1)
    given = read_data_set(manifest, root=None, num_classes=None, labelled=True)
    packer = StorePacker(given, manifest.parent, folder / "few", Packing(), os.cpu_count() or 1)
    packer.pack_all(lambda done: None)
    packer.finish()
    few = open_store(folder / "few")
    rows = np.arange(num_samples) % len(few)
    names = [f"kinetics_train/class_{n % 400:03}/video_{n:07}.mp4".encode() for n in range(num_samples)]
    stops = np.cumsum([len(name) for name in names], dtype=np.int64)
    columns = SampleColumns(
        names=np.frombuffer(b"".join(names), np.uint8),
        starts=np.concatenate([np.zeros(1, np.int64), stops[:-1]]),
        stops=stops,
        labels=few.columns.labels[rows],
        spans=few.columns.spans,
        lines=np.arange(1, num_samples + 1, dtype=np.int32),
        doubtful=few.columns.doubtful,
    )
    many = folder / "many"
    many.mkdir()
    (many / SHARDS).symlink_to(few.shards)
    places = PlaceColumns._make(column[rows] for column in few.places)
    write_store_index(many, columns, places, {"packing": few.packing.__dict__})
    return folder / "few", many


def _large_cache(folder: Path, few: Path, many: Path) -> Experiment:
    """Fill a cache of a few samples, and write the index of one in which they have many names."""
    of_few = _experiment(few, draws=_DRAWS, token_cache=folder / "cache-of-few")
    filled = fill_cache(of_few, open_store(few))
    config, samples = _experiment(many, draws=_DRAWS, token_cache=folder / "cache"), open_store(many)
    rows = np.arange(len(samples)) % len(filled.shard)
    arrays = {name: getattr(filled, name)[rows] for name in ("shard", "start", "checksum")}
    (folder / "cache").mkdir()
    (folder / "cache" / SHARDS).symlink_to(filled.shards)
    replace_index(folder / "cache", arrays, {"content": content_of(config, samples), "replaced": []}, CACHE)
    return config


def _measure(config: Experiment, folder: Path, reads: int) -> dict[str, Any]:
    """Open the store or cache `folder` in three processes, and read most clips in the last one."""
    measured = [_in_process(config, each) for each in (40, 40, reads)]
    resident = measured[-1]["resident_mib"]
    return {
        "index_mib": round(next(folder.glob("index-*.npz")).stat().st_size / 2**20, 1),
        "open_s": round(min(each["open_s"] for each in measured), 2),
        "kept_mib": round(max(each["kept_mib"] for each in measured), 1),
        "cpu_ms_per_clip": round(measured[-1]["cpu_ms_per_clip"], 2),
        "resident_mib_first_tenth": round(float(np.mean(resident[1:3])), 1),
        "resident_mib_last_tenth": round(float(np.mean(resident[-2:])), 1),
    }


def _in_process(config: Experiment, reads: int) -> dict[str, Any]:
    command = [sys.executable, "-c", _MEASURE, config.model_dump_json(), str(reads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    run_program(main)
