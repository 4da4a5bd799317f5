"""Recomputation (activation checkpointing): blocks drop activations and restore them in the backward pass.

Activations that one block keeps for its backward pass, counted in tensors of N tokens x D width (fused
attention, no drop path, gradients of all parameters):

    none       16
    gelu       12              every block's GELU is recomputed, by models/mlp.py
    attention   8              every block's GELU and attention, by fairscale
    mlp         8              every block's MLP, by fairscale
    blocks     (12(n-1)+1)/n   the first of every n blocks as a whole, by fairscale; GELU in the other blocks
    full        1              every block, by DeepSpeed; 1/t if partitioned over t tensor-parallel ranks

GELU is limited by memory traffic and has no matrix product, so recomputing it costs least; every mode except
`none` does so.

Both libraries need the same time and memory here. fairscale is configured per module, so it recomputes parts
of a block. DeepSpeed is configured per process, so it recomputes whole stacks; it copies to the host in
parallel with the compute stream, and can partition the kept inputs over tensor-parallel ranks.

Nothing in a block draws from a process-wide random state, so recomputation repeats it exactly. With fairscale
the random states are not saved; DeepSpeed 0.19.8 always saves and restores them in its autograd function.
Modules are changed in place, so parameter names do not change. Without gradients (evaluation) nothing is
recomputed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from everest_ds.config.schema import RecomputeConfig
from everest_ds.errors import ConfigError
from everest_ds.models.mlp import MLP
from everest_ds.models.vit import Blocks, Scales


def apply_recompute(model: nn.Module, config: RecomputeConfig, mpu: Any = None) -> None:
    """Apply the recompute mode of `config` to the blocks of `model` in place, replacing an earlier mode.

    Mode `full` configures DeepSpeed for the whole process: the settings of the last model that uses this mode
    apply to the block inputs of all such models.

    Args:
        model: its stacks of blocks are changed in place.
        config: the recompute mode and its options.
        mpu: the mesh's `mpu`; `recompute.partition` spreads kept block inputs over its tensor groups.

    Raises:
        ConfigError: if `recompute.every` exceeds the blocks of the deepest stack, or if mode `full` is to
            offload in a process that has not joined a world.
    """
    stacks = [module for module in model.modules() if isinstance(module, Blocks)]
    _check_every(stacks, config)
    if config.mode == "full":
        _configure_deepspeed(config, mpu)
    for stack in stacks:
        for module in stack.modules():
            vars(module).pop("forward", None)  # both libraries set `forward` on the instance
        for mlp in (module for module in stack.modules() if isinstance(module, MLP)):
            mlp.recomputes_gelu = config.mode != "none"
        for part in _parts(stack, config):
            if config.mode == "full":
                # A weak reference, as in fairscale: a strong one forms a cycle and delays freeing the part.
                part.forward = partial(_checkpointed_forward, type(part).forward, weakref.ref(part))
            else:
                _recompute_by_fairscale(part, config.offload_to_cpu)


def _parts(stack: Blocks, config: RecomputeConfig) -> list[nn.Module]:
    """Return the modules of a stack that are recomputed."""
    if config.mode in ("none", "gelu"):
        return []
    if config.mode in ("attention", "mlp"):
        return [getattr(block, config.mode) for block in stack]
    # The first of every n, not the last: the backward pass starts with the last block of the stack, so
    # dropping that block's activations would gain nothing.
    return list(stack)[:: config.every if config.mode == "blocks" else 1]


def _check_every(stacks: list[Blocks], config: RecomputeConfig) -> None:
    deepest = max(map(len, stacks), default=0)
    if config.mode == "blocks" and config.every > deepest:
        raise ConfigError(
            "recompute.every is greater than the number of blocks",
            given=config.every,
            allowed=f"2..{deepest}",
            fix="lower it to save memory, or set recompute.mode=none",
        )


def _recompute_by_fairscale(module: nn.Module, offload_to_cpu: bool) -> None:
    from fairscale.nn import checkpoint_wrapper  # heavy
    from fairscale.nn.checkpoint import checkpoint_activations

    # fairscale 0.4.13 saves and restores random states around each module; our blocks never use them.
    checkpoint_activations.get_rng_state = dict
    checkpoint_activations.set_rng_state = lambda state: None
    checkpoint_wrapper(module, offload_to_cpu=offload_to_cpu)  # replaces module.forward


def _configure_deepspeed(config: RecomputeConfig, mpu: Any) -> None:
    joined, offload = dist.is_initialized(), config.offload_to_cpu
    if offload and not joined:
        raise ConfigError(
            "recompute.offload_to_cpu with recompute.mode=full: this process has not joined a world, which"
            " DeepSpeed 0.19.8 requires",
            fix="call join_world() first, or choose another recompute.mode",
        )
    import deepspeed  # heavy

    deepspeed.checkpointing.reset()  # drops block inputs that a failed step may have left on the host
    if joined:
        deepspeed.init_distributed()  # adopts the existing group, because `configure` reads DeepSpeed's rank
        # On a CPU, DeepSpeed 0.19.8 frees the inputs that it should copy unless it also partitions them.
        # Partitioning over one rank is a plain copy, so it is switched on.
        on_cpu = deepspeed.accelerator.get_accelerator().device_name() == "cpu"
        deepspeed.checkpointing.configure(
            mpu if config.partition else None,
            partition_activations=config.partition or (offload and on_cpu),
            checkpoint_in_cpu=offload,
        )


def _checkpointed_forward(
    forward: Callable[..., Tensor],
    block: Callable[[], nn.Module | None],
    x_BnD: Tensor,
    scales: Scales | None = None,
) -> Tensor:
    import deepspeed  # heavy

    module = block()

    # The scales are captured, not passed: DeepSpeed would offload or partition them like activations.
    def run(x_BnD: Tensor) -> Tensor:
        return forward(module, x_BnD, scales)

    if not torch.is_grad_enabled():
        return run(x_BnD)
    if not x_BnD.requires_grad:
        # DeepSpeed's output requires gradients only if its input does; otherwise the block would not train.
        x_BnD = x_BnD.detach().requires_grad_()
    return deepspeed.checkpointing.checkpoint(run, _Alias.apply(x_BnD))


class _Alias(torch.autograd.Function):
    """An identity function whose output is another tensor object with the same storage.

    DeepSpeed empties the tensor that it offloads, which must not be the caller's. A view would keep a
    reference to its base, and so the memory that offloading should free.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
