"""The supply of clips of a run: its settings and machine as the arithmetic of `bottleneck.py` takes them."""

from __future__ import annotations

from dataclasses import replace

from everest_ds.config.schema import Experiment
from everest_ds.config.shared_memory import clip_bytes
from everest_ds.costs.bottleneck import LoadingCost, Supply
from everest_ds.costs.hardware.machine import Machine

# Videos that were not measured are assumed to be a little larger than their crops, 256 pixels high for crops
# of 224, at 4:3, with key frames close together: as `everest-ds data reencode` writes them.
_STORED_HEIGHT, _STORED_WIDTH = 256 / 224, 4 / 3 * 256 / 224


def loading_cost(config: Experiment, machine: Machine) -> LoadingCost:
    """Return the measured work of loading a clip, or else that of the machine's decoding rate.

    The latter counts the machine's fixed time per clip as cropping.
    """
    if machine.loading is not None:
        return machine.loading.cost
    clip = config.candidate_geometry
    pixels = clip.num_frames * config.data.frame_stride * clip.image_size**2 * _STORED_HEIGHT * _STORED_WIDTH
    return LoadingCost(1e3 * pixels / machine.decode_pixels_per_s, crop_ms=1e3 * machine.decode_s)


def clip_supply(
    config: Experiment, num_ranks: int, machine: Machine, model_clips_per_s: float | None
) -> Supply:
    """Return the supply of one of `num_ranks` ranks of `machine`.

    Args:
        config: config of the run.
        num_ranks: number of ranks.
        machine: one rank of the cluster.
        model_clips_per_s: clips per second that a rank trains on if it never waits; None if unknown.
    """
    supply = run_supply(
        config, machine.spare_cores, min(num_ranks, machine.ranks_per_node), model_clips_per_s
    )
    link = machine.host_link.bytes_per_s if machine.asynchronous else None
    if machine.loading is None:
        return replace(supply, copy_bytes_per_s=link)
    return replace(
        supply,
        disk_bytes_per_s=machine.loading.disk_bytes_per_s,
        copy_bytes_per_s=link and min(link, machine.loading.copy_bytes_per_s),
        basis="measured",
    )


def run_supply(
    config: Experiment, cores: float, ranks_per_node: int, model_clips_per_s: float | None
) -> Supply:
    """Return the supply that follows from a run's settings, without the rates of a disk and of copies."""
    data = config.data
    return Supply(
        workers=data.num_workers,
        cores=cores,
        clip_bytes=clip_bytes(config, packed=False),
        packed_bytes=clip_bytes(config, packed=True),
        repeats=data.repeats,
        packs=data.pack_tokens,
        ranks_per_node=ranks_per_node,
        tensor=config.parallelism.tensor,
        model_clips_per_s=model_clips_per_s,
    )
