"""Compiled blocks: torch.compile makes few kernels of a block's many, and one graph serves a whole stack.

A block is compiled as a function of itself, its input and its drop path scales (models/vit.py), with static
shapes and without a graph break. Its class is exchanged for one whose `forward` is the compiled function, so
that recomputation, which calls the class's `forward`, wraps the compiled function, and names stay:

    none, gelu, blocks, full   the block is one graph; tensor parallelism's sums are in it
    attention, mlp             attention and MLP are a graph each, for one of them is recomputed by itself;
                               so are the sum and the norm between them

A graph without gradients comes on top where recomputation first runs a module without them. Whatever is not
training runs eagerly: evaluation, with batches of other sizes, and the pictures of a run.

The compiler decides which cheap operators it repeats in the backward pass, GELU among them, so what a block
keeps is at most what parallel/recompute.py says.
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
    """Compile the blocks of `model` in place if the config says so; call on every rank.

    They are compiled when they first run in training, and the logger tells how long that takes. Left to
    itself (`model.compile` is null), a GPU compiles and a CPU does not; neither does ZeRO-3.

    Args:
        model: split by tensor parallelism already, and not yet wrapped by recomputation.

    Raises:
        ConfigError: `model.compile` is true, and the compiler does not work on one of the ranks.
    """
    asked = config.model.compile
    possible = config.parallelism.zero_stage < 3
    if not (possible and world.device.type == "cuda" if asked is None else asked):
        return
    _keep_results()
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
    """Return a subclass that runs a compiled `forward` in training; one for all modules of that class."""
    eager: Callable[..., Tensor] = kind.forward
    compiled = _compile(eager)

    def forward(self: nn.Module, *args: Any) -> Tensor:
        return (compiled if self.training else eager)(self, *args)

    return type(f"Compiled{kind.__name__}", (kind,), {"forward": forward})


class _BlockInParts(Block):
    """A block whose attention and MLP are compiled, or recomputed and compiled, by themselves."""

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


def _keep_results() -> None:
    """Let the compiler keep its results where a later job finds them, on whichever node it runs."""
    with contextlib.suppress(RuntimeError):  # without a home folder: in /tmp, as PyTorch does
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))


def _check_compiler(device: torch.device) -> None:
    """Compile one operator.

    Raises:
        ConfigError: with the compiler's own words; Triton or a C++ compiler may be missing.
    """
    try:
        _compile(_add_one)(torch.ones(16, device=device))
    except Exception as error:  # whatever the compilers of this machine raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            "model.compile: torch.compile does not work here",
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
