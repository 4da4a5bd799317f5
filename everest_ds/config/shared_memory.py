"""Size of the host memory that batches occupy between the loader's workers and their rank."""

from __future__ import annotations

from everest_ds.config.schema import Experiment

# Batches per worker: one in progress and one in the queue keep a worker busy. A longer queue would gain
# nothing and would hold more batches in shared and in pinned memory.
BATCHES_AHEAD = 2
# The batches of the current and the next step: on a CPU they stay in the shared memory that a worker filled.
# A worker keeps memory for those that it had filled at one time: both for the only worker, else one.
_BATCHES_HELD = 2
_INDEX_BYTES = 4


def batch_bytes(config: Experiment) -> int:
    """Return the bytes of one rank's micro-batch as workers send it: uint8 clips, or their kept tubelets."""
    return config.batch.micro_batch_size * clip_bytes(config, config.data.sends_tokens)


def clip_bytes(config: Experiment, packed: bool) -> int:
    """Return the bytes of one clip as workers send it: whole, or `packed` as its kept tubelets."""
    if packed:
        return config.token_counts.num_kept * (config.model.geometry.tubelet_values + _INDEX_BYTES)
    geometry = config.candidate_geometry
    return 3 * geometry.num_frames * geometry.image_size**2


def shared_memory_bytes(config: Experiment, num_ranks: int) -> int:
    """Return the peak shared memory that the loaders of `num_ranks` ranks on one node fill, in bytes.

    Pinned copies for a GPU take the same amount again, outside shared memory.
    """
    return num_ranks * shared_batches(config.data.num_workers) * batch_bytes(config)


def shared_batches(num_workers: int) -> int:
    """Return the number of batches for which the workers of a rank keep memory."""
    return num_workers * BATCHES_AHEAD + max(_BATCHES_HELD, num_workers) if num_workers else 0
