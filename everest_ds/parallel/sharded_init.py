"""Initial weights of a model built on the meta device: each rank keeps its share, one tensor at a time.

A tensor arrives whole, in float32. A rank keeps its tensor-parallel shard in the training precision (at
ZeRO-3, only its part of that shard) and drops the rest before the next tensor arrives. Peak memory during
set-up is therefore the rank's own share plus one module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from everest_ds.checkpoints.sealed_manifest import WEIGHT
from everest_ds.parallel.deepspeed_internals import shard_by
from everest_ds.parallel.mesh import Mesh
from everest_ds.parallel.tensor_parallel import split_of
from everest_ds.parallel.zero_states import states_of_engine

# Yields all parameters and buffers by name: whole, float32, on the host, equal on every rank and call.
InitialWeights = Callable[[], Iterable[tuple[str, Tensor]]]
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def fill(
    model: nn.Module, weights: InitialWeights, precision: str, ds_config: dict[str, Any], mesh: Mesh
) -> None:
    """Fill a model on the meta device with this rank's share of `weights`.

    The model's parameters stay the same objects.

    Args:
        model: on the meta device, already split over the tensor group.
        weights: the whole weights, by name.
        precision: the training precision, to which parameters are cast; buffers stay float32.
        ds_config: its ZeRO stage decides whether the weights are sharded over the data-parallel ranks.
        mesh: the ranks of the run.
    """
    parameters, share = dict(model.named_parameters()), _sharing(ds_config, mesh)
    for name, whole in weights():
        if name not in parameters:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, whole.to(mesh.world.device))
            continue
        parameter = parameters[name]
        shard = _shard(parameter, whole, mesh).to(mesh.world.device, DTYPES[precision])
        marks = dict(vars(parameter))  # swap_tensors swaps attributes too, so they are put back afterwards
        torch.utils.swap_tensors(parameter, nn.Parameter(shard, requires_grad=parameter.requires_grad))
        vars(parameter).update(marks)
        share(parameter)


def set_masters(engine: Any, weights: InitialWeights, mesh: Mesh) -> None:
    """Set the optimiser's float32 weights to `weights`; DeepSpeed derived them from rounded values."""
    states = states_of_engine(engine, mesh)
    shards = {each.name: each for each in states.shards()}
    for name, whole in weights():
        if name in shards:
            mine = shards[name]
            shard = _shard(mine.parameter, whole, mesh).flatten()
            states.put(mine, WEIGHT, shard[mine.start : mine.start + mine.numel])
    states.refresh()


def _shard(parameter: Tensor, whole: Tensor, mesh: Mesh) -> Tensor:
    split = split_of(parameter)
    return whole if split is None else split.take(whole, mesh.coordinates.tensor, mesh.degrees.tensor)


def _sharing(ds_config: dict[str, Any], mesh: Mesh) -> Callable[[nn.Parameter], None]:
    """Return a function that reduces a parameter to this data-parallel rank's part; a no-op below stage 3."""
    if ds_config["zero_optimization"]["stage"] < 3:
        return lambda parameter: None
    import deepspeed  # heavy

    zero = deepspeed.zero.Init(
        module=nn.Module(),  # without a module, Init would shard every module constructed from now on
        data_parallel_group=mesh.mpu.get_data_parallel_group() if mesh.mpu else None,
        config_dict_or_path=copy.deepcopy(ds_config),
        mpu=mesh.mpu,
    )
    return partial(shard_by, zero)
