"""Host memory that batches take between the loader's workers and a rank."""

from __future__ import annotations

from everest_ds.config.schema import Experiment

# Per worker: one batch that it reads and one that waits for it keep it busy. More would only be a longer
# queue, at the price of as many more batches in shared and in pinned memory.
BATCHES_AHEAD = 2
# The batch of the current step and the next one: on a CPU they stay where a worker wrote them.
_BATCHES_HELD = 2
_INDEX_BYTES = 4


def batch_bytes(config: Experiment) -> int:
    """Bytes of one rank's micro-batch as workers send it: uint8 clips, or the kept tubelets of each."""
    geometry, values = config.candidate_geometry, config.model.geometry.tubelet_values
    if config.data.pack_tokens:
        clip_bytes = config.token_counts.num_kept * (values + _INDEX_BYTES)
    else:
        clip_bytes = 3 * geometry.num_frames * geometry.image_size**2
    return config.batch.micro_batch_size * clip_bytes


def shared_memory_bytes(config: Experiment, num_ranks: int) -> int:
    """Shared memory that the loaders of `num_ranks` ranks on one node fill at most, in bytes.

    Pinning on a GPU takes as much again, outside of shared memory.
    """
    if config.data.num_workers == 0:
        return 0
    num_batches = config.data.num_workers * BATCHES_AHEAD + _BATCHES_HELD
    return num_ranks * num_batches * batch_bytes(config)
