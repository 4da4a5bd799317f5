"""The samples of a run: the entries of its manifests, without those that a ledger lists as broken.

The excluded training samples are fixed when a run first starts, and recorded in its folder. Entries added to
the ledger later must not change the order of samples when the run resumes.
"""

from __future__ import annotations

import json
from pathlib import Path

from everest_ds.config import Experiment
from everest_ds.data.decoding.open_video import require_decoder
from everest_ds.data.frames import ClipFrames
from everest_ds.data.ledger import Ledger, Problem, Usable, exclude
from everest_ds.data.video_list import Sample, read_manifest
from everest_ds.errors import ConfigError, DataError
from everest_ds.log import logger


def read_samples(config: Experiment, split: str) -> Usable:
    """Read the samples of `data.<split>`, separated into usable ones and those excluded by the ledger.

    Raises:
        ConfigError: if the config names no manifest for the split, or a decoder that is not installed.
        DataError: if the manifest is missing or invalid, or all of its samples are broken.
    """
    require_decoder(config.data.decoder)
    samples = _read(config, split)
    needed = ClipFrames.of(config.candidate_geometry.num_frames, config.data).needed
    manifest = _manifest(config, split)
    usable = exclude(samples, Ledger.of_manifest(manifest), needed)
    if usable.excluded:
        logger.warning("%s: %d of %d samples are excluded", manifest, len(usable.excluded), len(samples))
    if not usable.samples:
        first = usable.excluded[0]
        raise DataError(f"{manifest}: all samples are broken", given=f"{first.sample.name}: {first.reason}")
    return usable


def read_training_samples(config: Experiment, settled: Path) -> Usable:
    """Read the samples of `data.train`, excluding exactly the samples that `settled` names if it exists.

    Args:
        config: the run config.
        settled: the run's `excluded.json`; if it is missing, the ledger decides, as in `read_samples`.

    Raises:
        ConfigError: as `read_samples`.
        DataError: as `read_samples`, and if an excluded sample is no longer in the manifest.
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
            f"{config.data.train}: the manifest has changed since the run began", given=f"no {min(gone)}"
        )
    return Usable(
        [sample for sample in everything if sample.name not in reasons],
        [Problem(sample, reasons[sample.name]) for sample in everything if sample.name in reasons],
    )


def record_excluded(usable: Usable, settled: Path) -> None:
    """Record the excluded samples of `usable` for the rest of the run, as `{name: reason}`."""
    if not settled.is_file():
        reasons = {problem.sample.name: problem.reason for problem in usable.excluded}
        settled.write_text(json.dumps(reasons, indent=1) + "\n")


def _manifest(config: Experiment, split: str) -> Path:
    manifest: Path | None = getattr(config.data, split)
    if manifest is None:
        raise ConfigError(f"data.{split} is not set", fix=f"name a manifest: data.{split}=path/to/list.txt")
    return manifest


def _read(config: Experiment, split: str) -> list[Sample]:
    return read_manifest(
        _manifest(config, split),
        root=config.data.root,
        num_classes=config.model.num_classes,
        labelled=config.task == "finetune",
    )
