"""Tests of tensor parallelism: exact shards, expected sizes, refused meshes and whole runs."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.checkpoints.export import load_weights
from everest_ds.config import Experiment
from everest_ds.config.backbones import BACKBONES, TransformerShape
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.config.schema import RecomputeConfig
from everest_ds.errors import UsageError
from everest_ds.models import build_model
from everest_ds.models.vit import Blocks
from everest_ds.parallel.mesh import Mesh, form_mesh
from everest_ds.parallel.recompute import apply_recompute
from everest_ds.parallel.tensor_parallel import Split, apply_tensor_parallel, split_of
from everest_ds.parallel.world import World
from everest_ds.training.evaluate import run_test
from everest_ds.training.loop import train
from tests.parallel.equality import experiment as tiny_experiment
from tests.ranks import run_ranks
from tests.training import runs


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 3]), st.sampled_from([0, 1]), st.integers(1, 3))
def test_shards_merge_to_the_whole(degree: int, pieces: int, dim: int, width: int) -> None:
    split = Split(dim, pieces)
    shape = [5, 5]
    shape[dim] = degree * pieces * width
    whole = torch.arange(25 * degree * pieces * width)[: shape[0] * shape[1]].view(shape)
    shards = [split.take(whole, rank, degree) for rank in range(degree)]
    assert torch.equal(split.merge(shards), whole)
    assert {shard.shape[dim] for shard in shards} == {pieces * width}


def test_a_rank_holds_its_heads_of_q_k_and_v() -> None:
    heads, d = 4, 2
    qkv = torch.arange(3 * heads * d).view(3, heads, d)  # each output row holds its own index
    shard = Split(0, pieces=3).take(qkv.flatten(), rank=1, degree=2)
    assert torch.equal(shard.view(3, 2, d), qkv[:, 2:])


def mesh_over_nodes_of_two(world: World) -> str:
    """Form groups of two and then of four with two ranks per node; return the error of the latter."""
    placed = replace(world, local_rank=world.rank % 2, local_size=2)
    form_mesh(placed, MeshShape.over(4, 2))
    with pytest.raises(UsageError) as refusal:
        form_mesh(placed, MeshShape.over(4, 4))
    return str(refusal.value)


def test_tensor_groups_stay_within_a_node() -> None:
    for message in run_ranks(mesh_over_nodes_of_two, 4):
        assert "has ranks of its tensor group on another node; given: tensor=4, rank" in message


def groups_of_fairscale(world: World) -> tuple[list[int], list[int]]:
    """Return the ranks of this rank's tensor group and of its data group."""
    unit = form_mesh(world, MeshShape.over(world.size, 2)).mpu
    tensor_group, data_group = unit.get_model_parallel_group(), unit.get_data_parallel_group()
    return dist.get_process_group_ranks(tensor_group), dist.get_process_group_ranks(data_group)


def test_fairscale_joins_the_groups_of_the_shape() -> None:
    shape = MeshShape.over(4, 2)
    for rank, (tensor_group, data_group) in enumerate(run_ranks(groups_of_fairscale, 4)):
        assert rank in tensor_group and tensor_group in shape.groups("tensor")
        assert rank in data_group and data_group in shape.groups("data")


def live_tensor_bytes() -> int:
    """Return the bytes of all tensors that Python can reach, which include DeepSpeed's kept inputs."""
    gc.collect()  # frees reference cycles of earlier stacks now, rather than between two counts
    storages = [t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def kept_by_a_stack(mesh: Mesh, partition: bool) -> float:
    """Return the memory that four blocks keep for their backward pass, in tensors of n x D."""
    stack = Blocks(TransformerShape(width=64, depth=4, heads=4))
    apply_tensor_parallel(stack, mesh)
    apply_recompute(stack, RecomputeConfig(mode="full", partition=partition), mesh.mpu)
    x_BnD = torch.ones(2, 256, 64).requires_grad_()
    before = live_tensor_bytes()
    output = stack(x_BnD, torch.arange(2))
    return (live_tensor_bytes() - before - output.nbytes) / x_BnD.nbytes


def kept_whole_and_in_parts(world: World) -> list[float]:
    mesh = form_mesh(world, MeshShape.over(2, 2))
    return [kept_by_a_stack(mesh, partition) for partition in (False, True)]


def test_partitioned_recompute_keeps_half_of_each_block_on_each_of_two_ranks() -> None:
    random_states = 4 * 2 * torch.get_rng_state().nbytes / torch.ones(2, 256, 64).nbytes
    # Whole inputs: three, because the first of four is the caller's own. Halves: all four are copies.
    inputs, halves = 3, 4 / 2
    expected = pytest.approx([inputs + random_states, halves + random_states], abs=0.01)
    assert run_ranks(kept_whole_and_in_parts, 2) == [expected] * 2


def share_of_parameters(world: World) -> tuple[float, bool]:
    """Return a rank's share of the split parameters, and whether all parameters are the same objects."""
    model: Any = build_model(tiny_experiment("pretrain", 0, data_degree=1, tensor=2))
    before = list(model.parameters())
    blocks = [*model.encoder.blocks.parameters(), *model.decoder.parameters()]
    num_before = sum(p.numel() for p in blocks)
    apply_tensor_parallel(model, form_mesh(world, MeshShape.over(2, 2)))
    whole = sum(p.numel() for p in blocks if split_of(p) is None)
    num_split = sum(p.numel() for p in blocks if split_of(p) is not None)
    same = {id(p) for p in model.parameters()} == {id(p) for p in before}
    return num_split / (num_before - whole), same


def test_half_of_every_large_linear_is_held_in_the_parameters_that_were_there() -> None:
    assert BACKBONES["vit_tiny"].decoder.heads % 2 == 0
    assert run_ranks(share_of_parameters, 2) == [(0.5, True)] * 2


def train_and_test(world: World, config: Experiment) -> float:
    train(config, world)
    return run_test(config, world)["top1"]


def test_a_whole_run_trains_validates_saves_and_tests_as_without(motion_data: Path, tmp_path: Path) -> None:
    """Two ranks that share each layer, and see the same clips, train like two data-parallel ranks."""
    results = {}
    for tensor, micro in ((1, 4), (2, 8)):
        config = runs.experiment(
            motion_data,
            tmp_path / str(tensor),
            "finetune",
            parallelism={"zero_stage": 2, "tensor": tensor},
            batch={"micro_batch_size": micro, "global_batch_size": 8},
        )
        results[tensor] = run_ranks(train_and_test, 2, config)[0]
    assert results[2] == results[1]
    for key in ("loss", "grad_norm", "val_loss", "val_top1"):
        by_run = [
            [row[key] for row in runs.metrics(tmp_path / str(tensor)) if key in row] for tensor in (1, 2)
        ]
        assert by_run[1] == pytest.approx(by_run[0], rel=1e-5), key
    for file in ("best.safetensors", "checkpoints/step-00000009"):
        (dense, _), (merged, _) = (load_weights(tmp_path / str(tensor) / file) for tensor in (1, 2))
        assert dense.keys() == merged.keys()
        for name, weight in dense.items():
            assert (merged[name] - weight).norm() <= 1e-5 * weight.norm(), f"{file}: {name}"
