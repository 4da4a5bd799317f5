"""The work of the host in a training step: operators to launch, and Python code per parameter tensor.

Operators were counted on our model and on the real engine (profiling/launches.py) in float32, in which
attention is one operator on a CPU as on a GPU; tests/costs/test_host_work.py counts them again. The counts
leave out a few casts in half precision, the sums of tensor parallelism, and what compiled blocks save.
"""

from __future__ import annotations

from typing import NamedTuple

from everest_ds.config.mesh_shape import MeshShape
from everest_ds.config.schema import Experiment
from everest_ds.config.zero_settings import ZeroSettings
from everest_ds.costs.hardware.machine import Machine

_BLOCK = 12, 19  # operators per block, forward and backward
_DROP_PATH = 2, 2  # per block, forward and backward
_DROP_PATH_HASH = 42  # once for all blocks, forward
# Operators outside blocks and selection, forward and backward.
_OTHERS = {"pretrain": (79, 18), "finetune": (42, 20)}
_SELECTION = {"random": 29, "tube": 3, "dual": 45, "none": 0}
# `rero` by score: operators once, and per chunk of tokens that models/selection/rero.py scores at a time.
_SCORE, CHUNK_TOKENS = {"embedding": (4, 4), "sketch": (40, 4), "pixel": (3, 15)}, 2**15
_GELU_AGAIN = 1  # per block in every recompute mode but none
_AGAIN = {"none": 0, "gelu": 0, "attention": 5, "mlp": 3, "blocks": 12, "full": 12}  # per recomputing block
_TENSORS_OF_A_BLOCK, _OTHER_TENSORS = 13, {"pretrain": 10, "finetune": 6}
# Shares of `Machine.parameter_s` in forward pass, backward pass and update, by ZeRO stage, as in the
# measurements of costs/hardware/data_sheet.py.
_SHARES = {0: (0.0, 0.0, 1.0), 1: (0.0, 0.55, 0.45), 2: (0.0, 0.55, 0.45), 3: (0.53, 0.41, 0.06)}


class Launches(NamedTuple):
    """Operators (or their seconds) by phase: forward and backward per micro-batch, update per step."""

    forward: float
    backward: float
    update: float


class HostWork(NamedTuple):
    """The work of the host for one rank.

    Attributes:
        launches: operators of the model and the engine.
        tensors: parameter tensors.
        stage: ZeRO stage.
    """

    launches: Launches
    tensors: int
    stage: int

    def seconds(self, machine: Machine) -> Launches:
        """Return seconds by phase: forward and backward per micro-batch, update per step."""
        python_s = self.tensors * machine.parameter_s.get(self.stage, 0.0)
        shares = _SHARES[self.stage]
        forward, backward, update = (
            count * machine.launch_s + share * python_s
            for count, share in zip(self.launches, shares, strict=True)
        )
        return Launches(forward, backward, update + machine.step_s)


def host_work(config: Experiment, shape: MeshShape, zero: ZeroSettings) -> HostWork:
    """Count the operators and parameter tensors that the host of one rank handles for `config`."""
    forward, backward = model_launches(config)
    tensors, stage = num_tensors(config), config.parallelism.zero_stage
    engine = engine_launches(config, shape.degrees.data, zero)
    launches = Launches(forward + engine.forward, backward + engine.backward, engine.update)
    return HostWork(launches, tensors, stage)


def num_tensors(config: Experiment) -> int:
    """Return the number of parameter tensors of the model."""
    return _num_blocks(config) * _TENSORS_OF_A_BLOCK + _OTHER_TENSORS[config.task]


def num_groups(config: Experiment) -> int:
    """Return the number of optimiser groups: with and without decay, per layer under layer decay."""
    layers = config.model.shape.encoder.depth + 2 if config.optimizer.layer_decay < 1 else 1
    return 2 * layers


def model_launches(config: Experiment) -> tuple[int, int]:
    """Return the operators of the model and its loss per micro-batch, forward and backward."""
    blocks, dropping = _num_blocks(config), config.model.drop_path > 0
    (others, others_back), (block, block_back) = _OTHERS[config.task], _BLOCK
    forward = others + blocks * block + _selection_launches(config)
    backward = others_back + blocks * block_back + _recompute_launches(config)
    if dropping:
        depth, (branches, branches_back) = config.model.shape.encoder.depth, _DROP_PATH
        forward += depth * branches + _DROP_PATH_HASH
        backward += depth * branches_back
    return forward, backward


def engine_launches(config: Experiment, data_degree: int, zero: ZeroSettings) -> Launches:
    """Return the operators that DeepSpeed, as changed by parallel/, adds to those of the model.

    Each gradient is copied into a bucket, and each rank copies its own part once more. Offload to the host
    copies each gradient and computes its norm in the backward pass.
    """
    tensors, groups, alone = num_tensors(config), num_groups(config), data_degree == 1
    match config.parallelism.zero_stage:
        case 0:
            return Launches(0, tensors + 5, groups + 4)
        case 3 if zero.offloads_optimizer:
            return Launches(0, 7 * tensors + 8, (2 if alone else 3) * tensors + 45)
        case 3:
            return Launches(0, 2 * tensors + 8, (0 if alone else tensors) + 7 * groups + 28)
        case _ if zero.offloads_optimizer:
            return Launches(0, 16 * tensors + 8, 36)
        case _ if alone:
            return Launches(0, 4, 2 * groups + 9)
        case _:
            copied = (1 + 1 / data_degree) * tensors
            return Launches(0, copied + 1.5 * groups + 10, 3 * groups + 10)


def _num_blocks(config: Experiment) -> int:
    shape = config.model.shape
    return shape.encoder.depth + (shape.decoder.depth if config.task == "pretrain" else 0)


def _selection_launches(config: Experiment) -> int:
    tokens = config.tokens
    if tokens.selection != "rero":
        return _SELECTION[tokens.selection]
    all_tokens = config.batch.micro_batch_size * config.candidate_geometry.num_tokens
    once, each = _SCORE[tokens.score]
    return once + each * -(-all_tokens // CHUNK_TOKENS)


def _recompute_launches(config: Experiment) -> int:
    mode, blocks = config.recompute.mode, _num_blocks(config)
    if mode == "none":
        return 0
    shape, every = config.model.shape, config.recompute.every if mode == "blocks" else 1
    stacks = [shape.encoder, *([shape.decoder] if config.task == "pretrain" else [])]
    recomputing = sum(-(-stack.depth // every) for stack in stacks)
    return _GELU_AGAIN * blocks + _AGAIN[mode] * recomputing
