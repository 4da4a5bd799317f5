"""Pictures of what a model in training saw, kept, attended to and predicted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everest_ds.data.clips import Batch
from everest_ds.models.watch import Seen, Watch
from everest_ds.reports.clip_pictures import draw_clip


def watch(engine: Any, model: Any, batch: Batch) -> Seen:
    """Run a batch once more and record its first clip; call on every rank, for weights may be sharded.

    Args:
        model: of the engine, for its modules.
    """
    # compiled blocks would not call the hooks that record
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), Watch(model) as watched:
        output = engine(*batch.arguments)
    return watched.seen(output)


def draw(seen: Seen) -> dict[str, Tensor]:
    """uint8 (row, column, colour) by name, of the first clip."""
    arrays = [None if tensor is None else tensor[0].numpy() for tensor in seen]
    return {name: torch.from_numpy(picture) for name, picture in draw_clip(*arrays).items()}  # type: ignore[arg-type]
