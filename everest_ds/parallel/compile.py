"""Compilation of transformer blocks with torch.compile; one compiled graph serves a whole stack of blocks.

A block is compiled as a function of itself, its input and its drop path scales (models/vit.py), with static
shapes and without a graph break. The block's class is replaced by a subclass whose `forward` is the compiled
function. Recomputation calls the class's `forward`, so it wraps the compiled function, and parameter names do
not change. The recompute mode decides what is compiled together:

    none, gelu, blocks, full   the block is one graph, which includes the all-reduces of tensor parallelism
    attention, mlp             attention and MLP are one graph each, because one of them is recomputed alone;
                               the residual sum and the norm between them form a third

If recomputation first runs a module without gradients, one more graph is compiled for that pass. Everything
but training runs eagerly: evaluation, whose batches have other sizes, and passes that record pictures.

The compiler decides which cheap operators, such as GELU, it repeats in the backward pass. The activations
that parallel/recompute.py lists for a block are therefore an upper bound.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from everest_ds.cache import cache_folder
from everest_ds.config import Experiment
from everest_ds.errors import ConfigError
from everest_ds.log import logger
from everest_ds.models.vit import Block, Scales, add_scaled
from everest_ds.parallel.world import World


def apply_compile(model: nn.Module, config: Experiment, world: World) -> None:
    """Compile the blocks of `model` in place if the config asks for it; call on every rank.

    Compilation happens when a block first runs in training; its duration is logged. If `model.compile` is
    null, blocks are compiled on a GPU and not on a CPU, and never with ZeRO-3.

    Args:
        model: already split by tensor parallelism, and not yet wrapped by recomputation.
        config: `model.compile`, the ZeRO stage and the recompute mode are read.
        world: the ranks and their device.

    Raises:
        ConfigError: if `model.compile` is true and the compiler does not work on one of the ranks.
    """
    asked = config.model.compile
    possible = config.parallelism.zero_stage < 3
    if not (possible and world.device.type == "cuda" if asked is None else asked):
        return
    with contextlib.suppress(RuntimeError):  # without a home folder, PyTorch's default in /tmp remains
        # Later jobs, on any node, find the compiler's results in this folder.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    try:
        world.together(lambda: _check_compiler(world.device))
    except ConfigError as error:
        if asked:
            raise
        logger.warning("the blocks run without torch.compile: %s", error)
        return
    _show_progress()
    in_parts = config.recompute.mode in ("attention", "mlp")
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        units: list[nn.Module] = [block.attention, block.mlp] if in_parts else [block]
        for unit in units:
            unit.__class__ = _compiled(type(unit))  # type: ignore[arg-type]  # classes are hashable
        if in_parts:
            block.__class__ = _BlockInParts


@cache
def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the one subclass of `kind` that runs a compiled `forward` in training."""
    eager: Callable[..., Tensor] = kind.forward
    compiled = _compile(eager)

    def forward(self: nn.Module, *args: Any) -> Tensor:
        return (compiled if self.training else eager)(self, *args)

    return type(f"Compiled{kind.__name__}", (kind,), {"forward": forward})


class _BlockInParts(Block):
    """A block whose attention and MLP are compiled separately, so that either can be recomputed alone."""

    def forward(self, x_BnD: Tensor, scales: Scales | None = None) -> Tensor:
        of_attention, of_mlp = scales or (None, None)
        attended = self.attention(self.norm1(x_BnD))
        middle = _compile(_add_and_normalize) if self.training else _add_and_normalize
        x_BnD, normalized = middle(self, x_BnD, attended, of_attention)
        return add_scaled(x_BnD, self.mlp(normalized), of_mlp)


def _add_and_normalize(
    block: Block, x_BnD: Tensor, attended_BnD: Tensor, scale_B11: Tensor | None
) -> tuple[Tensor, Tensor]:
    x_BnD = add_scaled(x_BnD, attended_BnD, scale_B11)
    return x_BnD, block.norm2(x_BnD)


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _check_compiler(device: torch.device) -> None:
    """Check that torch.compile works on `device` by compiling one operator.

    Raises:
        ConfigError: with the first line of the compiler's message; Triton or a C++ compiler may be missing.
    """
    try:
        _compile(_add_one)(torch.ones(16, device=device))
    except Exception as error:  # compilers raise many types of error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            "model.compile: torch.compile does not work on this machine",
            given=reason,
            fix="install Triton (GPU) or a C++ compiler and Python's headers, or set model.compile=false",
        ) from error


def _add_one(x: Tensor) -> Tensor:
    return x + 1


@cache
def _show_progress() -> None:
    """Log the start and the end of each compilation of this process."""
    from torch._dynamo import callback  # heavy

    started = [0.0]

    def on_start(args: Any) -> None:
        started[0] = time.perf_counter()
        backward = args.callback_trigger is callback.CallbackTrigger.LAZY_BACKWARD
        logger.info("compiling the blocks' %s pass ...", "backward" if backward else "forward")

    def on_end(_: Any) -> None:
        logger.info("compiled in %.1f s", time.perf_counter() - started[0])

    callback.on_compile_start(on_start)
    callback.on_compile_end(on_end)
