"""The attentive probe: one learnt query attends over a clip's cells, then a linear layer classifies.

With a single query, the product of the query and the key matrix of a head is one vector, which is learnt
directly; a head's values are projected after they have been averaged. Both are equal to cross-attention, and
its cost no longer has a term cells x width². Before the first step, the attention is uniform.

Shape legend: B clips of a batch, N clips, G cells, D width, H heads, C classes.
"""

from __future__ import annotations

from math import cos, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.probing.accuracy import FeatureSet, TopOne
from everest_ds.probing.linear_probe import Standardization

_HEAD_WIDTH = 64
_BATCH, _STEPS_AT_LEAST, _EPOCHS_AT_LEAST = 128, 1200, 15
_LEARNING_RATE, _WEIGHT_DECAY = 5e-3, 0.05
_SEED = 0


class AttentivePool(nn.Module):
    """A classifier of the cells of clips by one query with several heads.

    As keys, cells are divided by their deviation; their mean does not matter to a softmax. As values, cells
    are standardised by the means over a clip's cells: at first, a head sees what a linear probe sees.

    Args:
        keys: mean and deviation of the cells of the training set.
        values: mean and deviation of the means over the cells of its clips.
        num_classes: number of classes.
    """

    def __init__(self, keys: Standardization, values: Standardization, num_classes: int) -> None:
        super().__init__()
        self.keys, self.values, width = keys, values, len(keys.mean_D)
        heads = max(1, width // _HEAD_WIDTH)
        self.query_HD = nn.Parameter(torch.zeros(heads, width))
        self.value_HDd = nn.Parameter(torch.randn(heads, width, width // heads) * width**-0.5)
        self.linear = nn.Linear(heads * (width // heads), num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, cell_BGD: Tensor, filled_BG: Tensor) -> Tensor:
        """Return the logits (B, C) of cells; those that are not filled are ignored."""
        scaled_HD = self.query_HD / self.keys.deviation_D * cell_BGD.shape[2] ** -0.5
        score_BGH = F.linear(cell_BGD, scaled_HD)
        weight_BGH = score_BGH.masked_fill(~filled_BG[..., None], -torch.inf).softmax(dim=1)
        mean_BHD = self.values(weight_BGH.transpose(1, 2) @ cell_BGD)
        pooled_HBd = mean_BHD.transpose(0, 1) @ self.value_HDd
        return self.linear(pooled_HBd.transpose(0, 1).flatten(1))


def attentive_probe(train: FeatureSet, test: FeatureSet) -> TopOne:
    """Return the accuracy on `test` of an attentive classifier that is fitted on `train`."""
    assert train.cell_NGD is not None and test.cell_NGD is not None
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(_SEED)
        means_ND = torch.cat([_means(*_prepared(part)) for part in train.cell_NGD.split(_BATCH)])
        keys, values = _of_cells(train.cell_NGD), Standardization.of(means_ND)
        model = AttentivePool(keys, values, train.num_classes)
        _fit(model, train.cell_NGD, train.label_N)
    with torch.no_grad():
        predicted = [model(*_prepared(part)).argmax(dim=1) for part in test.cell_NGD.split(_BATCH)]
    return TopOne.of(torch.cat(predicted), test.label_N)


def _prepared(cell_BGD: Tensor) -> tuple[Tensor, Tensor]:
    """Return cells in single precision (B, G, D), and which of them hold tokens (B, G)."""
    cell_BGD = cell_BGD.float()
    return cell_BGD, cell_BGD.any(dim=2)


def _means(cell_BGD: Tensor, filled_BG: Tensor) -> Tensor:
    """Return the mean of the filled cells of each clip (B, D); empty cells are zero."""
    return cell_BGD.sum(dim=1) / filled_BG.sum(dim=1, keepdim=True)


def _of_cells(cell_NGD: Tensor) -> Standardization:
    """Measure the cells of a training set, in parts that fit into memory."""
    count, first, second = 0, torch.zeros(()), torch.zeros(())
    for part in cell_NGD.split(_BATCH):
        cells, filled = _prepared(part)
        held = cells[filled].double()
        count, first, second = count + len(held), first + held.sum(dim=0), second + held.square().sum(dim=0)
    mean = first / count
    deviation = (second / count - mean.square()).clamp(min=0).sqrt()
    return Standardization(mean.float(), deviation.float() + 1e-6)


def _fit(model: AttentivePool, cell_NGD: Tensor, label_N: Tensor) -> None:
    """Minimise the cross-entropy with AdamW and a cosine schedule."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, fused=True
    )
    batches = -(-len(label_N) // _BATCH)
    epochs = max(_EPOCHS_AT_LEAST, -(-_STEPS_AT_LEAST // batches))
    for epoch in range(epochs):
        for number, index in enumerate(torch.randperm(len(label_N)).split(_BATCH)):
            done = (epoch + number / batches) / epochs
            optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 + cos(pi * done)) / 2
            optimizer.zero_grad()
            F.cross_entropy(model(*_prepared(cell_NGD[index])), label_N[index]).backward()
            optimizer.step()
