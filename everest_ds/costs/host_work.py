"""The work of the host in a training step: operators to launch, and Python code per parameter tensor.

Operators were counted on our model and on the real engine (profiling/launches.py) in float32, in which
attention is one operator on a CPU as on a GPU; tests/costs/test_host_work.py counts them again. The counts
leave out a few casts in half precision, the sums of tensor parallelism, and what compiled blocks save.
"""

from __future__ import annotations

from typing import NamedTuple

from everest_ds.config.mesh_shape import MeshShape
from everest_ds.config.schema import Experiment
from everest_ds.config.selections import GPU_CHUNK_TOKENS
from everest_ds.config.zero_settings import ZeroSettings
from everest_ds.costs import block
from everest_ds.costs.hardware.machine import Machine

_BLOCK, _DROP_PATH = block.launches(block.OPERATORS), block.launches(block.DROP_PATH_OPERATORS)
_AGAIN = {mode: block.launches(block.repeated(part)).forward for mode, part in block.RECOMPUTED.items()}
_DROP_PATH_HASH = 42  # operators that draw the scales of all blocks, forward
# Operators outside blocks and selection, forward and backward.
_OTHERS = {"pretrain": (80, 18), "finetune": (42, 20)}
_OTHER_TENSORS = {"pretrain": 10, "finetune": 6}  # parameter tensors outside blocks
# Shares of `Machine.parameter_s` in forward pass, backward pass and update, by ZeRO stage, as in the
# measurements of costs/hardware/data_sheet.py.
_SHARES = {0: (0.0, 0.0, 1.0), 1: (0.0, 0.55, 0.45), 2: (0.0, 0.55, 0.45), 3: (0.53, 0.41, 0.06)}


class Launches(NamedTuple):
    """Numbers of operators, or seconds, by phase: forward and backward per micro-batch, update per step."""

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
    num_blocks = sum(stack.shape.depth for stack in block.stacks(config))
    return num_blocks * len(block.WEIGHTS) + _OTHER_TENSORS[config.task]


def num_groups(config: Experiment) -> int:
    """Return the number of optimiser groups: with and without decay, per layer under layer decay."""
    layers = config.model.shape.encoder.depth + 2 if config.optimizer.layer_decay < 1 else 1
    return 2 * layers


def model_launches(config: Experiment) -> tuple[int, int]:
    """Return the operators of the model and its loss per micro-batch, forward and backward."""
    forward, backward = _OTHERS[config.task]
    forward += _selection_launches(config)
    recompute = config.recompute
    for stack in block.stacks(config):
        depth = stack.shape.depth
        forward += depth * _BLOCK.forward
        backward += depth * _BLOCK.backward + _AGAIN[recompute.mode] * block.num_recomputing(recompute, depth)
        if stack.drops:
            forward += depth * _DROP_PATH.forward + _DROP_PATH_HASH
            backward += depth * _DROP_PATH.backward
        if recompute.mode != "none":  # every block computes GELU again
            backward += depth * block.GELU.launches.forward
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


def _selection_launches(config: Experiment) -> int:
    rule, kind = config.tokens.rule, config.tokens.score_kind
    launches = rule.launches + (rule.finetune_launches if config.task == "finetune" else 0)
    if not rule.scores:
        return launches
    all_tokens = config.batch.micro_batch_size * config.candidate_geometry.num_tokens
    return launches + kind.launches + kind.chunk_launches * -(-all_tokens // GPU_CHUNK_TOKENS)
