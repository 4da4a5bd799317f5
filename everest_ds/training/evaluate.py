"""Evaluation of a model by all ranks together: validation, the test of a run's best weights, and probes.

The result is the same on any number of ranks.

A sample with an unreadable view is left out of every figure and reported by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn

from everest_ds.checkpoints.export import find_weights, load_weights
from everest_ds.config import Experiment
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.data.clip_batches import MISSING, Batch
from everest_ds.data.clips import EvaluationClips, evaluation_views
from everest_ds.data.reading import Failure
from everest_ds.data.store.staging import read_from_stage
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError
from everest_ds.log import logger
from everest_ds.models import build_model
from everest_ds.models.feature_model import FeatureModel
from everest_ds.models.matmul_precision import set_matmul_precision
from everest_ds.models.selection.packer import evaluation_packer
from everest_ds.parallel.batch_exchange import exchange_batches
from everest_ds.parallel.engine import Engine
from everest_ds.parallel.mesh import Mesh
from everest_ds.parallel.world import World
from everest_ds.probing.accuracy import FeatureSet
from everest_ds.probing.frozen_encoder import see_all_tokens
from everest_ds.probing.scores import ProbeScores, score
from everest_ds.probing.splits import train_and_test
from everest_ds.reports.confusion import draw_confusion
from everest_ds.training.input_files import class_names
from everest_ds.training.preflight import stage_shards
from everest_ds.training.run_folder import EVALUATION_FILE, RunFolder
from everest_ds.training.samples import read_probe_samples, read_samples
from everest_ds.training.weights import copy_tensors

CONFUSION_FILE = "confusion.png"
_PROBE_BATCH = 8  # clips, whatever the micro-batch of the ranks is, so that features do not depend on it


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

    @property
    def top5(self) -> float | None:
        """Top-5 accuracy in percent; None for up to five classes, of which every answer would count."""
        return self.top(5) if self.probabilities.shape[1] > 5 else None

    def confusion(self) -> NDArray[np.int64]:
        """Return the confusion matrix of counts (true class, predicted class)."""
        classes = self.probabilities.shape[1]
        pairs = self.labels * classes + self.probabilities.argmax(axis=1)
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


class ViewOutputs(NamedTuple):
    """The outputs of a model, gathered from all ranks.

    Attributes:
        by_view: index of each view that could be read -> output.
        missing: index of each unreadable sample -> reason.
    """

    by_view: dict[int, NDArray[np.float32]]
    missing: dict[int, str]


def evaluate_views(
    model: nn.Module | Engine,
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
        mesh: how the ranks share the model; all ranks of a tensor group compute on the same views.
        segments: temporal views per sample.
        crops: spatial views per temporal view.
        show_progress: show a progress display on rank 0.

    Raises:
        DataError: if none of the samples can be read.
    """
    clips = EvaluationClips(samples, config, segments, crops, evaluation_packer(config))
    size = config.batch.micro_batch_size
    outputs = _run_views(model, lambda logits: logits.softmax(dim=1), clips, size, mesh, show_progress)
    return Evaluation(*_average(outputs, samples, segments * crops), outputs.missing)


def probe_encoder(engine: Engine, config: Experiment, mesh: Mesh) -> tuple[ProbeScores, int]:
    """Run the cheap probes on the frozen encoder of a pre-training. Call on every rank.

    All ranks encode their shares of the middle clips, and rank 0 fits the probes.

    Returns:
        The scores, and the number of videos that they lack.

    Raises:
        DataError: if none of the videos of a set can be read.
    """
    world, settings = mesh.world, see_all_tokens(config)
    encoder, sets, num_missing = FeatureModel.around(engine.module, settings), list[FeatureSet](), 0
    # Eager, because blocks that are compiled for the tokens of pre-training would be compiled again.
    with torch.compiler.set_stance("force_eager"):
        for usable in world.share(lambda: read_probe_samples(config)):
            samples = read_from_stage(usable.samples, config.data.stage)
            clips = EvaluationClips(samples, settings, segments=1, crops=1)
            outputs = _run_views(encoder, lambda features: features, clips, _PROBE_BATCH, mesh)
            features, labels = _average(outputs, samples, num_views=1)
            sets.append(FeatureSet(torch.from_numpy(features), torch.from_numpy(labels)))
            num_missing += len(usable.excluded) + len(outputs.missing)
    return world.share(lambda: score(*train_and_test(sets))), num_missing


@torch.no_grad()
def _run_views(
    model: nn.Module | Engine,
    act: Callable[[Tensor], Tensor],
    clips: EvaluationClips,
    max_batch_size: int,
    mesh: Mesh,
    show_progress: bool = False,
) -> ViewOutputs:
    """Run `model` on this rank's share of the views, and gather what `act` makes of its outputs."""
    world, failures, was_training = mesh.world, list[Failure](), model.training
    model.eval()
    loader = evaluation_views(
        clips,
        max_batch_size,
        mesh.share,
        mesh.shape.num_shares,
        world.device.type == "cuda",
        failures.append,
        mesh.turn,
        partial(exchange_batches, mesh=mesh),
    )
    own = dict(_outputs(model, act, loader, world, show_progress and world.is_main))
    model.train(was_training)
    missing = {f.sample: f.reason for part in world.gather(failures) for f in part}
    by_view = {item: p for part in world.gather(own) for item, p in part.items()}
    clips.check_complete(by_view, missing)
    return ViewOutputs(by_view, dict(sorted(missing.items())))


def run_test(config: Experiment, world: World) -> dict[str, Any]:
    """Evaluate the best weights of `run.dir` on `data.test`; call on every rank.

    Returns:
        Top-1 and (of more than five classes) top-5 accuracy in percent, one row per class, and the videos
        that these figures lack. They are also written to `evaluation.json`, next to a picture of the
        confusion matrix.

    Raises:
        CheckpointError: if the run has no weights, or weights of another architecture.
    """
    file = world.share(lambda: find_weights(config.run.dir, prefer_best=True))
    usable = world.share(lambda: read_samples(config, "test"))
    samples = stage_shards(config, "evaluate", usable.samples, world)
    names = world.share(lambda: class_names(config))
    model = build_model(config)
    tensors, _ = world.together(lambda: load_weights(file))
    copy_tensors(model, tensors, file)
    model.to(world.device)
    set_matmul_precision(config.precision)
    data = config.data
    # Every rank holds the whole model, even if training used tensor parallelism.
    mesh = Mesh(world, MeshShape.over(world.size))
    outcome = evaluate_views(
        model, samples, config, mesh, data.test_segments, data.test_crops, show_progress=True
    )
    missing = {problem.sample.name: problem.reason for problem in usable.excluded}
    missing |= {samples[index].name: reason for index, reason in outcome.missing.items()}
    result = {
        "weights": str(file),
        "top1": outcome.top(1),
        "top5": outcome.top5,
        "num_clips": len(outcome.labels),
        "num_missing": len(missing),
        "missing": missing,
        "views": f"{data.test_segments} segments x {data.test_crops} crops",
        "classes": _by_class(outcome, names),
    }
    world.share(lambda: _write(config, result, outcome, names))
    return result


def _average(
    outputs: ViewOutputs, samples: Sequence[Sample], num_views: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the outputs of the readable samples, averaged over their views, and their labels."""
    by_view, missing = outputs
    present = [index for index in range(len(samples)) if index not in missing]
    for index, reason in missing.items():
        logger.warning("missing from the evaluation: %s: %s", samples[index].name, reason)
    if not present:
        name, reason = samples[0].name, missing[0]
        raise DataError("none of the evaluation videos can be read", given=f"{name}: {reason}")
    views = range(num_views)
    means = [np.mean([by_view[index * num_views + view] for view in views], axis=0) for index in present]
    return np.stack(means), np.array([samples[index].label for index in present])


def _outputs(
    model: nn.Module | Engine,
    act: Callable[[Tensor], Tensor],
    loader: Iterator[Batch],
    world: World,
    show: bool,
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    # An error of one rank's loader is raised on all ranks, which have the same number of batches.
    batches: Iterator[Batch] = iter(lambda: world.together(lambda: next(loader, None)), None)
    for batch in track(batches, "evaluating", total=None, disable=not show, transient=True):
        here = batch.to(world.device)
        output = act(model(*here.arguments).float()).cpu().numpy()
        pairs = zip(batch.item.tolist(), output, strict=True)
        yield from (pair for pair in pairs if pair[0] != MISSING)


def _by_class(outcome: Evaluation, names: list[str]) -> list[dict[str, Any]]:
    confusion = outcome.confusion()
    rows = []
    for label, name in enumerate(names):
        clips, right = int(confusion[label].sum()), int(confusion[label, label])
        others = confusion[label].copy()
        others[label] = 0
        rows.append(
            {
                "class": name,
                "clips": clips,
                "top1": round(100 * right / clips, 2) if clips else 0.0,
                "most_often_taken_for": names[int(others.argmax())] if others.any() else "-",
            }
        )
    return rows


def _write(config: Experiment, result: dict[str, Any], outcome: Evaluation, names: list[str]) -> None:
    folder = RunFolder(config.run.dir)
    (folder.path / EVALUATION_FILE).write_text(json.dumps(result, indent=2) + "\n")
    (folder.path / CONFUSION_FILE).write_bytes(draw_confusion(outcome.confusion(), names))
