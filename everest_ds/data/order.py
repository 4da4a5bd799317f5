"""Which samples come when: a pure function of (seed, epoch), so that any step can be replayed on any rank.

A training step takes the next `samples_per_step` samples of the epoch's order and cuts `repeats` clips from
each. What does not fill a last step is left out: fewer samples than a step has, other ones in each epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from everest_ds.config import BatchPlan
from everest_ds.errors import DataError

_MAX_STAND_INS = 8  # where so many in a row cannot be read, something else is wrong


class Visit(NamedTuple):
    """One look at one sample."""

    epoch: int
    sample: int  # its place in the manifest


def sample_key(seed: int, epoch: int, index: int, repeat: int = 0) -> int:
    """The 63-bit random key of a clip: everything random about it follows from this number."""
    name = f"{seed}/{epoch}/{index}" + (f"/{repeat}" if repeat else "")
    return _hash(name) >> 1


def stand_ins(seed: int, epoch: int, index: int, num_samples: int) -> Iterator[int]:
    """Which samples are tried, one after the other, where sample `index` cannot be read.

    It follows from the sample, not from what other samples did or on which rank they are: so no other clip
    of the epoch changes, and any number of ranks takes the same stand-in.
    """
    for attempt in range(min(_MAX_STAND_INS, num_samples - 1)):
        other = _hash(f"{seed}/{epoch}/{index}/stand-in {attempt}") % (num_samples - 1)
        yield other + (other >= index)


def fingerprint(names: Iterable[str], seed: int) -> int:
    """A number that changes with the samples, with their order in the manifest, or with the seed."""
    return _hash("\0".join([str(seed), *names])) >> 1


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def steps_per_epoch(num_samples: int, plan: BatchPlan) -> int:
    """Optimiser steps that an epoch has samples for.

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
    """A uniform random permutation of the manifest for this epoch."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def training_visits(
    num_samples: int, plan: BatchPlan, seed: int, rank: int, start_step: int, stop_step: int
) -> Iterator[list[Visit]]:
    """The micro-batches of one rank, in samples, from `start_step` up to `stop_step`, across epochs."""
    per_epoch = steps_per_epoch(num_samples, plan)
    for step in range(start_step, stop_step):
        epoch, offset = divmod(step, per_epoch)
        first = offset * plan.samples_per_step
        batch = epoch_order(seed, epoch, num_samples)[first : first + plan.samples_per_step]
        # (accumulation, rank, micro-batch): each accumulated micro-step is one contiguous piece.
        shares = batch.reshape(plan.grad_accum_steps, plan.data_parallel_degree, -1)
        for share in shares[:, rank]:
            yield [Visit(epoch, int(index)) for index in share]


def evaluation_batches(num_items: int, batch_size: int, rank: int, num_ranks: int) -> list[list[int]]:
    """The batches of one rank, as many as every other rank has (sharded models compute together).

    Batches are the same whatever the number of ranks, so results are too; the few that fill up the last
    round repeat the first batches.
    """
    batches = [
        list(range(first, min(first + batch_size, num_items))) for first in range(0, num_items, batch_size)
    ]
    rounds = -(-len(batches) // num_ranks)
    return [batches[(r * num_ranks + rank) % len(batches)] for r in range(rounds)]
