"""Ego4D object-state-change classification (OSCC): clips of 8 seconds within full videos named by video_uid.

Frame numbers refer to Ego4D's canonical videos at 30 frames per second. A clip that has been cut out already,
in a file named by its unique_id, is used whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everest_ds.data.official.annotations import AnnotatedVideo, Annotations, find_file, need_file, read_json
from everest_ds.errors import DataError

_CLASSES = ["no object state change", "object state change"]
_FILES = {
    "train": ("fho_oscc-pnr_train.json",),
    "val": ("fho_oscc-pnr_val.json",),
    "test": ("fho_oscc-pnr_test_unannotated.json", "fho_oscc-pnr_test.json"),
}


def read_oscc(folder: Path, fold: int) -> Annotations:
    """Read the annotation in `folder`; the data set has one fold."""
    need_file(folder, *_FILES["train"])
    files = {split: find_file(folder, *names) for split, names in _FILES.items()}
    splits = {split: _read_clips(file) for split, file in files.items() if file is not None}
    return Annotations(_CLASSES, splits)


def _read_clips(file: Path) -> list[AnnotatedVideo]:
    content = read_json(file)
    clips = content["clips"] if isinstance(content, dict) and "clips" in content else content
    if not isinstance(clips, list):
        raise DataError(f"{file}: the file holds no list of clips", allowed='{"clips": [...]}')
    return [_clip(clip, file) for clip in clips]


def _clip(clip: dict[str, Any], file: Path) -> AnnotatedVideo:
    try:
        span = int(clip["parent_start_frame"]), int(clip["parent_end_frame"])
        own, parent = str(clip["unique_id"]), str(clip["video_uid"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: a clip is incomplete", given=f"{error} in {str(clip)[:80]}") from None
    # As in the authors' loader, every value other than `false` counts as a change.
    label = int(clip["state_change"] is not False) if "state_change" in clip else None
    return AnnotatedVideo((own,), label, parent, span)
