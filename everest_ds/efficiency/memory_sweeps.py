"""Predicted memory over batch sizes, for the plots of the efficiency report."""

from __future__ import annotations

from collections.abc import Sequence

from everest_ds.config.schema import Experiment
from everest_ds.costs.memory import MemoryPrediction, predict_memory
from everest_ds.efficiency.systems import SYSTEMS, OwnModel

NUM_RANKS = 8  # one node, as in the published tables
METHODS = ("VideoMAE", "EVEREST")


def trained_configs(method: str, backbone: str) -> dict[str, Experiment]:
    """Return this project's config of a method for each training phase.

    The configs use bf16, ZeRO-2 and fused attention, without recomputation.
    """
    system = SYSTEMS[method, backbone]
    phases = {"pre-training": system.pretrain, "fine-tuning": system.finetune}
    return {phase: model.config for phase, model in phases.items() if isinstance(model, OwnModel)}


def memory_by_batch(config: Experiment, batch_sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return (clips per rank, predicted peak bytes per rank) for each micro-batch size."""
    return [(size, memory_at(config, size).peak_bytes) for size in batch_sizes]


def memory_at(config: Experiment, micro_batch_size: int) -> MemoryPrediction:
    """Predict the memory of one of `NUM_RANKS` ranks at a micro-batch size."""
    batch = config.batch.model_copy(update={"micro_batch_size": micro_batch_size})
    return predict_memory(config.model_copy(update={"batch": batch}), num_ranks=NUM_RANKS)
