"""Whether losses and gradients are still numbers, on every rank and at every step, without waiting for it.

Losses stay on the device until they are looked at: when a step is logged, before anything is saved, so that
weights behind a loss of NaN are never written, and when DeepSpeed left out a step. It does so at ZeRO stages
1 to 3, on all ranks alike, if the norm of the gradients is not finite; it learns that norm anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from everest_ds.config import Experiment
from everest_ds.data.manifest import Sample
from everest_ds.errors import DivergedError
from everest_ds.log import logger
from everest_ds.parallel.world import World

_FIX = (
    "lower schedule.base_lr, set optimizer.clip_grad_norm, use precision=bf16 or fp32, or allow such steps to"
    " be left out (run.max_skipped_steps); the last checkpoint is from before"
)
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
    """The losses of this rank's micro-batches since they were last looked at, and the steps left out."""

    def __init__(self, samples: Sequence[Sample], config: Experiment, world: World) -> None:
        self._samples = samples
        self._world = world
        self._allowed = config.run.max_skipped_steps
        self._scales_loss = config.precision == "fp16"
        self._noted: list[_Noted] = []
        self._skipped = range(0)  # the latest steps in a row that were left out

    def note(self, step: int, loss: Tensor, items: Tensor) -> None:
        """Remember a micro-batch of optimiser step `step`: its loss, and which samples it has."""
        self._noted.append(_Noted(step, loss, items.tolist()))

    def check(self) -> None:
        """Look at all losses noted. Call on every rank.

        Raises:
            DivergedError: on every rank, if one of them is not finite on any.
        """
        found = self._look()
        if found is not None:
            raise self._error(found)

    def skipped(self, step: int) -> None:
        """Step `step` was left out, on every rank: log the samples, and go on if that is allowed once more.

        Not counted is what fp16 is expected to do: gradients too large for its loss scale, of finite losses.

        Raises:
            DivergedError: on every rank, after more than `run.max_skipped_steps` in a row.
        """
        found = self._look()
        if found is None and self._scales_loss:
            return
        first = self._skipped.start if self._skipped.stop == step else step
        self._skipped = range(first, step + 1)
        if len(self._skipped) > self._allowed:
            raise self._error(found) if found else _no_gradient(step)
        logger.warning(
            "step %d left out: a loss or gradient is not finite (%d in a row)", step, len(self._skipped)
        )

    def _look(self) -> _Found | None:
        found = [each for each in self._world.gather(self._first_bad()) if each is not None]
        self._noted.clear()
        return min(found, default=None)

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
            fix=_FIX,
        )


def _no_gradient(step: int) -> DivergedError:
    return DivergedError(f"a gradient is not finite at step {step}", given="finite losses", fix=_FIX)
