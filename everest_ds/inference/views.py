"""Videos through a model, view by view, as evaluation sees them.

Shape legend: B clips, F frames, H x W pixels, C outputs of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.data.clips import MISSING, ClipBatch, EvaluationClips, evaluation_views
from everest_ds.data.manifest import Sample
from everest_ds.data.reading import Failure
from everest_ds.errors import DataError


class Views(NamedTuple):
    """How often a model looks at a video: places in time, at each of them places in space."""

    segments: int = 1
    crops: int = 1

    @property
    def num_views(self) -> int:
        """All of them."""
        return self.segments * self.crops


def read_clip(video: str | Path, config: Experiment) -> ClipBatch:
    """The middle of a video as a batch of one: `clip` is uint8 (1, F, H, W, 3), `key` its random key (1,).

    Args:
        config: of the model that it is for: `load_model(...).config`.

    Raises:
        DataError: the video cannot be read, or is too short.
    """
    loaded = EvaluationClips([Sample(Path(video), None)], config, *Views())[[0]]
    if loaded.failures:
        raise DataError(f"{video}: {loaded.failures[0].reason}")
    return ClipBatch(*(tensor[None] for tensor in loaded.clips[0]))


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
    """Pairs (index of a sample, what the model says of it (C,), averaged over its views), in order.

    Args:
        on_failure: told of each sample that cannot be read; it is left out.
        on_progress: told how many views are done.
        act: on the model's outputs (B, C), before they are averaged.

    Raises:
        DataError: the loader fails, or views of a sample that could be read never came.
    """
    device = next(model.parameters()).device
    clips, found = EvaluationClips(samples, config, *views), dict[int, list[Tensor]]()
    seen, missing, num_done = set[int](), set[int](), 0

    def note(failure: Failure) -> None:
        missing.add(failure.sample)
        on_failure(failure)

    for batch in evaluation_views(clips, config.batch.micro_batch_size, 0, 1, device.type == "cuda", note):
        here = batch.to(device)
        outputs = act(model(here.clip, here.key).float()).cpu()
        for item, output in zip(batch.item.tolist(), outputs, strict=True):
            if item != MISSING:
                found.setdefault(clips.sample_of(item), []).append(output)
        seen.update(batch.item.tolist())
        num_done += len(batch.item)
        on_progress(min(num_done, len(clips)))  # the last batch may be padded
        for index in [index for index, rows in found.items() if len(rows) == views.num_views]:
            yield index, torch.stack(found.pop(index)).mean(dim=0)
    clips.check_complete(seen, missing)


def best_device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
