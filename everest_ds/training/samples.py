"""The samples of a run: its manifests without what their ledgers know to be broken, by name and counted.

What a run leaves out is settled when it starts and kept in its folder: a ledger that learns more meanwhile
must not change the order of samples of a run that goes on.
"""

from __future__ import annotations

import json
from pathlib import Path

from everest_ds.config import Experiment
from everest_ds.data.decode import require_decoder
from everest_ds.data.frames import ClipFrames
from everest_ds.data.ledger import Ledger, Problem, Usable, exclude
from everest_ds.data.manifest import Sample, read_manifest
from everest_ds.errors import ConfigError, DataError
from everest_ds.log import logger


def read_samples(config: Experiment, split: str) -> Usable:
    """The samples of `data.<split>` that the manifest's ledger knows no fault of, and those left out.

    Raises:
        ConfigError: if the config names no such manifest, or a decoder that is not installed.
        DataError: if the manifest is missing or wrong, or all of its samples are broken.
    """
    require_decoder(config.data.decoder)
    samples = _read(config, split)
    needed = ClipFrames.of(config.candidate_geometry.num_frames, config.data).needed
    manifest = _manifest(config, split)
    usable = exclude(samples, Ledger.of_manifest(manifest), needed)
    if usable.excluded:
        logger.warning("%s: %d of %d samples are left out", manifest, len(usable.excluded), len(samples))
    if not usable.samples:
        first = usable.excluded[0]
        raise DataError(f"{manifest}: all samples are broken", given=f"{first.sample.name}: {first.reason}")
    return usable


def read_training_samples(config: Experiment, settled: Path) -> Usable:
    """`read_samples` of `data.train`; where `settled` is a file, without what that names and nothing else.

    Raises:
        DataError: also if a sample that the run left out is not in the manifest any more.
    """
    usable = read_samples(config, "train")
    if not settled.is_file():
        return usable
    reasons: dict[str, str] = json.loads(settled.read_text())
    if {problem.sample.name for problem in usable.excluded} == set(reasons):
        return usable
    everything = _read(config, "train")
    gone = set(reasons) - {sample.name for sample in everything}
    if gone:
        raise DataError(
            f"{config.data.train}: not the list that this run began with", given=f"no {min(gone)}"
        )
    return Usable(
        [sample for sample in everything if sample.name not in reasons],
        [Problem(sample, reasons[sample.name]) for sample in everything if sample.name in reasons],
    )


def settle(usable: Usable, settled: Path) -> None:
    """Keep for the rest of the run what it leaves out: `{name: reason}`."""
    if not settled.is_file():
        reasons = {problem.sample.name: problem.reason for problem in usable.excluded}
        settled.write_text(json.dumps(reasons, indent=1) + "\n")


def _manifest(config: Experiment, split: str) -> Path:
    manifest: Path | None = getattr(config.data, split)
    if manifest is None:
        raise ConfigError(f"data.{split} is not set", fix=f"give a manifest: data.{split}=path/to/list.txt")
    return manifest


def _read(config: Experiment, split: str) -> list[Sample]:
    return read_manifest(
        _manifest(config, split),
        root=config.data.root,
        num_classes=config.model.num_classes,
        labelled=config.task == "finetune",
    )
