"""Activation checkpointing: blocks that forget their activations and compute them again when needed."""

from __future__ import annotations

from torch import nn

from everest_ds.config.schema import RecomputeConfig
from everest_ds.models.vit import Block


def apply_recompute(model: nn.Module, config: RecomputeConfig) -> None:
    """Wrap every transformer block in place with fairscale's `checkpoint_wrapper`.

    Nothing in a block draws from a process-wide random state, so recomputation repeats it exactly.
    """
    if config.mode == "none":
        return
    from fairscale.nn import checkpoint_wrapper  # heavy

    for module in list(model.modules()):
        if isinstance(module, Block):
            checkpoint_wrapper(module, offload_to_cpu=config.offload_to_cpu)
