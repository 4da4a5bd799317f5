"""The video files below a folder, and what lies beside them and is skipped."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".ogv", ".mpg", ".mpeg")
# Folders in which an operating system keeps its own files beside a user's.
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")

Skipped = Mapping[str, list[Path]]  # files and folders, by the reason why they are no data


class FoundVideos(NamedTuple):
    """The result of a search for videos.

    Attributes:
        videos: the files with the name of a video, in the order of their paths.
        skipped: the other files, and the folders that were not searched.
    """

    videos: list[Path]
    skipped: Skipped


def find_videos(top: Path) -> FoundVideos:
    """Search a folder for files with the name of a video, at any depth; the files are not looked at.

    Links to folders are followed, but each folder is searched only once, and one that contains `top` never.
    """
    videos: list[Path] = []
    skipped: dict[str, list[Path]] = defaultdict(list)
    for path in _walk(top, skipped):
        if is_hidden(path.name):
            skipped["hidden files"].append(path)
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            videos.append(path)
        else:
            ending = f"that end in {path.suffix}" if path.suffix else "without a suffix"
            skipped[f"files {ending}"].append(path)
    return FoundVideos(sorted(videos), skipped)


def _walk(top: Path, skipped: dict[str, list[Path]]) -> Iterator[Path]:
    """Yield the files below a folder, hidden ones too."""
    seen = {str(parent) for parent in top.resolve().parents}
    for name, subfolders, files in os.walk(top, followlinks=True):
        folder, real = Path(name), os.path.realpath(name)
        if real in seen:
            subfolders.clear()
            skipped["links to folders that are searched already"].append(folder)
            continue
        seen.add(real)
        hidden = {sub for sub in subfolders if is_hidden(sub)}
        if hidden:
            skipped["hidden folders"] += [folder / sub for sub in sorted(hidden)]
        subfolders[:] = sorted(set(subfolders) - hidden)
        yield from (folder / file for file in files)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name belongs to the operating system and not to the data."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def describe_skipped(skipped: Skipped, top: Path) -> Iterable[str]:
    """Describe what was skipped below `top`, one phrase per reason: "hidden files: 3, such as a/._1.mp4"."""
    for reason, paths in sorted(skipped.items()):
        first = min(paths)
        example = first.relative_to(top) if first.is_relative_to(top) else first
        yield f"{reason}: {len(paths)}, such as {example}"
