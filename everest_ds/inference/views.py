"""Running of a model on the evaluation views of videos.

Shape legend: B clips, F frames, H x W pixels, C outputs of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.data.clip_batches import MISSING, Batch
from everest_ds.data.clips import EvaluationClips, evaluation_views
from everest_ds.data.reading import Failure
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError
from everest_ds.models.selection.packer import evaluation_packer


class Views(NamedTuple):
    """The views of a video: a number of segments in time, each with a number of crops in space."""

    segments: int = 1
    crops: int = 1

    @property
    def num_views(self) -> int:
        """The number of views per video."""
        return self.segments * self.crops


def read_clip(video: Sample | Path | str, config: Experiment) -> Batch:
    """Read the middle clip of a video as a batch of one clip.

    Args:
        video: the video, or its path.
        config: config of the model that gets the clip: `load_model(...).config`.

    Returns:
        A batch whose `clip` is uint8 (1, F, H, W, 3) and whose `key` is the random key (1,); call the model
        with its `arguments`.

    Raises:
        DataError: if the video cannot be read or is too short.
    """
    sample = video if isinstance(video, Sample) else Sample(Path(video), None)
    loaded = EvaluationClips([sample], config, *Views(), evaluation_packer(config))[[0]]
    if loaded.failures:
        raise DataError(f"{sample.name}: {loaded.failures[0].reason}")
    clip: Batch = loaded.clips[0]
    return type(clip)(*(tensor[None] for tensor in clip))


@torch.no_grad()
def over_views(
    model: nn.Module,
    samples: Sequence[Sample],
    config: Experiment,
    views: Views,
    on_failure: Callable[[Failure], None],
    on_progress: Callable[[int], None],
    act: Callable[[Tensor], Tensor] = lambda output: output,
) -> Iterator[tuple[int, Tensor]]:
    """Yield pairs (index of a sample, output of the model (C,) averaged over its views), in order.

    Args:
        model: the model, on the device to use.
        samples: videos to run the model on.
        config: config of the model.
        views: views of each video.
        on_failure: called for each sample that cannot be read; this sample is skipped.
        on_progress: called with the number of views that are done.
        act: function applied to the model's outputs (B, C) before they are averaged.

    Raises:
        DataError: if the loader fails, or views of a readable sample are missing.
    """
    device = next(model.parameters()).device
    clips, found = (
        EvaluationClips(samples, config, *views, evaluation_packer(config)),
        dict[int, list[Tensor]](),
    )
    seen, missing, num_done = set[int](), set[int](), 0

    def note(failure: Failure) -> None:
        missing.add(failure.sample)
        on_failure(failure)

    for batch in evaluation_views(clips, config.batch.micro_batch_size, 0, 1, device.type == "cuda", note):
        here = batch.to(device)
        outputs = act(model(*here.arguments).float()).cpu()
        for item, output in zip(batch.item.tolist(), outputs, strict=True):
            if item != MISSING:
                found.setdefault(clips.sample_of(item), []).append(output)
        seen.update(batch.item.tolist())
        complete = [index for index, rows in found.items() if len(rows) == views.num_views]
        num_done += len(complete)
        on_progress((num_done + len(missing)) * views.num_views)
        for index in complete:
            yield index, torch.stack(found.pop(index)).mean(dim=0)
    clips.check_complete(seen, missing)
