"""The order of samples: a pure function of (seed, epoch), so that any step can be replayed on any rank.

A training step takes the next `samples_per_step` samples of the epoch's order and cuts `repeats` clips from
each. Samples at the end of the order that do not fill a step are left out: always fewer than a step needs,
and different ones in each epoch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from everest_ds.config import BatchPlan
from everest_ds.data.video_list import Sample, names_and_labels
from everest_ds.errors import DataError

FINGERPRINT = "samples_fingerprint"  # key of a checkpoint's position
_MAX_STAND_INS = 8  # if this many samples in a row cannot be read, the storage is at fault, not the videos


class Visit(NamedTuple):
    """One reading of a sample in one epoch."""

    epoch: int
    sample: int  # index in the manifest

    def drawn(self, draws: int | None) -> Visit:
        """Return the visit with the same clips in an earlier epoch, if epochs cycle through `draws` draws."""
        return self if draws is None else self._replace(epoch=self.epoch % draws)


def sample_key(seed: int, epoch: int, index: int, repeat: int = 0) -> int:
    """Return the 63-bit random key of a clip, which determines all random choices about the clip."""
    name = f"{seed}/{epoch}/{index}" + (f"/{repeat}" if repeat else "")
    return _hash([name]) >> 1


def stand_ins(seed: int, epoch: int, index: int, num_samples: int) -> Iterator[int]:
    """Yield the samples to try, one after the other, in place of sample `index` if it cannot be read.

    The replacements depend on the seed, epoch and sample only, not on other samples or on the rank, so no
    other clip of the epoch changes, and the replacement is the same on any number of ranks.
    """
    for attempt in range(min(_MAX_STAND_INS, num_samples - 1)):
        other = _hash([f"{seed}/{epoch}/{index}/stand-in {attempt}"]) % (num_samples - 1)
        yield other + (other >= index)


def fingerprint(samples: Sequence[Sample], seed: int) -> int:
    """Return a number that changes with any path, label or span, with the order of the samples or the seed.

    Paths count from the folder that all have in common, so that a data set may be moved as a whole.
    """
    common = samples[0].name
    for name, _ in names_and_labels(samples):
        if not name.startswith(common):
            common = os.path.commonprefix([common, name])
    start = common.rfind(os.sep) + 1
    parts = (f"{name[start:]} {label}" for name, label in names_and_labels(samples))
    return _hash(chain([str(seed)], parts)) >> 1


def was_saved_with(position: Mapping[str, Any], samples: Sequence[Sample], seed: int) -> bool:
    """Return whether a checkpoint's `position` belongs to these samples.

    Checkpoints of older versions have a fingerprint of the files' names alone.
    """
    if FINGERPRINT in position:
        return bool(position[FINGERPRINT] == fingerprint(samples, seed))
    if "fingerprint" not in position:
        return True
    names = (sample.path.name for sample in samples)
    return bool(position["fingerprint"] == _hash(chain([str(seed)], names)) >> 1)


def _hash(parts: Iterable[str]) -> int:
    """Return the hash of the parts, joined by null characters."""
    digest, joint = hashlib.blake2b(digest_size=8), ""
    for part in parts:
        digest.update((joint + part).encode(errors="surrogateescape"))
        joint = "\0"
    return int.from_bytes(digest.digest(), "big")


def steps_per_epoch(num_samples: int, plan: BatchPlan) -> int:
    """Return the number of whole optimiser steps in an epoch.

    Raises:
        DataError: if the data set is smaller than one global batch.
    """
    steps = num_samples // plan.samples_per_step
    if steps == 0:
        raise DataError(
            "data.train has fewer samples than one global batch",
            given=f"{num_samples} samples, {plan}",
            fix="lower batch.micro_batch_size or batch.global_batch_size, or run on fewer ranks",
        )
    return steps


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Return a uniform random permutation of the manifest for this epoch."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def training_visits(
    num_samples: int, plan: BatchPlan, seed: int, rank: int, start_step: int, stop_step: int
) -> Iterator[list[Visit]]:
    """Yield the micro-batches of one rank, as visits, from `start_step` up to but excluding `stop_step`."""
    per_epoch = steps_per_epoch(num_samples, plan)
    for step in range(start_step, stop_step):
        epoch, offset = divmod(step, per_epoch)
        first = offset * plan.samples_per_step
        batch = epoch_order(seed, epoch, num_samples)[first : first + plan.samples_per_step]
        # (accumulation, rank, micro-batch): each accumulated micro-step is one contiguous slice.
        shares = batch.reshape(plan.grad_accum_steps, plan.data_parallel_degree, -1)
        for share in shares[:, rank]:
            yield [Visit(epoch, int(index)) for index in share]


class EvaluationPlan(NamedTuple):
    """The division of an evaluation into reads of whole samples, and of each read into batches of one size.

    The plan does not depend on the number of ranks, so neither do the results.

    Attributes:
        num_samples: samples of the evaluation.
        samples_per_read: samples of which a loader's worker reads all views for one read.
        batches_per_read: batches into which the views of a read are divided.
        batch_size: views per batch.
    """

    num_samples: int
    samples_per_read: int
    batches_per_read: int
    batch_size: int

    @classmethod
    def of(cls, num_samples: int, num_views: int, max_batch_size: int) -> EvaluationPlan:
        """Plan batches of at most `max_batch_size` views: as large as reads of equal size allow.

        Args:
            num_samples: samples of the evaluation.
            num_views: views per sample.
            max_batch_size: the most views per batch; a sample with more views is divided into batches.
        """
        most = max(1, max_batch_size // num_views)
        num_reads = max(1, -(-num_samples // most))
        samples = max(1, -(-num_samples // num_reads))
        batches = -(-samples * num_views // max_batch_size)
        return cls(num_samples, samples, batches, -(-samples * num_views // batches))

    def reads(self, share: int, num_shares: int) -> list[range]:
        """Return the samples of each read of a share.

        Every share has the same number of reads, as sharded models compute together. A read without samples
        completes the last round.
        """
        first, step = share * self.samples_per_read, num_shares * self.samples_per_read
        num_rounds = -(-self.num_samples // step)
        starts = (first + index * step for index in range(num_rounds))
        return [range(start, min(start + self.samples_per_read, self.num_samples)) for start in starts]
