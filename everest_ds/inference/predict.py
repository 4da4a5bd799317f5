"""What a classifier sees in videos.

Shape legend: F frames, H x W pixels, T slots, h x w tokens of a slot, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from everest_ds.config import Experiment
from everest_ds.data.ledger import Problem
from everest_ds.data.manifest import Sample
from everest_ds.data.reading import Failure
from everest_ds.errors import UsageError
from everest_ds.inference.views import Views, over_views, read_clip
from everest_ds.models.classifier import Classifier
from everest_ds.models.tubelets import from_tubelets


class Sight(NamedTuple):
    """A clip as a model sees it.

    Attributes:
        clip_FHWC: uint8, the frames of the slots that it takes.
        kept_Thw: bool, the tokens that it computes on.
    """

    clip_FHWC: NDArray[np.uint8]
    kept_Thw: NDArray[np.bool_]


class Predictions(NamedTuple):
    """What a classifier said.

    Attributes:
        probabilities: float32 (classes,) of each sample that could be read, by its index.
        problems: the others.
    """

    probabilities: dict[int, NDArray[np.float32]]
    problems: list[Problem]


def predict(
    model: Any,
    samples: Sequence[Sample],
    views: Views = Views(),
    on_progress: Callable[[int], None] = lambda done: None,
) -> Predictions:
    """Class probabilities of videos, averaged over the views.

    Args:
        model: a classifier as `load_model` gives it, on the device to use.
        on_progress: told how many views are done.

    Raises:
        UsageError: it is no classifier.
    """
    config: Experiment = model.config
    if not isinstance(model, Classifier):
        raise UsageError("this model names no classes", given=type(model).__name__, fix="fine-tune it first")
    problems: list[Problem] = []

    def note(failure: Failure) -> None:
        problems.append(Problem(samples[failure.sample], failure.reason))

    softmax = partial(torch.softmax, dim=1)
    found = over_views(model, samples, config, views, note, on_progress, softmax)
    return Predictions({index: row.numpy() for index, row in found}, problems)


@torch.no_grad()
def see(model: Any, video: Path) -> Sight:
    """The middle of a video, and which of its tokens the model keeps.

    Raises:
        DataError: the video cannot be read, or is too short.
    """
    batch, geometry = read_clip(video, model.config), model.config.model.geometry
    device = next(model.parameters()).device
    embedding = model.encoder.embed()
    pixels_1NP, _, keep_1K = model.selector.kept(batch.clip.to(device), embedding, batch.key.to(device))
    kept_N = torch.zeros(geometry.num_tokens, dtype=torch.bool)
    kept_N[keep_1K[0].cpu()] = True
    clip_1FHWC = from_tubelets(pixels_1NP, geometry).cpu()
    return Sight(clip_1FHWC[0].numpy(), kept_N.view(geometry.num_slots, geometry.grid_size, -1).numpy())
