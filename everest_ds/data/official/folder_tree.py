"""The search of a folder for the videos of an official annotation, with a list of the missing videos."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from everest_ds.data.official.annotations import AnnotatedVideo
from everest_ds.data.official.registry import OfficialDataset
from everest_ds.data.video_files import find_videos
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError, UsageError


@dataclass(frozen=True)
class Indexed:
    """A data set as found on disk.

    Attributes:
        classes: class names, in label order.
        splits: the samples whose files exist, by split, in the annotation's order.
        missing: the names of the listed videos that have no file, by split.
    """

    classes: list[str]
    splits: dict[str, list[Sample]]
    missing: dict[str, list[str]]


def index_dataset(dataset: OfficialDataset, annotations: Path, videos: Path, fold: int = 1) -> Indexed:
    """Match the official annotation with the video files below `videos`, at any depth.

    Args:
        dataset: the data set.
        annotations: folder of its annotation files.
        videos: folder of its videos.
        fold: number of the official division into training and test, from 1.

    Raises:
        UsageError: if the data set has no such fold.
        DataError: if a folder or annotation file is missing or invalid, or no listed video exists.
    """
    if not 1 <= fold <= dataset.num_folds:
        raise UsageError(f"{dataset.title}: no such split", given=fold, allowed=f"1..{dataset.num_folds}")
    for folder in (annotations, videos):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
    listed = dataset.read(annotations, fold)
    tree = VideoTree(videos)
    samples: dict[str, list[Sample]] = {split: [] for split in listed.splits}
    missing: dict[str, list[str]] = {split: [] for split in listed.splits}
    for split, entries in listed.splits.items():
        for entry in entries:
            sample = tree.sample(entry)
            if sample is None:
                missing[split].append(entry.names[0])
            else:
                samples[split].append(sample)
    if not any(samples.values()):
        example = next((names[0] for names in missing.values() if names), "nothing")
        raise DataError(f"{videos}: none of the listed videos exists", given=f"{example} is listed")
    return Indexed(listed.classes, samples, missing)


class VideoTree:
    """An index, by name, of the video files below a folder."""

    def __init__(self, root: Path) -> None:
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in find_videos(root).videos:
            self._by_stem[path.stem].append(path)

    def sample(self, entry: AnnotatedVideo) -> Sample | None:
        """Return the sample for a listed video, or None if its file is missing."""
        for name in entry.names:
            path = self.find(name)
            if path is not None:
                return Sample(path, entry.label)
        path = self.find(entry.parent) if entry.parent else None
        return None if path is None else Sample(path, entry.label, entry.span)

    def find(self, name: str) -> Path | None:
        """Return the file called `name` (`VIDEO` or `FOLDER/VIDEO`, without suffix), or None.

        Raises:
            DataError: if several files match.
        """
        wanted = PurePosixPath(name)
        found = self._by_stem.get(wanted.name, [])
        if len(found) > 1 and wanted.parent.name:
            found = [path for path in found if path.parent.name == wanted.parent.name]
        if len(found) > 1:
            given = ", ".join(map(str, sorted(found)[:3]))
            raise DataError(f"{name}: several files for one video", given=given, fix="keep one of them")
        return found[0] if found else None
