"""RankMe, the effective rank of features, which needs no labels (Garrido et al., arXiv 2210.02885).

Shape legend: N clips, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-7


def rank_me(x_ND: Tensor) -> float:
    """Return the exponential of the entropy of the normalised singular values: from 1 to min(N, D).

    The features are not centred, as in the paper.
    """
    values = torch.linalg.svdvals(x_ND.double())
    share = values / values.sum() + _EPSILON
    return float((-share * share.log()).sum().exp())
