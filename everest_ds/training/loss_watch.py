"""Detection of losses and gradients that are not finite, on every rank and step, without delaying the device.

Losses stay on the device until they are checked: when a step is logged, before a checkpoint is saved (so that
weights are never saved after a NaN loss), and when DeepSpeed skipped a step. At ZeRO stages 1 to 3,
DeepSpeed skips a step on all ranks if the norm of the gradients, which it computes anyway, is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from everest_ds.config import Experiment
from everest_ds.data.video_list import Sample
from everest_ds.errors import DivergedError
from everest_ds.log import logger
from everest_ds.parallel.world import World

_FIX = (
    "lower schedule.base_lr, set optimizer.clip_grad_norm, use precision=bf16 or fp32, or allow such steps to"
    " be skipped (run.max_skipped_steps); the last checkpoint was saved before this step"
)
_NAMED = 4  # the error names this many samples at most; the rank's log names all


class _Noted(NamedTuple):
    step: int
    loss: Tensor
    items: list[int]


class _Found(NamedTuple):
    """The first loss of a rank that is not finite, and the samples of its micro-batch."""

    step: int
    rank: int
    loss: float
    items: list[int]


class LossWatch:
    """The losses of this rank's micro-batches since the last check, and the skipped steps."""

    def __init__(self, samples: Sequence[Sample], config: Experiment, world: World) -> None:
        self._samples = samples
        self._world = world
        self._allowed = config.run.max_skipped_steps
        self._scales_loss = config.precision == "fp16"
        self._noted: list[_Noted] = []
        self._skipped = range(0)  # the most recent consecutive skipped steps

    def note(self, step: int, loss: Tensor, items: Tensor) -> None:
        """Remember the loss and the samples of a micro-batch of optimiser step `step`."""
        self._noted.append(_Noted(step, loss, items.tolist()))

    def check(self) -> None:
        """Check all losses noted since the last check. Call on every rank.

        Raises:
            DivergedError: on every rank, if a loss of any rank is not finite.
        """
        found = self._look()
        if found is not None:
            raise self._error(found)

    def skipped(self, step: int) -> None:
        """Record that `step` was skipped and log its samples. Call on every rank.

        In fp16, a skipped step with finite losses does not count: gradients too large for the loss scale are
        expected there.

        Raises:
            DivergedError: on every rank, after more than `run.max_skipped_steps` skipped steps in a row.
        """
        found = self._look()
        if found is None and self._scales_loss:
            return
        first = self._skipped.start if self._skipped.stop == step else step
        self._skipped = range(first, step + 1)
        if len(self._skipped) > self._allowed:
            raise (
                self._error(found)
                if found
                else DivergedError(
                    f"a gradient is not finite at step {step}", given="finite losses on all ranks", fix=_FIX
                )
            )
        logger.warning(
            "step %d skipped: a loss or gradient is not finite (%d in a row)", step, len(self._skipped)
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
        logger.error("the loss is %f at step %d; samples of this micro-batch:", loss, step)
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
