"""Tests of initial weights: ranks start from the weights of one process, and none holds the whole model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from everest_ds.checkpoints.tensor_file import TensorSpec, publish_tensors
from everest_ds.config import Experiment
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.models import build_model
from everest_ds.models.initial_weights import NamedTensor, draw_initial_weights, outline
from everest_ds.parallel.ds_config import resolve_ds_config
from everest_ds.parallel.engine import build_engine, full_parameter
from everest_ds.parallel.mesh import form_mesh
from everest_ds.parallel.sharded_init import InitialWeights
from everest_ds.parallel.tensor_parallel import apply_tensor_parallel
from everest_ds.parallel.world import World
from everest_ds.training.optimization import parameter_groups
from everest_ds.training.weights import initial_weights
from tests.parallel.equality import experiment
from tests.ranks import run_ranks

Case = tuple[int, int, str]  # ZeRO stage, tensor degree, precision
CASES: list[Case] = [(0, 2, "fp32"), (1, 1, "bf16"), (2, 2, "bf16"), (3, 1, "fp32"), (3, 2, "bf16")]
RANKS = 2


def dense(config: Experiment) -> nn.Module:
    torch.manual_seed(config.run.seed)
    return build_model(config)


def starts_as_one_process_would(world: World, cases: list[Case], init_from: Path) -> None:
    for stage, tensor, precision in cases:
        config = experiment("finetune", stage, RANKS // tensor, tensor, precision=precision)
        expected: dict[str, Tensor] = dict(dense(config).named_parameters())
        expected |= dict(encoder_of_another(config))
        model, ds_config = outline(config), resolve_ds_config(config, world.size)
        groups = parameter_groups(model, config.optimizer)
        with initial_weights(config, init_from) as weights:
            mesh = form_mesh(world, MeshShape.of(config, world.size))
            engine = build_engine(model, groups, config, ds_config, mesh, weights)
        for name, parameter in engine.module.named_parameters():
            assert torch.equal(full_parameter(parameter), expected[name]), (stage, tensor, precision, name)
        engine.destroy()


def encoder_of_another(config: Experiment) -> Iterator[NamedTensor]:
    """Yield encoder weights that differ from those of the seed."""
    for name, parameter in dense(config).named_parameters():
        if name.startswith("encoder."):
            yield name, torch.sin(parameter.detach() + 1)


def test_every_rank_starts_from_its_share_of_the_dense_weights(tmp_path: Path) -> None:
    """All float32 weights are bit-identical to those of one process, masters of bfloat16 weights included."""
    encoder = dict(encoder_of_another(experiment("finetune", 0, 1)))
    specs = {name: TensorSpec(torch.float32, tuple(tensor.shape)) for name, tensor in encoder.items()}
    publish_tensors(tmp_path / "encoder.safetensors", specs, iter(encoder.values()), {})
    run_ranks(starts_as_one_process_would, RANKS, CASES, tmp_path / "encoder.safetensors")


def live_bytes() -> int:
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def watched(weights: InitialWeights, seen: list[int]) -> Iterator[NamedTensor]:
    for item in weights():
        seen.append(live_bytes())
        yield item


def most_while_filled(world: World, tensor: int) -> tuple[int, int, int]:
    """Return the peak bytes during `fill`, the bytes of the rank's share, and those of the largest tensor."""
    from everest_ds.parallel.sharded_init import fill

    config = experiment("pretrain", 3, RANKS // tensor, tensor)
    mesh, model = form_mesh(world, MeshShape.over(world.size, tensor)), outline(config)
    if tensor > 1:
        apply_tensor_parallel(model, mesh)
    others, seen = live_bytes(), list[int]()
    ds_config = resolve_ds_config(config, world.size)
    weights: InitialWeights = partial(watched, lambda: draw_initial_weights(config), seen)
    fill(model, weights, "fp32", ds_config, mesh)
    share = live_bytes() - others
    return max(seen) - others, share, max(tensor.nbytes for _, tensor in draw_initial_weights(config))


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_rank_holds_its_share_and_one_module_at_most(tensor: int) -> None:
    for most, share, largest in run_ranks(most_while_filled, RANKS, tensor):
        assert share < 0.7 * sum(p.nbytes for p in build_model(experiment("pretrain", 3, 1)).parameters())
        assert most <= share + 1.1 * largest  # the margin covers the bias of the same module
