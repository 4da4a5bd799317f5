"""Activation checkpointing: parts of the blocks forget their activations and compute them again.

What a block keeps between forward and backward, in tensors of n tokens x D width (fused attention, no drop
path, gradients of everything):

    none       16
    gelu       12              every block's GELU is recomputed, by models/mlp.py
    attention   8              every block's attention as well, by fairscale
    mlp         8              every block's MLP, by fairscale
    blocks     (12(n-1)+1)/n   every n-th block whole, the first of each n, by fairscale; the others' GELU
    full        1              every block, by DeepSpeed; 1/t if partitioned over t tensor-parallel ranks

GELU moves memory and multiplies nothing: to recompute it is the least that saves anything, so every mode but
`none` does.

Both libraries cost the same time and memory here. fairscale's setting belongs to a module, so it serves the
parts. DeepSpeed's belongs to the process, so it serves the whole: it copies to the host beside the compute
stream, and can split what it keeps over tensor-parallel ranks.

Nothing in a block draws from a process-wide random state, so recomputation repeats it exactly. With fairscale
the states are left alone; DeepSpeed 0.19.8 saves and restores them in its autograd function itself. Parameter
names stay, for modules are changed in place. Without gradients (evaluation) nothing is recomputed.
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
    """Make the blocks of `model` recompute what `config` says, in place, instead of what was said before.

    Mode `full` configures DeepSpeed for the whole process: the last model to be given this mode decides for
    all of them where the blocks' inputs are kept.

    Args:
        mpu: the mesh's, over whose tensor groups `recompute.partition` spreads what is kept.

    Raises:
        ConfigError: `recompute.every` is more than the blocks of any stack, or mode `full` shall offload in
            a process that has not joined a world.
    """
    stacks = [module for module in model.modules() if isinstance(module, Blocks)]
    _check_every(stacks, config)
    if config.mode == "full":
        _configure_deepspeed(config, mpu)
    for stack in stacks:
        _forget_earlier(stack)
        for mlp in (module for module in stack.modules() if isinstance(module, MLP)):
            mlp.recomputes_gelu = config.mode != "none"
        for part in _parts(stack, config):
            if config.mode == "full":
                _recompute_by_deepspeed(part)
            else:
                _recompute_by_fairscale(part, config.offload_to_cpu)


def _forget_earlier(stack: Blocks) -> None:
    for module in stack.modules():
        vars(module).pop("forward", None)  # both libraries' way is an instance's own `forward`


def _parts(stack: Blocks, config: RecomputeConfig) -> list[nn.Module]:
    """The modules of a stack that are recomputed."""
    if config.mode in ("none", "gelu"):
        return []
    if config.mode in ("attention", "mlp"):
        return [getattr(block, config.mode) for block in stack]
    # The first of every n: the last block's activations are needed at once, forgetting them gains nothing.
    return list(stack)[:: config.every if config.mode == "blocks" else 1]


def _check_every(stacks: list[Blocks], config: RecomputeConfig) -> None:
    deepest = max(map(len, stacks), default=0)
    if config.mode == "blocks" and config.every > deepest:
        raise ConfigError(
            "recompute.every is more than the blocks there are",
            given=config.every,
            allowed=f"2..{deepest}",
            fix="lower it to save memory, or set recompute.mode=none",
        )


def _recompute_by_fairscale(module: nn.Module, offload_to_cpu: bool) -> None:
    from fairscale.nn import checkpoint_wrapper  # heavy
    from fairscale.nn.checkpoint import checkpoint_activations

    # fairscale 0.4.13 saves and restores random states around each module, which no block of ours draws from.
    checkpoint_activations.get_rng_state = dict
    checkpoint_activations.set_rng_state = lambda state: None
    checkpoint_wrapper(module, offload_to_cpu=offload_to_cpu)  # replaces module.forward


def _configure_deepspeed(config: RecomputeConfig, mpu: Any) -> None:
    joined, offload = dist.is_initialized(), config.offload_to_cpu
    if offload and not joined:
        raise ConfigError(
            "recompute.offload_to_cpu with recompute.mode=full: DeepSpeed 0.19.8 can be told to only in a"
            " process that has joined a world",
            fix="call join_world() first, or take another mode",
        )
    import deepspeed  # heavy

    deepspeed.checkpointing.reset()  # what a step that failed half-way left on the host
    if joined:
        deepspeed.init_distributed()  # adopts the group that exists: `configure` asks DeepSpeed for its rank
        # On a CPU, DeepSpeed 0.19.8 frees the inputs that it means to copy unless it partitions them: over
        # one rank, that is a copy.
        on_cpu = deepspeed.accelerator.get_accelerator().device_name() == "cpu"
        deepspeed.checkpointing.configure(
            mpu if config.partition else None,
            partition_activations=config.partition or (offload and on_cpu),
            checkpoint_in_cpu=offload,
        )


def _recompute_by_deepspeed(block: nn.Module) -> None:
    # A weak reference, as in fairscale: a block that holds itself is freed late, and its memory with it.
    forward = partial(_checkpointed_forward, type(block).forward, weakref.ref(block))
    block.forward = forward


def _checkpointed_forward(
    forward: Callable[..., Tensor],
    block: Callable[[], nn.Module | None],
    x_BnD: Tensor,
    scales: Scales | None = None,
) -> Tensor:
    import deepspeed  # heavy

    module = block()

    # The scales are not among its arguments: DeepSpeed would offload or split them as it does activations.
    def run(x_BnD: Tensor) -> Tensor:
        return forward(module, x_BnD, scales)

    if not torch.is_grad_enabled():
        return run(x_BnD)
    if not x_BnD.requires_grad:
        # DeepSpeed's output has gradients only if its input has: without, the block would not learn.
        x_BnD = x_BnD.detach().requires_grad_()
    return deepspeed.checkpointing.checkpoint(run, _Alias.apply(x_BnD))


class _Alias(torch.autograd.Function):
    """The same values in another tensor, for DeepSpeed empties the tensor that it offloads: not the caller's.

    A view would not do: it holds on to the tensor that it is of, and so would keep what offload shall free.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
