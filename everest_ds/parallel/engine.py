"""Parallelisation of a model: tensor parallelism, compilation, recomputation and DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.config.zero_settings import zero_settings
from everest_ds.errors import ConfigError
from everest_ds.models.matmul_precision import has_tf32, set_matmul_precision
from everest_ds.parallel.compile import apply_compile
from everest_ds.parallel.deepspeed_internals import (
    check_engine,
    check_modules,
    forget_mpu,
    found_overflow,
    set_clipping,
)
from everest_ds.parallel.mesh import Mesh
from everest_ds.parallel.recompute import apply_recompute
from everest_ds.parallel.sharded_init import InitialWeights, fill, set_masters
from everest_ds.parallel.tensor_parallel import apply_tensor_parallel, merge_shards
from everest_ds.parallel.world import World


class Optimizer(Protocol):
    """The part of an optimiser that the learning-rate schedule uses."""

    param_groups: list[dict[str, Any]]


class HasOptimizer(Protocol):
    """An object with an optimiser whose learning rate can be set."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser of the model's parameters."""


class Engine(HasOptimizer, Protocol):
    """The interface through which the training loop uses an engine; DeepSpeed's engine implements it.

    Attributes:
        module: the model, whose parameters may be sharded.
        training: True in training mode, False in evaluation mode.
    """

    module: nn.Module
    training: bool

    def __call__(self, *inputs: Any) -> Any:
        """Run the forward pass of the model."""

    def train(self, mode: bool = True) -> Any:
        """Set the training mode of the model."""

    def eval(self) -> Any:
        """Set the evaluation mode of the model."""

    def backward(self, loss: Tensor) -> Any:
        """Compute the gradients of a micro-batch and add them to those of earlier micro-batches."""

    def step(self) -> Any:
        """Update the weights after the last micro-batch of a step; do nothing after the others."""

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return True if the current micro-batch is the last one of its step."""

    def get_global_grad_norm(self) -> Any:
        """Return the gradient norm of the last step before clipping; None if it is not known."""

    def destroy(self) -> None:
        """Free the memory of the engine."""


def build_engine(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    config: Experiment,
    ds_config: dict[str, Any],
    mesh: Mesh,
    weights: InitialWeights | None = None,
) -> Engine:
    """Parallelise `model` and return its DeepSpeed engine. The order of the seven steps matters.

    Args:
        model: freshly built, with the same weights on every rank; or a model on the meta device.
        groups: the optimiser's groups of the model's parameters.
        config: the run config.
        ds_config: from `resolve_ds_config`.
        mesh: the ranks of the run, from `form_mesh`.
        weights: the initial weights of a model on the meta device; None if the model has weights.
    """
    import deepspeed  # heavy

    check_modules()
    check_precision(config, mesh.world)
    set_matmul_precision(config.precision)
    # 1. Tensor parallelism replaces modules, so it comes before everything that changes modules in place.
    if mesh.degrees.tensor > 1:
        apply_tensor_parallel(model, mesh)
    # 2. Each rank fills in its share of the weights, which the tensor-parallel split has just determined.
    if weights is not None:
        fill(model, weights, config.precision, ds_config, mesh)
    # 3. The blocks are compiled before recomputation wraps them, so that it runs compiled code.
    apply_compile(model, config, mesh.world)
    # 4. Recomputation wraps modules before ZeRO-3 attaches its hooks to them.
    apply_recompute(model, config.recompute, mesh.mpu)
    # 5. The optimiser receives this rank's parameters before ZeRO replaces them by its partitions.
    optimizer = torch.optim.AdamW(
        groups,
        lr=0.0,  # set before every step by the schedule
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,  # one kernel over all parameters, on GPUs and CPUs alike
    )
    # 6. The engine casts the model to the training precision, moves it to the device and shards it over
    #    the data-parallel group.
    lean_stage = 0 if zero_settings(config).offloads_optimizer else config.parallelism.zero_stage
    forget_mpu()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=_as_deepspeed_reads_it(ds_config, lean_stage),
        mpu=mesh.mpu,
        dist_init_required=False,
    )
    _replace_updates(engine, ds_config, lean_stage)
    # 7. The optimiser's float32 weights are set last: the engine derived them from rounded weights.
    if weights is not None and config.in_half_precision:
        set_masters(engine, weights, mesh)
    return cast(Engine, engine)


def _as_deepspeed_reads_it(ds_config: dict[str, Any], lean_stage: int) -> dict[str, Any]:
    """Return `ds_config` without `grad_accum_dtype` at stages 1 and 2, where `LeanZeroOptimizer` applies it.

    With this key, DeepSpeed would choose another optimiser.
    """
    if lean_stage not in (1, 2) or "data_types" not in ds_config:
        return ds_config
    types = {key: value for key, value in ds_config["data_types"].items() if key != "grad_accum_dtype"}
    return {**ds_config, "data_types": types}


def _replace_updates(engine: Any, ds_config: dict[str, Any], lean_stage: int) -> None:
    """Replace DeepSpeed 0.19.8's per-tensor update by batched operators, which keep a GPU from idling."""
    from everest_ds.parallel.lean_update import clip_gradients, make_lean, make_norm_lean  # heavy

    check_engine(engine, lean_stage)
    if lean_stage in (1, 2):
        make_lean(engine.optimizer, ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32")
    elif lean_stage == 3:
        make_norm_lean(engine.optimizer)
    set_clipping(engine, partial(clip_gradients, engine))


def check_precision(config: Experiment, world: World) -> None:
    """Refuse a precision in which the device or DeepSpeed cannot train correctly.

    Raises:
        ConfigError: naming `precision` and the values that this device supports.
    """
    if config.precision == "fp16" and world.device.type == "cpu":
        raise ConfigError("precision: fp16 training is not possible on a CPU", allowed="fp32, bf16")
    if config.precision == "bf16" and world.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision: this GPU does not support bf16", allowed="fp32, fp16")
    if config.precision == "tf32" and not has_tf32(world.device):
        raise ConfigError(
            f"precision: {world.device} does not support TF32", allowed="fp32", fix="set precision=fp32"
        )


def gradient_norm(engine: Engine) -> float | None:
    """Return the global gradient norm of the last step before clipping; None at stage 0 without clipping."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def step_skipped(engine: Engine) -> bool:
    """Return True if the last step changed no weight because a gradient was not finite.

    Always False at stage 0, which does not check the gradients.
    """
    return found_overflow(engine)


def set_learning_rate(engine: HasOptimizer, lr: float) -> None:
    """Set the learning rate of every parameter group to `lr` times the group's `lr_scale`."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def full_parameter(parameter: Tensor) -> Tensor:
    """Gather the full float32 value of a parameter on the host, from any sharding. Call on every rank."""
    from deepspeed.utils import safe_get_full_fp32_param  # heavy

    full = safe_get_full_fp32_param(parameter)  # None at stage 0, which shards nothing
    return merge_shards(parameter, parameter if full is None else full).detach().float().cpu()
