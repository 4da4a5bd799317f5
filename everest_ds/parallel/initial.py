"""Filling the outline of a model: each rank takes its share of every tensor, one module's at a time.

A tensor arrives whole in float32. Of it a rank keeps its shard under tensor parallelism, in the precision of
training, and of that at ZeRO-3 its part; the rest is dropped before the next arrives. So the most that is
there while a rank is set up is its own share and one module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from everest_ds.checkpoints.reader import WEIGHT
from everest_ds.parallel.mesh import Mesh
from everest_ds.parallel.states import model_states
from everest_ds.parallel.tensor_parallel import split_of

# All parameters and buffers by name: whole, float32, on the host, equal on every rank and at every call.
InitialWeights = Callable[[], Iterable[tuple[str, Tensor]]]
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def fill(
    model: nn.Module, weights: InitialWeights, precision: str, ds_config: dict[str, Any], mesh: Mesh
) -> None:
    """Give an outline, split over the tensor group already, this rank's share of `weights`.

    Its parameters stay the same objects.

    Args:
        precision: of training; buffers stay float32.
        ds_config: whose ZeRO stage says whether data-parallel ranks share the weights.
    """
    parameters, share = dict(model.named_parameters()), _sharing(ds_config, mesh)
    for name, whole in weights():
        if name not in parameters:
            _set_buffer(model, name, whole.to(mesh.world.device))
            continue
        parameter = parameters[name]
        shard = _shard(parameter, whole, mesh).to(mesh.world.device, DTYPES[precision])
        _materialize(parameter, shard)
        share(parameter)


def set_masters(engine: Any, weights: InitialWeights, mesh: Mesh) -> None:
    """Make the float32 weights those of `weights`, which DeepSpeed takes from the rounded ones."""
    states = model_states(engine, mesh)
    held = {each.name: each for each in states.held()}
    for name, whole in weights():
        if name in held:
            mine = held[name]
            shard = _shard(mine.parameter, whole, mesh).flatten()
            states.put(mine, WEIGHT, shard[mine.start : mine.start + mine.numel])
    states.refresh()


def _shard(parameter: Tensor, whole: Tensor, mesh: Mesh) -> Tensor:
    split = split_of(parameter)
    return whole if split is None else split.take(whole, mesh.tensor_rank, mesh.tensor_degree)


def _materialize(parameter: nn.Parameter, value: Tensor) -> None:
    marks = dict(vars(parameter))  # which are swapped, too
    torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))
    vars(parameter).update(marks)


def _set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)


def _sharing(ds_config: dict[str, Any], mesh: Mesh) -> Callable[[nn.Parameter], None]:
    """What leaves of a parameter the part of this data-parallel rank; nothing below stage 3."""
    if ds_config["zero_optimization"]["stage"] < 3:
        return lambda parameter: None
    import deepspeed  # heavy

    zero = deepspeed.zero.Init(
        module=nn.Module(),  # else it would shard what is constructed from now on
        data_parallel_group=mesh.mpu.get_data_parallel_group() if mesh.mpu else None,
        config_dict_or_path=copy.deepcopy(ds_config),
        mpu=mesh.mpu,
    )
    return lambda parameter: zero._convert_to_zero_parameters([parameter])
