"""One function that puts a model on the ranks: recompute, then DeepSpeed's engine with ZeRO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.errors import ConfigError
from everest_ds.parallel.recompute import apply_recompute
from everest_ds.parallel.world import World

Engine = Any  # deepspeed.DeepSpeedEngine; its module carries no types


def build_engine(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    config: Experiment,
    ds_config: dict[str, Any],
    world: World,
) -> Engine:
    """Parallelise `model` in this order, and no other.

    Args:
        model: freshly built, with the same weights on every rank.
        groups: the optimiser's parameter groups.
        ds_config: from `resolve_ds_config`.
    """
    import deepspeed  # heavy

    check_precision(config, world)
    # 1. Recompute first: ZeRO-3 hooks the modules that it finds, wrapped ones included.
    apply_recompute(model, config.recompute)
    # 2. The optimiser sees whole parameters; ZeRO replaces them by its partitions.
    optimizer = torch.optim.AdamW(
        groups,
        lr=0.0,  # set before every step by the schedule
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,  # one kernel over all parameters, on GPUs and CPUs alike
    )
    # 3. The engine casts to the training precision, moves to the device and shards.
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
    )
    return engine


def check_precision(config: Experiment, world: World) -> None:
    """Refuse what the device or DeepSpeed cannot train correctly.

    Raises:
        ConfigError: naming `precision` and what would work here.
    """
    if config.precision == "fp16" and world.device.type == "cpu":
        raise ConfigError("precision: fp16 does not train on a CPU", allowed="fp32, bf16")
    if config.precision == "bf16" and world.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision: this GPU has no bf16", allowed="fp32, fp16")


def gradient_norm(engine: Engine) -> float | None:
    """Global norm of the last step's gradients before clipping; None where DeepSpeed does not tell."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def set_learning_rate(engine: Engine, lr: float) -> None:
    """Give every parameter group `lr` times its own scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def full_parameter(parameter: Tensor) -> Tensor:
    """The float32 value of a parameter on the host, whatever its sharding. Call on every rank."""
    from deepspeed.utils import safe_get_full_fp32_param  # heavy

    full = safe_get_full_fp32_param(parameter)  # None where nothing is sharded (stage 0)
    return (parameter if full is None else full).detach().float().cpu()
