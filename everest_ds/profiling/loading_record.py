"""The record of measured loading in the user's cache, from which later predictions take their rates."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from everest_ds.cache import cache_folder
from everest_ds.config import Experiment
from everest_ds.costs.bottleneck import MeasuredLoading, store_speedup
from everest_ds.costs.hardware.machine import Machine
from everest_ds.data.store.index import is_store
from everest_ds.errors import UsageError

# The settings of `data` that decide how long a clip takes to load, beside the size of the clip.
_SETTINGS = {
    "frame_stride": True,
    "sampling": True,
    "short_videos": True,
    "train_crop": True,
    "decoder": True,
    "decode_short_side": True,
}


def write_loading(data: Path, config: Experiment, found: MeasuredLoading) -> Path:
    """Record what was measured for the data set at `data`, and return the file.

    Raises:
        UsageError: if the file cannot be written.
    """
    file = _file(data, config)
    tree = {"changed": data.stat().st_mtime_ns, "loading": found.as_json()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tree, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"{file}: cannot record the measurement", given=str(error)) from None
    return file


def recorded_loading(config: Experiment) -> MeasuredLoading | None:
    """Return what was measured for the clips of `config`; None if the data set was not measured as it is."""
    data = config.data.train
    if data is None or not data.exists():
        return None
    try:
        tree = json.loads(_file(data, config).read_text())
        is_current = tree["changed"] == data.stat().st_mtime_ns
        return MeasuredLoading.from_json(tree["loading"]) if is_current else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a record is optional: without a readable one, predictions use the defaults


def knowing_data(machine: Machine, config: Experiment) -> Machine:
    """Return the machine with the measured loading of the config's data.

    If it was not measured and the data set is a frame store, the machine decodes as fast as is usual for one.
    """
    data, loading = config.data, recorded_loading(config)
    if loading is None and data.train is not None and is_store(data.train):
        faster = machine.decode_pixels_per_s * store_speedup(data.frame_stride)
        machine = replace(machine, decode_pixels_per_s=faster)
    return replace(machine, loading=loading)


def _file(data: Path, config: Experiment) -> Path:
    """Return the file of the record, whose name follows from everything that the measurement depends on."""
    clip = config.candidate_geometry
    settings = config.data.model_dump(mode="json", include=_SETTINGS)
    facts = {"data": str(data.resolve()), "frames": clip.num_frames, "size": clip.image_size, **settings}
    digest = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "loading" / f"{digest}.json"
