"""Size of the host memory that batches occupy between the loader's workers and their rank."""

from __future__ import annotations

from everest_ds.config.schema import Experiment

# Batches per worker: one in progress and one in the queue keep a worker busy. A longer queue would gain
# nothing and would hold more batches in shared and in pinned memory.
BATCHES_AHEAD = 2
# The batches of the current and the next step: on a CPU they stay in the shared memory that a worker filled.
_BATCHES_HELD = 2
_INDEX_BYTES = 4


def batch_bytes(config: Experiment) -> int:
    """Return the bytes of one rank's micro-batch as workers send it: uint8 clips, or their kept tubelets."""
    geometry, values = config.candidate_geometry, config.model.geometry.tubelet_values
    if config.data.sends_tokens:
        clip_bytes = config.token_counts.num_kept * (values + _INDEX_BYTES)
    else:
        clip_bytes = 3 * geometry.num_frames * geometry.image_size**2
    return config.batch.micro_batch_size * clip_bytes


def shared_memory_bytes(config: Experiment, num_ranks: int) -> int:
    """Return the peak shared memory that the loaders of `num_ranks` ranks on one node fill, in bytes.

    Pinned copies for a GPU take the same amount again, outside shared memory.
    """
    if config.data.num_workers == 0:
        return 0
    num_batches = config.data.num_workers * BATCHES_AHEAD + _BATCHES_HELD
    return num_ranks * num_batches * batch_bytes(config)
