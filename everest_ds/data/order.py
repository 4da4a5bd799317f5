"""Which samples come when: a pure function of (seed, epoch), so that any step can be replayed on any rank.

A training step takes the next `global_batch_size` samples of the epoch's order; the last, incomplete batch
of an epoch is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from everest_ds.config import BatchPlan
from everest_ds.errors import DataError


class Visit(NamedTuple):
    """One look at one sample."""

    epoch: int
    sample: int  # its place in the manifest


def sample_key(seed: int, epoch: int, index: int) -> int:
    """The 63-bit random key of a visit: everything random about it follows from this number."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def steps_per_epoch(num_samples: int, plan: BatchPlan) -> int:
    """Optimiser steps that an epoch has samples for.

    Raises:
        DataError: if the data set is smaller than one global batch.
    """
    steps = num_samples // plan.global_batch_size
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
    """The micro-batches of one rank from `start_step` up to `stop_step`, across epochs."""
    per_epoch = steps_per_epoch(num_samples, plan)
    for step in range(start_step, stop_step):
        epoch, offset = divmod(step, per_epoch)
        first = offset * plan.global_batch_size
        batch = epoch_order(seed, epoch, num_samples)[first : first + plan.global_batch_size]
        # (accumulation, rank, micro-batch): each accumulated micro-step is one contiguous piece.
        shares = batch.reshape(plan.grad_accum_steps, plan.data_parallel_degree, plan.micro_batch_size)
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
