"""The scores of a frozen encoder on labelled clips: the cheap probes, and all probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from everest_ds.models.threads import one_thread
from everest_ds.probing.accuracy import FeatureSet, TopOne
from everest_ds.probing.attentive_probe import attentive_probe
from everest_ds.probing.effective_rank import rank_me
from everest_ds.probing.linear_probe import linear_probe
from everest_ds.probing.neighbours import neighbour_probe


class ProbeScores(NamedTuple):
    """The result of the probes.

    Attributes:
        linear: accuracy of the linear probe, by which encoders are ranked.
        knn: accuracy of the nearest neighbours.
        rankme: effective rank of the training set's features.
        attentive: accuracy of the attentive probe; None if only the cheap probes ran.
    """

    linear: TopOne
    knn: TopOne
    rankme: float
    attentive: TopOne | None = None


NUM_PROBES = len(ProbeScores._fields)


@torch.no_grad()
def score(
    train: FeatureSet, test: FeatureSet, on_progress: Callable[[int], None] = lambda done: None
) -> ProbeScores:
    """Fit the probes on `train` and test them on `test`; the attentive probe runs if there are cells.

    The fits use one thread, so that the scores do not depend on the number of threads, and because several
    threads are slower at matrices of this size when other processes use the cores.

    Args:
        train: features to learn from.
        test: features to test on.
        on_progress: called with the number of probes that are done, of `NUM_PROBES`.
    """
    with one_thread():
        knn = neighbour_probe(train, test)
        on_progress(1)
        rank = rank_me(train.clip_ND)
        on_progress(2)
        linear = linear_probe(train, test)
        on_progress(3)
        attentive = None if train.cell_NGD is None else attentive_probe(train, test)
        on_progress(4)
        return ProbeScores(linear, knn, rank, attentive)
