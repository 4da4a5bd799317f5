"""The nearest-neighbour probe: a weighted vote of the most similar training clips, as for DINO (ICCV 2021).

Shape legend: N training clips, M test clips, k neighbours, D width, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from everest_ds.probing.accuracy import FeatureSet, TopOne
from everest_ds.probing.linear_probe import Standardization

NEIGHBOURS, TEMPERATURE = 20, 0.07
_CHUNK = 1024  # test clips whose similarities are in memory at a time


def neighbour_votes(train_ND: Tensor, label_N: Tensor, test_MD: Tensor, num_classes: int) -> Tensor:
    """Return the votes (M, C) of the nearest training clips, each weighted by exp(cosine / temperature)."""
    similarity_MN = F.normalize(test_MD, dim=1) @ F.normalize(train_ND, dim=1).T
    best_Mk, index_Mk = similarity_MN.topk(min(NEIGHBOURS, len(train_ND)), dim=1)
    weight_Mk = (best_Mk / TEMPERATURE).exp()
    votes_MC = test_MD.new_zeros(len(test_MD), num_classes)
    return votes_MC.scatter_add_(1, label_N[index_Mk], weight_Mk)


def neighbour_probe(train: FeatureSet, test: FeatureSet) -> TopOne:
    """Return the accuracy on `test` of the vote of the nearest clips of `train`.

    Features are standardised first: those of a masked autoencoder share a large mean, which would make all
    cosines alike.
    """
    standardize, num_classes = Standardization.of(train.clip_ND), train.num_classes
    x_ND = standardize(train.clip_ND)
    votes = (
        neighbour_votes(x_ND, train.label_N, part, num_classes).argmax(dim=1)
        for part in standardize(test.clip_ND).split(_CHUNK)
    )
    return TopOne.of(torch.cat(list(votes)), test.label_N)
