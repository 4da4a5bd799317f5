"""Picture files of the tokens that a model keeps of a video, attends to and reconstructs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.image import imsave

from everest_ds.data.synthetic import write_video
from everest_ds.data.video_list import Sample
from everest_ds.errors import UsageError
from everest_ds.inference.predictions import see
from everest_ds.inference.views import read_clip
from everest_ds.models.watch import Seen, Watch
from everest_ds.output_paths import output_below
from everest_ds.reports.clip_pictures import draw_clip
from everest_ds.reports.kept_tokens import dim_discarded, draw_kept

_FPS = 8  # frames per second, slow enough for a viewer to follow one token


def draw_kept_tokens(model: Any, video: Sample | Path, file: Path) -> float:
    """Write a picture of the tokens that `model` keeps of a video, and return their share.

    Raises:
        DataError: if the video cannot be read or is too short.
        UsageError: if the file cannot be written.
    """
    sight = see(model, video)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        imsave(file, draw_kept(*sight))
    except (OSError, ValueError) as error:  # ValueError: no picture format has this suffix
        raise UsageError(f"{file}: cannot write the picture", given=str(error)) from None
    return float(sight.kept_Thw.mean())


@torch.no_grad()
def watch_video(model: Any, video: Path) -> Seen:
    """Run `model` on the middle clip of a video, and return the recorded tokens and attention.

    Raises:
        DataError: if the video cannot be read or is too short.
    """
    batch = read_clip(video, model.config).to(next(model.parameters()).device)
    with Watch(model) as watched:
        output = model(*batch.arguments)
    return watched.seen(output)


def write_pictures(seen: Seen, folder: Path, video: Path) -> list[Path]:
    """Write the pictures of `draw_clip` and a video of the kept tokens into `folder`; return the files.

    Args:
        seen: what `watch_video` recorded of `video`.
        folder: folder to write to.
        video: the video, which is not overwritten.

    Raises:
        UsageError: if a file cannot be written, or would lie outside `folder`.
    """
    arrays: list[Any] = [None if tensor is None else tensor[0].numpy() for tensor in seen]
    clip, kept = arrays[:2]
    pictures = {
        output_below(folder, Path(f"{name}.png"), {video.resolve()}): picture
        for name, picture in draw_clip(*arrays).items()
    }
    film = output_below(folder, Path("kept_tokens.mp4"), {video.resolve()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, picture in pictures.items():
            imsave(file, picture)
        write_video(film, np.concatenate([clip, dim_discarded(clip, kept)], axis=2), fps=_FPS)
    except OSError as error:
        raise UsageError(f"{folder}: cannot write the pictures", given=error.strerror or str(error)) from None
    return [*pictures, film]
