"""Class predictions for videos, and the tokens that a model keeps of one clip.

Shape legend: F frames, H x W pixels, T slots, h x w tokens of one slot, K kept tokens.
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
from everest_ds.data.reading import Failure
from everest_ds.data.video_list import Sample, read_class_names
from everest_ds.errors import UsageError
from everest_ds.inference.views import Views, over_views, read_clip
from everest_ds.models.classifier import Classifier
from everest_ds.models.tubelets import from_tubelets

_PLACES = ("second", "third", "fourth", "fifth")


class Sight(NamedTuple):
    """A clip and the tokens of it that a model keeps.

    Attributes:
        clip_FHWC: uint8, frames of the slots that the model uses.
        kept_Thw: bool, True for the tokens that the model computes on.
    """

    clip_FHWC: NDArray[np.uint8]
    kept_Thw: NDArray[np.bool_]


class Predictions(NamedTuple):
    """Class predictions of a classifier.

    Attributes:
        probabilities: float32 (classes,) for each readable sample, by the index of the sample.
        problems: samples that could not be read, with the reason.
    """

    probabilities: dict[int, NDArray[np.float32]]
    problems: list[Problem]


def predict_videos(
    model: Any,
    samples: Sequence[Sample],
    views: Views = Views(),
    on_progress: Callable[[int], None] = lambda done: None,
) -> Predictions:
    """Compute the class probabilities of videos, averaged over their views.

    Args:
        model: a classifier from `load_model`, on the device to use.
        samples: videos to classify.
        views: views of each video.
        on_progress: called with the number of views that are done.

    Raises:
        UsageError: if the model is not a classifier.
    """
    config: Experiment = model.config
    if not isinstance(model, Classifier):
        raise UsageError(
            "this model is not a classifier", given=type(model).__name__, fix="fine-tune it first"
        )
    problems: list[Problem] = []

    def note(failure: Failure) -> None:
        problems.append(Problem(samples[failure.sample], failure.reason))

    softmax = partial(torch.softmax, dim=1)
    found = over_views(model, samples, config, views, note, on_progress, softmax)
    return Predictions({index: row.numpy() for index, row in found}, problems)


def class_names_of(model: Any, file: Path | None = None) -> list[str]:
    """Return the class names from the file, else from the model, else names made of class numbers.

    Raises:
        DataError: if the file cannot be read.
        UsageError: if the number of names is not the model's number of classes.
    """
    count = model.config.model.num_classes or 0
    names = read_class_names(file) if file else model.class_names or [f"class {i}" for i in range(count)]
    if len(names) != count:
        raise UsageError(
            f"{file}: the number of class names is not the model's number of classes",
            given=f"{len(names)} names",
            allowed=count,
        )
    return list(names)


def best_classes(probabilities: NDArray[np.float32], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the most probable classes, at most five, as the rows of a table, the best first."""
    labels = probabilities.argsort()[::-1][: 1 + len(_PLACES)]
    return [{"class": names[i], "probability_pct": round(100 * float(probabilities[i]), 2)} for i in labels]


def prediction_row(video: str, best: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows of `best_classes` as one row of a table of videos."""
    row = {"video": video, **best[0]}
    for place, other in zip(_PLACES, best[1:], strict=False):
        row |= {place: other["class"], f"{place}_pct": other["probability_pct"]}
    return row


@torch.no_grad()
def see(model: Any, video: Sample | Path) -> Sight:
    """Return the middle clip of a video and the tokens of it that the model keeps.

    Raises:
        DataError: if the video cannot be read or is too short.
    """
    batch, geometry = read_clip(video, model.config), model.config.model.geometry
    device = next(model.parameters()).device
    clip, *choice = batch.to(device).arguments
    pixels_1NP, _, keep_1K = model.selector.kept(clip, model.encoder.embed(), *choice)
    kept_N = torch.zeros(geometry.num_tokens, dtype=torch.bool)
    kept_N[keep_1K[0].cpu()] = True
    clip_1FHWC = from_tubelets(pixels_1NP, geometry).cpu()
    return Sight(clip_1FHWC[0].numpy(), kept_N.view(geometry.num_slots, geometry.grid_size, -1).numpy())
