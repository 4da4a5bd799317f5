"""Predicted memory over settings: what the plots of the efficiency report draw."""

from __future__ import annotations

from collections.abc import Sequence

from everest_ds.config.schema import Experiment
from everest_ds.profiling.memory import MemoryPrediction, predict_memory
from everest_ds.profiling.systems import SYSTEMS, OwnModel

NUM_RANKS = 8  # one node, as in the published tables
METHODS = ("VideoMAE", "EVEREST")


def trained_configs(method: str, backbone: str) -> dict[str, Experiment]:
    """Our training of a method in each phase: bf16, ZeRO-2, fused attention, nothing recomputed."""
    system = SYSTEMS[method, backbone]
    phases = {"pre-training": system.pretrain, "fine-tuning": system.finetune}
    return {phase: model.config for phase, model in phases.items() if isinstance(model, OwnModel)}


def memory_by_batch(config: Experiment, batch_sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(clips of a rank, predicted peak bytes of that rank) over micro-batch sizes."""
    return [(size, memory_at(config, size).peak_bytes) for size in batch_sizes]


def memory_at(config: Experiment, micro_batch_size: int) -> MemoryPrediction:
    """Predicted memory of one of `NUM_RANKS` ranks at a micro-batch size."""
    batch = config.batch.model_copy(update={"micro_batch_size": micro_batch_size})
    return predict_memory(config.model_copy(update={"batch": batch}), num_ranks=NUM_RANKS)
