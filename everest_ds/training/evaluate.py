"""Evaluation of a classifier over all views of all samples, with the same result on any number of ranks.

A sample with an unreadable view is left out of every figure and reported by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import nn

from everest_ds.config import Experiment
from everest_ds.data.clips import MISSING, ClipBatch, EvaluationClips, evaluation_views
from everest_ds.data.reading import Failure
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError
from everest_ds.log import logger
from everest_ds.parallel.mesh import Mesh
from everest_ds.parallel.world import World


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a classifier for every readable sample.

    Attributes:
        probabilities: float32 (samples, classes), softmax averaged over the views.
        labels: int64 (samples,).
        missing: index of each unreadable sample -> reason.
    """

    probabilities: NDArray[np.float32]
    labels: NDArray[np.int64]
    missing: dict[int, str] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The mean negative log-likelihood of the averaged probabilities."""
        true = self.probabilities[np.arange(len(self.labels)), self.labels]
        return float(-np.log(np.maximum(true, 1e-12)).mean())

    def top(self, k: int) -> float:
        """Return the percentage of samples whose label is among the k most probable classes."""
        best = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]
        return float(100 * (best == self.labels[:, None]).any(axis=1).mean())

    def confusion(self) -> NDArray[np.int64]:
        """Return the confusion matrix of counts (true class, predicted class)."""
        classes = self.probabilities.shape[1]
        pairs = self.labels * classes + self.probabilities.argmax(axis=1)
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


@torch.no_grad()
def evaluate_views(
    model: nn.Module,
    samples: Sequence[Sample],
    config: Experiment,
    mesh: Mesh,
    segments: int,
    crops: int,
    show_progress: bool = False,
) -> Evaluation:
    """Evaluate `model` (an engine or a bare module) on all ranks together.

    Args:
        model: an engine or a bare module; its training mode is restored afterwards.
        samples: labelled samples.
        config: the run config.
        mesh: how the ranks share the model; all ranks of a tensor group read the same views.
        segments: temporal views per sample.
        crops: spatial views per temporal view.
        show_progress: show a progress display on rank 0.

    Raises:
        DataError: if none of the samples can be read.
    """
    world = mesh.world
    was_training = model.training
    model.eval()
    clips = EvaluationClips(samples, config, segments, crops)
    on_gpu, failures = world.device.type == "cuda", list[Failure]()
    loader = evaluation_views(
        clips, config.batch.micro_batch_size, mesh.data_rank, mesh.data_degree, on_gpu, failures.append
    )
    mine = dict(_predict(model, loader, world, show_progress and world.is_main))
    model.train(was_training)
    missing = {f.sample: f.reason for part in world.gather(failures) for f in part}
    by_view = {item: p for part in world.gather(mine) for item, p in part.items()}
    clips.check_complete(by_view, missing)
    return _average(by_view, samples, segments * crops, missing)


def _average(
    by_view: dict[int, NDArray[np.float32]], samples: Sequence[Sample], views: int, missing: dict[int, str]
) -> Evaluation:
    present = [index for index in range(len(samples)) if index not in missing]
    for index, reason in sorted(missing.items()):
        logger.warning("missing from the evaluation: %s: %s", samples[index].name, reason)
    if not present:
        name, reason = samples[0].name, missing[0]
        raise DataError("none of the evaluation videos can be read", given=f"{name}: {reason}")
    means = [np.mean([by_view[index * views + view] for view in range(views)], axis=0) for index in present]
    labels = np.array([samples[index].label for index in present])
    return Evaluation(np.stack(means), labels, dict(sorted(missing.items())))


def _predict(
    model: nn.Module, loader: Iterator[ClipBatch], world: World, show: bool
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    batches = _together(loader, world)
    for batch in track(batches, "evaluating", total=None, disable=not show, transient=True):
        here = batch.to(world.device)
        probabilities = model(here.clip, here.key).float().softmax(dim=1).cpu().numpy()
        pairs = zip(batch.item.tolist(), probabilities, strict=True)
        yield from (pair for pair in pairs if pair[0] != MISSING)


def _together(loader: Iterator[ClipBatch], world: World) -> Iterator[ClipBatch]:
    """Yield this rank's batches; an error of one rank's loader is raised on all ranks.

    All ranks have the same number of batches.
    """
    while (batch := world.together(lambda: next(loader, None))) is not None:
        yield batch
