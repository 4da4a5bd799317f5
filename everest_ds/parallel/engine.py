"""One function that puts a model on the ranks: tensor parallelism, recompute, DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.config.zero_settings import zero_settings
from everest_ds.errors import ConfigError
from everest_ds.models.precision import has_tf32, set_matmul_precision
from everest_ds.parallel.compile import apply_compile
from everest_ds.parallel.initial import InitialWeights, fill, set_masters
from everest_ds.parallel.mesh import form_mesh
from everest_ds.parallel.recompute import apply_recompute
from everest_ds.parallel.tensor_parallel import apply_tensor_parallel, merge_shards
from everest_ds.parallel.world import World

Engine = Any  # deepspeed.DeepSpeedEngine; its module carries no types


def build_engine(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    config: Experiment,
    ds_config: dict[str, Any],
    world: World,
    weights: InitialWeights | None = None,
) -> Engine:
    """Parallelise `model` in this order, and no other.

    Args:
        model: freshly built, with the same weights on every rank; or an outline, and `weights` for it.
        groups: the optimiser's groups of its parameters.
        ds_config: from `resolve_ds_config`.
    """
    import deepspeed  # heavy

    check_precision(config, world)
    set_matmul_precision(config.precision)
    mesh = form_mesh(world, config.parallelism.tensor)
    # 1. Tensor parallelism exchanges modules: what follows must meet those that will run.
    if mesh.tensor_degree > 1:
        apply_tensor_parallel(model, mesh)
    # 2. Each rank takes its share of the weights: whose shards it keeps is known now.
    if weights is not None:
        fill(model, weights, config.precision, ds_config, mesh)
    # 3. The blocks are compiled before recomputation wraps them: it then repeats compiled code.
    apply_compile(model, config, world)
    # 4. Recompute wraps modules before ZeRO-3 hooks the ones that it finds, wrapped ones included.
    apply_recompute(model, config.recompute, mesh.mpu)
    # 5. The optimiser sees this rank's parameters before ZeRO replaces them by its partitions.
    optimizer = torch.optim.AdamW(
        groups,
        lr=0.0,  # set before every step by the schedule
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,  # one kernel over all parameters, on GPUs and CPUs alike
    )
    # 6. The engine casts to the training precision, moves to the device and shards over the data group.
    lean_stage = 0 if zero_settings(config).offloads_optimizer else config.parallelism.zero_stage
    deepspeed.utils.groups.mpu = None  # the last engine's, which initialize() would not forget
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=_as_deepspeed_reads_it(ds_config, lean_stage),
        mpu=mesh.mpu,
        dist_init_required=False,
    )
    _replace_updates(engine, ds_config, lean_stage)
    # 7. The optimiser steps float32 weights, of which the engine has seen the rounded ones only.
    if weights is not None and config.in_half_precision:
        set_masters(engine, weights, mesh)
    return engine


def _as_deepspeed_reads_it(ds_config: dict[str, Any], lean_stage: int) -> dict[str, Any]:
    """Leave out the type of the sum of gradients where we sum them: it would choose another optimiser."""
    if lean_stage not in (1, 2) or "data_types" not in ds_config:
        return ds_config
    types = {key: value for key, value in ds_config["data_types"].items() if key != "grad_accum_dtype"}
    return {**ds_config, "data_types": types}


def _replace_updates(engine: Engine, ds_config: dict[str, Any], lean_stage: int) -> None:
    """Replace what DeepSpeed 0.19.8 does tensor by tensor, so that a GPU does not wait for its host."""
    from everest_ds.parallel.lean_update import clip_gradients, make_lean, make_norm_lean  # heavy

    if lean_stage in (1, 2):
        make_lean(engine.optimizer, ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32")
    elif lean_stage == 3:
        make_norm_lean(engine.optimizer)
    engine.clip_fp32_gradients = partial(clip_gradients, engine)  # called at stage 0


def check_precision(config: Experiment, world: World) -> None:
    """Refuse what the device or DeepSpeed cannot train correctly.

    Raises:
        ConfigError: naming `precision` and what would work here.
    """
    if config.precision == "fp16" and world.device.type == "cpu":
        raise ConfigError("precision: fp16 does not train on a CPU", allowed="fp32, bf16")
    if config.precision == "bf16" and world.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision: this GPU has no bf16", allowed="fp32, fp16")
    if config.precision == "tf32" and not has_tf32(world.device):
        raise ConfigError(f"precision: no TF32 on {world.device}", allowed="fp32", fix="set precision=fp32")


def gradient_norm(engine: Engine) -> float | None:
    """Global norm of the last step's gradients before clipping; None at stage 0 without clipping."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def step_skipped(engine: Engine) -> bool:
    """Whether the last step left all weights alone since a gradient was not finite; stage 0 never looks."""
    return bool(getattr(engine.optimizer, "overflow", False))


def set_learning_rate(engine: Engine, lr: float) -> None:
    """Give every parameter group `lr` times its own scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def full_parameter(parameter: Tensor) -> Tensor:
    """The float32 value of a parameter on the host, whatever its sharding: whole. Call on every rank."""
    from deepspeed.utils import safe_get_full_fp32_param  # heavy

    full = safe_get_full_fp32_param(parameter)  # None where nothing is sharded (stage 0)
    return merge_shards(parameter, parameter if full is None else full).detach().float().cpu()
