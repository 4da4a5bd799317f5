"""The weights that a command probes: finding and encoding with them, and their scores as rows and picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from everest_ds.checkpoints.names import list_checkpoints, step_of
from everest_ds.data.ledger import Problem
from everest_ds.data.video_list import Sample
from everest_ds.durable_files import replace_file
from everest_ds.errors import CheckpointError, DataError
from everest_ds.inference.open_model import open_trained
from everest_ds.inference.views import Views
from everest_ds.log import logger
from everest_ds.probing.accuracy import FeatureSet, TopOne
from everest_ds.probing.feature_cache import cached_features
from everest_ds.probing.frozen_encoder import ALL_TOKENS, GridFeatures
from everest_ds.probing.scores import NUM_PROBES, ProbeScores, score
from everest_ds.probing.splits import train_and_test
from everest_ds.reports.probe_plot import draw_probes

__all__ = [  # the whole work of the command
    "NUM_PROBES",
    "Encoded",
    "ProbedWeights",
    "Scored",
    "encode_sets",
    "find_probed",
    "open_frozen",
    "probe_folder",
    "score",
    "train_and_test",
    "write_picture",
]


class ProbedWeights(NamedTuple):
    """Weights to probe.

    Attributes:
        path: a checkpoint, a run that has only its best weights, or a file.
        step: optimiser steps before a checkpoint; None for other weights.
    """

    path: Path
    step: int | None = None

    @property
    def name(self) -> str:
        """The name in tables and pictures."""
        return self.path.name if self.step is None else f"step {self.step}"


class Scored(NamedTuple):
    """Weights and their scores."""

    weights: ProbedWeights
    scores: ProbeScores

    @property
    def accuracies(self) -> dict[str, TopOne]:
        """The accuracies by the name of their probe."""
        linear, knn, _, attentive = self.scores
        return {"linear": linear, **({} if attentive is None else {"attentive": attentive}), "kNN": knn}

    @property
    def figures(self) -> dict[str, Any]:
        """The scores as a row for programs: accuracies and the ends of their intervals, in percent."""
        row: dict[str, Any] = {"weights": self.weights.name, "step": self.weights.step}
        for probe, top1 in self.accuracies.items():
            values = zip(("top1", "low", "high"), (top1.pct, *top1.interval_pct), strict=True)
            row |= {f"{probe.lower()}_{name}": round(value, 2) for name, value in values}
        return {**row, "rankme": round(self.scores.rankme, 2), "test_clips": self.scores.linear.total}

    @property
    def shown(self) -> dict[str, Any]:
        """The scores as a row for readers: each accuracy with its interval of 95 %."""
        row: dict[str, Any] = {"weights": self.weights.name}
        for probe, top1 in self.accuracies.items():
            low, high = top1.interval_pct
            row[f"{probe}_pct"] = f"{top1.pct:.1f} ({low:.1f}-{high:.1f})"
        return {**row, "RankMe": round(self.scores.rankme, 1)}


class Encoded(NamedTuple):
    """The features of each data set, and the videos that they lack."""

    sets: list[FeatureSet]
    problems: list[Problem]


def find_probed(source: Path, latest: bool) -> list[ProbedWeights]:
    """Return the checkpoints of a run, lowest step first, or the single weights at `source`.

    Args:
        source: a run folder, a checkpoint or a file of weights.
        latest: of a run, return only the newest checkpoint.
    """
    found = [ProbedWeights(path, step_of(path)) for path in list_checkpoints(source / "checkpoints")]
    return found[-1:] if latest else found or [ProbedWeights(source)]


def probe_folder(source: Path) -> Path:
    """Return the folder in which the results for `source` lie by default: in its run, or beside its file."""
    run = source.parent.parent if source.parent.name == "checkpoints" else source
    return run / "probe" if run.is_dir() else source.with_name(f"{source.name}.probe")


def open_frozen(weights: ProbedWeights, overrides: Sequence[str], only: bool) -> GridFeatures | None:
    """Load the encoder of `weights`, which then sees all tokens unless `overrides` say otherwise.

    Args:
        weights: the weights.
        overrides: `key.path=value` settings.
        only: raise the error about weights that cannot be loaded; otherwise log it and return None.

    Raises:
        EverestError: if `load_model` fails.
    """
    try:
        return GridFeatures(open_trained(weights.path, [*ALL_TOKENS, *overrides], features=True))
    except CheckpointError as error:
        if only:
            raise
        logger.warning("left out: %s", error)
        return None


def encode_sets(
    network: GridFeatures,
    sets: Sequence[Sequence[Sample]],
    folder: Path,
    views: Views,
    on_progress: Callable[[int], None],
) -> Encoded:
    """Return the features of the samples of each data set; finished ones are read from `folder`.

    Args:
        network: the frozen encoder.
        sets: the samples of each data set.
        folder: the folder of the results.
        views: views of each video whose features are averaged.
        on_progress: called with the number of samples of all sets that are done.

    Raises:
        DataError: as `cached_features`.
    """
    features, problems, before = list[FeatureSet](), list[Problem](), 0
    for samples in sets:
        progress = partial(_shifted, on_progress, before)
        found = cached_features(network, samples, folder / "features", views, progress)
        features.append(found.features)
        problems += found.problems
        before += len(samples)
    return Encoded(features, problems)


def _shifted(on_progress: Callable[[int], None], before: int, done: int) -> None:
    on_progress(before + done)


def write_picture(folder: Path, scored: Sequence[Scored]) -> Path:
    """Draw the scores of all weights into `folder`, and return the file.

    Raises:
        DataError: if the file cannot be written.
    """
    probes = scored[0].accuracies
    lines = {
        probe: [(one.accuracies[probe].pct, *one.accuracies[probe].interval_pct) for one in scored]
        for probe in probes
    }
    steps = [one.weights.step for one in scored if one.weights.step is not None]
    names, ranks = [one.weights.name for one in scored], [one.scores.rankme for one in scored]
    file = folder / "probe.png"
    try:
        replace_file(file, draw_probes(names, steps or None, lines, ranks))
    except OSError as error:
        raise DataError(
            f"{file}: cannot be written", given=error.strerror, fix="choose another --out"
        ) from None
    return file
