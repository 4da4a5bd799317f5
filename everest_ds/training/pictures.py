"""Pictures of a model in training: its input, kept tokens, attention and prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everest_ds.data.clips import Batch
from everest_ds.models.watch import Seen, Watch
from everest_ds.reports.clip_pictures import draw_clip


def watch(engine: Any, model: Any, batch: Batch) -> Seen:
    """Run a batch through the engine again and record the tensors of its first clip.

    Call on every rank, because the weights may be sharded.

    Args:
        engine: the engine that runs the batch.
        model: the engine's module, on which the recording hooks are set.
        batch: a prepared batch on the device.
    """
    # Eager, because compiled blocks would not call the hooks that record.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), Watch(model) as watched:
        output = engine(*batch.arguments)
    return watched.seen(output)


def draw_pictures(seen: Seen) -> dict[str, Tensor]:
    """Draw the pictures of the first clip, by name: uint8 (row, column, colour)."""
    arrays = [None if tensor is None else tensor[0].numpy() for tensor in seen]
    return {name: torch.from_numpy(picture) for name, picture in draw_clip(*arrays).items()}  # type: ignore[arg-type]
