"""A data set by its path: a manifest, or the folder of a frame store, which every command takes instead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from everest_ds.config import DataConfig
from everest_ds.data.store.index import StoredSamples, is_store, open_store
from everest_ds.data.video_files import VIDEO_SUFFIXES, describe_skipped, find_videos
from everest_ds.data.video_list import Sample, SampleTable, check_labels, read_manifest
from everest_ds.errors import ConfigError, DataError
from everest_ds.log import logger


def read_data_set(source: Path, *, root: Path | None, num_classes: int | None, labelled: bool) -> SampleTable:
    """Read the samples of a manifest or of a frame store.

    Args:
        source: the manifest, or the folder of the store.
        root: as in `read_manifest`; a store does not need it.
        num_classes: as in `read_manifest`.
        labelled: as in `read_manifest`.

    Raises:
        DataError: as `read_manifest` and `open_store`.
    """
    if not is_store(source):
        return read_manifest(source, root=root, num_classes=num_classes, labelled=labelled)
    samples = open_store(source)
    check_labels(samples, source, num_classes, labelled)
    return samples


def list_samples(source: Path) -> Sequence[Sample]:
    """Return the samples of `source`: a manifest, a frame store, a video, or a folder of videos at any depth.

    Raises:
        DataError: if the file or folder does not exist, or holds no video.
    """
    if source.is_dir() and not is_store(source):
        found = find_videos(source)
        for phrase in describe_skipped(found.skipped, source):
            logger.warning("%s: skipped %s", source, phrase)
        if not found.videos:
            raise DataError(f"{source}: no videos in this folder", allowed=" ".join(VIDEO_SUFFIXES))
        return [Sample(path, None) for path in found.videos]
    if source.suffix.lower() in VIDEO_SUFFIXES:
        return [Sample(source, None)]
    return read_data_set(source, root=None, num_classes=None, labelled=False)


def check_frames(samples: Sequence[Sample], source: Path, data: DataConfig) -> None:
    """Check that a store has the frames that the clips of `data` consist of.

    Raises:
        ConfigError: if the frames of a clip are not a whole number of kept frames apart.
    """
    if not isinstance(samples, StoredSamples) or data.sampling != "stride":
        return
    every = samples.packing.every
    if data.frame_stride % every:
        raise ConfigError(
            f"data.frame_stride does not suit the frame store {source}",
            given=f"{data.frame_stride}; the store holds every {every}th frame",
            allowed=f"multiples of {every}",
            fix="change data.frame_stride, or pack the store with another --every",
        )
