"""The samples of a run, without those that a ledger lists as broken, and the record of unreadable ones.

The excluded training samples are fixed when a run first starts, and recorded in its folder. Entries added to
the ledger later must not change the order of samples when the run resumes.

Each rank notes the videos that its own loader could not read. Rank 0 writes `broken.jsonl`, one object per
line; too many unreadable videos end the run. An epoch keeps its length: a replacement fills the video's slot
(`data.order.stand_ins`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everest_ds.config import DataConfig, Experiment
from everest_ds.data.data_set import check_frames, read_data_set
from everest_ds.data.decoding.open_video import require_decoder, require_motion
from everest_ds.data.frames import ClipFrames
from everest_ds.data.ledger import Ledger, Problem, Usable, exclude
from everest_ds.data.reading import Failure
from everest_ds.data.store.token_cache import EXCLUDED_FILE
from everest_ds.data.video_list import Sample, leave_out, names_and_labels
from everest_ds.durable_files import append_row, read_json_rows, replace_json, replace_rows
from everest_ds.errors import DataError, RunFolderError
from everest_ds.log import logger
from everest_ds.parallel.world import World
from everest_ds.probing.splits import check_classes
from everest_ds.training.input_files import PROBE_SPLITS, manifest_of, reads_motion


def read_samples(config: Experiment, split: str) -> Usable:
    """Read the samples of `data.<split>`, separated into usable ones and those excluded by the ledger.

    Raises:
        ConfigError: if the config names no manifest for the split, a decoder that is not installed, or a
            frame store that lacks frames of the clips.
        DataError: if the manifest is missing or invalid, all of its samples are broken, or the codec score is
            wanted and the first sample has no motion vectors.
    """
    require_decoder(config.data.decoder)
    samples = _read(config, split)
    needed = ClipFrames.of(config.candidate_geometry.num_frames, config.data).needed
    manifest = manifest_of(config, split)
    check_frames(samples, manifest, config.data)
    usable = exclude(samples, Ledger.of_manifest(manifest, faults_below=needed), needed)
    if usable.excluded:
        logger.warning("%s: %d of %d samples are excluded", manifest, len(usable.excluded), len(samples))
    if usable.samples and reads_motion(config, split):
        require_motion(usable.samples[0], config.data)
    if not usable.samples:
        first = usable.excluded[0]
        raise DataError(f"{manifest}: all samples are broken", given=f"{first.sample.name}: {first.reason}")
    return usable


def read_probe_samples(config: Experiment) -> list[Usable]:
    """Read the labelled samples of `data.probe_train` and, if it is set, of `data.probe_test`.

    Raises:
        ConfigError: as `read_samples`.
        DataError: as `read_samples`, and if the training samples have a single class.
    """
    sets = [read_samples(config, split) for split in PROBE_SPLITS if getattr(config.data, split) is not None]
    check_classes(sets[0].samples, str(config.data.probe_train))
    return sets


def read_training_samples(config: Experiment, settled: Path) -> Usable:
    """Read the samples of `data.train`, excluding exactly the samples that `settled` names if it exists.

    Args:
        config: the run config.
        settled: the run's `excluded.json`. If it is missing, that of the token cache takes its place, and
            without a cache the ledger decides, as in `read_samples`.

    Raises:
        ConfigError: as `read_samples`.
        DataError: as `read_samples`, and if an excluded sample is no longer in the manifest.
    """
    usable = read_samples(config, "train")
    if not settled.is_file() and config.data.token_cache is not None:
        settled = config.data.token_cache / EXCLUDED_FILE
    if not settled.is_file():
        return usable
    reasons = _read_excluded(settled)
    if {problem.sample.name for problem in usable.excluded} == set(reasons):
        return usable
    everything = _read(config, "train")
    names = {row: name for row, (name, _) in enumerate(names_and_labels(everything)) if name in reasons}
    gone = set(reasons) - set(names.values())
    if gone:
        raise DataError(
            f"{config.data.train}: the manifest has changed since the run began",
            given=f"{min(gone)} is no longer listed",
            fix="restore the manifest, or start over in another run.dir",
        )
    excluded = [Problem(everything[row], reasons[name]) for row, name in names.items()]
    return Usable(leave_out(everything, list(names)), excluded)


def record_excluded(usable: Usable, settled: Path) -> None:
    """Record the excluded samples of `usable` for the rest of the run, as `{name: reason}`."""
    if not settled.is_file():
        reasons = {problem.sample.name: problem.reason for problem in usable.excluded}
        replace_json(settled, reasons)


class BrokenVideos:
    """The unreadable videos of a run, by epoch.

    Args:
        samples: the training samples of the run.
        data: `max_broken_pct` is the limit per epoch. Damaged files are recorded in the ledger of `train`, so
            that later runs leave them out; this run keeps them, because its order would change.
        file: the `broken.jsonl` of the run.
        world: the ranks of the run.
    """

    def __init__(self, samples: Sequence[Sample], data: DataConfig, file: Path, world: World) -> None:
        self._samples = samples
        self._manifest = data.train
        self._max_pct = data.max_broken_pct
        self._file = file
        self._world = world
        self._noted: list[Failure] = []  # failures of this rank since the last `collect`
        self._known: set[Failure] = set()  # all collected failures of all ranks

    def forget_after(self, step: int) -> None:
        """Drop failures after `step`, from which the run resumes: they will recur. Call on every rank."""
        rows = self._world.share(lambda: _keep_until(self._file, step))
        self._known = {Failure(*(row[name] for name in Failure._fields)) for row in rows}

    def note(self, failure: Failure) -> None:
        """Note a sample that this rank's loader could not read."""
        self._noted.append(failure)

    def collect(self, step: int, epoch: int) -> int:
        """Gather and record the failures that all ranks have noted. Call on every rank.

        Returns:
            The number of slots of `epoch` that a replacement has filled so far.

        Raises:
            DataError: on every rank, if more than `max_broken_pct` of an epoch's videos are unreadable.
        """
        noted = {failure for part in self._world.gather(self._noted) for failure in part}
        self._noted = []
        new = sorted(noted - self._known)
        self._known |= noted
        if new:
            self._world.share(lambda: self._write(step, new))
        for each in sorted({failure.epoch for failure in new}):
            slots = self._slots(each)
            if len(slots) > self._max_pct / 100 * len(self._samples):
                raise self._too_many(each, sorted(slots))
        return len(self._slots(epoch))

    def _slots(self, epoch: int) -> set[int]:
        return {failure.slot for failure in self._known if failure.epoch == epoch}

    def _write(self, step: int, failures: list[Failure]) -> None:
        for failure in failures:
            name = self._samples[failure.sample].name
            logger.warning("epoch %d: cannot read %s: %s", failure.epoch, name, failure.reason)
            append_row(self._file, {"step": step, **failure._asdict(), "video": name})
        if self._manifest is None:
            return
        ledger = Ledger.of_manifest(self._manifest, faults_below=1)
        try:
            for failure in failures:
                sample = self._samples[failure.sample]
                if failure.damaged and ledger.broken(sample) is None:
                    ledger.record(sample, failure.reason, source="run")
        except DataError as error:  # data sets are often read-only, and the run has its own record
            logger.warning("%s", error)

    def _too_many(self, epoch: int, slots: list[int]) -> DataError:
        reasons = {failure.sample: failure.reason for failure in self._known}
        first = f"{self._samples[slots[0]].name}: {reasons[slots[0]]}"
        error = DataError(
            f"too many videos cannot be read in epoch {epoch}",
            given=f"{len(slots)} of {len(self._samples)}, for example {first}",
            allowed=f"{self._max_pct:g} % (data.max_broken_pct)",
            fix=f"see {self._file}, repair the files, or raise data.max_broken_pct",
        )
        error.on_every_rank = True
        return error


def _read(config: Experiment, split: str) -> Sequence[Sample]:
    probes = split in PROBE_SPLITS  # which may have other classes than the model
    return read_data_set(
        manifest_of(config, split),
        root=config.data.root,
        num_classes=None if probes else config.model.num_classes,
        labelled=probes or config.task == "finetune",
    )


def _keep_until(file: Path, step: int) -> list[dict[str, Any]]:
    rows = [row for row in read_json_rows(file).rows if row["step"] <= step]
    if file.is_file():
        replace_rows(file, rows)
    return rows


def _read_excluded(settled: Path) -> dict[str, str]:
    try:
        reasons = json.loads(settled.read_text())
    except ValueError:
        reasons = None
    if not isinstance(reasons, dict):
        raise RunFolderError(
            f"{settled}: the record of the excluded samples is damaged",
            allowed="a JSON object, video -> reason",
            fix="restore it; if the run has not saved a checkpoint yet, remove it",
        )
    return reasons
