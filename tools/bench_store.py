"""Measure a large frame store: the time and memory to open it, and the memory over many random reads.

The store has the index of a million different samples, whose frames are those of a few synthetic videos. Each
measurement is a fresh process.

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

from everest_ds.cli.options import JsonFile
from everest_ds.cli.program import run_program
from everest_ds.console import print_facts, write_json
from everest_ds.data.data_set import read_data_set
from everest_ds.data.manifest_lines import SampleColumns
from everest_ds.data.store.index import PlaceColumns, open_store, write_store_index
from everest_ds.data.store.layout import SHARDS, Packing
from everest_ds.data.store.pack import StorePacker
from everest_ds.data.synthetic import SyntheticSpec, synthesize

_NUM_VIDEOS = 12
_OPEN = """
import json, sys, time
from pathlib import Path
from everest_ds.data.store.index import open_store
from everest_ds.host_memory import resident_bytes
before, begin = resident_bytes(), time.perf_counter()
samples = open_store(Path(sys.argv[1]))
sample = samples[len(samples) // 2]
seconds = time.perf_counter() - begin
print(json.dumps({"open_s": seconds, "kept_mib": (resident_bytes() - before) / 2**20}))
"""
_READ = """
import json, sys, time
import numpy as np, torch
from pathlib import Path
from everest_ds.config import Experiment
from everest_ds.data.clips import TrainingClips
from everest_ds.data.order import Visit
from everest_ds.data.store.index import open_store
from everest_ds.host_memory import resident_bytes
torch.set_num_threads(1)
samples, reads = open_store(Path(sys.argv[1])), int(sys.argv[2])
config = Experiment.model_validate({"task": "pretrain", "batch": {"micro_batch_size": 1}})
clips, rng, resident = TrainingClips(samples, config), np.random.default_rng(0), []
begin = time.process_time()
for number in range(reads):
    clips[Visit(0, int(rng.integers(len(samples))))]
    if number % (reads // 20) == reads // 40:
        resident.append(resident_bytes() / 2**20)
cpu_ms = 1000 * (time.process_time() - begin) / reads
print(json.dumps({"cpu_ms_per_clip": cpu_ms, "resident_mib": resident}))
"""


def main(
    samples: Annotated[int, typer.Option(min=1, help="Number of samples in the index.")] = 1_000_000,
    reads: Annotated[int, typer.Option(min=40, help="Number of clips to read.")] = 10_000,
    json_file: JsonFile = None,
) -> None:
    """Measure a frame store with many samples."""
    with tempfile.TemporaryDirectory() as folder:
        store = _large_store(Path(folder), samples)
        opened = [_measure(_OPEN, store) for _ in range(3)]
        read = _measure(_READ, store, str(reads))
        index = next(store.glob("index-*.npz")).stat().st_size
    resident = read["resident_mib"]
    facts = {
        "samples": samples,
        "index_mib": round(index / 2**20, 1),
        "open_s": round(min(each["open_s"] for each in opened), 2),
        "kept_mib": round(max(each["kept_mib"] for each in opened), 1),
        "reads": reads,
        "cpu_ms_per_clip": round(read["cpu_ms_per_clip"], 2),
        "resident_mib_first_tenth": round(float(np.mean(resident[1:3])), 1),
        "resident_mib_last_tenth": round(float(np.mean(resident[-2:])), 1),
    }
    print_facts("Frame store", facts)
    write_json(json_file, facts | {"resident_mib": resident})


def _large_store(folder: Path, num_samples: int) -> Path:
    """Pack a few videos, and write the index of a store in which they have many names."""
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
    return many


def _measure(script: str, *words: object) -> dict[str, Any]:
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    run_program(main)
