"""Whether the loss is still a number, on every rank and at every step, without waiting at every step.

Losses stay on the device until they are looked at: when a step is logged, and before anything is saved, so
that weights behind a loss of NaN are never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from everest_ds.data.manifest import Sample
from everest_ds.errors import DivergedError
from everest_ds.log import logger
from everest_ds.parallel.world import World

_NAMED = 4  # samples that the error names; the rank's log names all


class _Noted(NamedTuple):
    step: int
    loss: Tensor
    items: list[int]


class _Found(NamedTuple):
    """The first loss of a rank that is not a number, and the samples that it is of."""

    step: int
    rank: int
    loss: float
    items: list[int]


class LossWatch:
    """The losses of this rank's micro-batches since they were last looked at."""

    def __init__(self, samples: Sequence[Sample], world: World) -> None:
        self._samples = samples
        self._world = world
        self._noted: list[_Noted] = []

    def note(self, step: int, loss: Tensor, items: Tensor) -> None:
        """Remember a micro-batch of optimiser step `step`: its loss, and which samples it has."""
        self._noted.append(_Noted(step, loss, items.tolist()))

    def check(self) -> None:
        """Look at all losses noted. Call on every rank.

        Raises:
            DivergedError: on every rank, if one of them is not finite on any.
        """
        found = [each for each in self._world.gather(self._first_bad()) if each is not None]
        self._noted.clear()
        if found:
            raise self._error(min(found))

    def _first_bad(self) -> _Found | None:
        if not self._noted:
            return None
        finite = torch.stack([each.loss for each in self._noted]).isfinite().tolist()
        if all(finite):
            return None
        step, loss, items = self._noted[finite.index(False)]
        logger.error("loss %f at step %d, of the samples:", loss, step)
        for item in items:
            logger.error("  %d: %s", item, self._samples[item].path)
        return _Found(step, self._world.rank, float(loss), items)

    def _error(self, found: _Found) -> DivergedError:
        paths = [str(self._samples[item].path) for item in found.items[:_NAMED]]
        more = f" and {len(found.items) - _NAMED} more" if len(found.items) > _NAMED else ""
        return DivergedError(
            f"the loss is {found.loss} at step {found.step} on rank {found.rank}",
            given=f"samples {', '.join(paths)}{more}",
            fix="lower schedule.base_lr, set optimizer.clip_grad_norm, or use precision=bf16 or fp32;"
            " the last checkpoint is from before",
        )
