"""A ZeRO update without DeepSpeed's per-tensor work: a few kernel launches and one host synchronisation.

DeepSpeed 0.19.8 searches every gradient for infinities (13 operators per tensor), copies each to float64 for
its norm, flattens them and casts them to float32. Here one `foreach` operator computes all norms. Their sum
of squares shows whether all gradients are finite and how much to clip, and is the only value that the host
reads. If one rank holds the whole model, nothing is reduced. At stage 3 only the norm is replaced.

The gradients of several bf16 micro-batches are summed in float32 at stages 1 and 2. At stage 1 DeepSpeed
would switch to another optimiser for this. That optimiser does not check for overflow, and its norm counts
once per rank the weights that every tensor-parallel rank holds whole.

The layout, the bucketed reduction and the addresses that checkpoints use remain DeepSpeed's.
tests/parallel/test_lean_update.py compares the weights with those of DeepSpeed's own update: bit-identical
without clipping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import all_gather_dp_groups, is_model_parallel_parameter
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from everest_ds.parallel.deepspeed_internals import check_type


def make_lean(optimizer: Any, sums_in_float32: bool) -> None:
    """Turn DeepSpeed's optimiser of stage 1 or 2 into a `LeanZeroOptimizer`, before the first step.

    Args:
        optimizer: DeepSpeed's optimiser of an engine without offload, with the partitions laid out.
        sums_in_float32: True to sum micro-batch gradients in float32 rather than the training precision.

    Raises:
        EverestError: if this version of DeepSpeed has another optimiser.
    """
    check_type(optimizer, DeepSpeedZeroOptimizer)
    optimizer.__class__ = LeanZeroOptimizer
    dtype = torch.float32 if sums_in_float32 else optimizer.dtype
    optimizer.gradient_accumulation_dtype = dtype
    optimizer.use_separate_grad_accum = dtype != optimizer.dtype
    optimizer.use_grad_accum_attribute = dtype != optimizer.dtype and not optimizer.partition_gradients


def make_norm_lean(optimizer: Any) -> None:
    """Make DeepSpeed's optimiser of stage 3 compute the norm of all gradients at once.

    Args:
        optimizer: DeepSpeed's optimiser of an engine without offload.

    Raises:
        EverestError: if this version of DeepSpeed has another optimiser.
    """
    check_type(optimizer, DeepSpeedZeroOptimizer_Stage3)
    optimizer.__class__ = LeanZero3Optimizer


def clip_gradients(engine: Any) -> None:
    """Clip gradients at stage 0 without a host synchronisation; keep the norm, which DeepSpeed drops."""
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    gradients, mpu = [parameter.grad for parameter in parameters], engine.mpu
    counted = _counted(gradients, parameters, mpu.get_model_parallel_rank() if mpu else 0)
    total = sum_of_squares(counted, engine.device)
    if mpu:
        dist.all_reduce(total, group=mpu.get_model_parallel_group())
    norm = total.sqrt().float()
    torch._foreach_mul_(gradients, (engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0))
    engine._global_grad_norm = norm


def sum_of_squares(tensors: list[Tensor], device: torch.device | str) -> Tensor:
    """Return the sum of squares of all elements: a float64 scalar on the device, in four kernel launches."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).double().square().sum()


class LeanZeroOptimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's optimiser of stages 1 and 2 with a batched update; `make_lean` converts an existing one."""

    # Keyed by parameter group: this rank's part of the averaged gradients, and the sums before averaging.
    averaged_gradients: dict[int, Any]
    all_grad_tensors: dict[int, Any]
    params_already_reduced: list[bool]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the weights, or leave them unchanged if a gradient is not finite (`overflow`)."""
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        scale = self.loss_scale  # the scale of these gradients, read before `_update_scale` changes it
        norm = self._scaled_norm()
        self.overflow = not math.isfinite(norm)
        self._update_scale(self.overflow)
        self._global_grad_norm = math.inf if self.overflow else norm / scale
        gradients = None if self.overflow else self._float32_gradients()
        for held in (self.averaged_gradients, self.all_grad_tensors):
            held.update(dict.fromkeys(held))  # in place, because parameters refer to these dictionaries
        self.zero_grad(set_to_none=True)
        if gradients is not None:
            factor = self._factor(norm, scale)
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            self._step_masters(gradients)
            self._publish_masters()

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Average the gradients of a step over the data-parallel ranks (called at stage 1)."""
        if self._is_alone:
            self.backward_epilogue()
            self.independent_gradient_partition_epilogue()
        else:
            super().reduce_gradients(pipeline_parallel)

    def backward_epilogue(self, *args: object, **kwargs: object) -> None:
        """Add a micro-batch's gradients to the float32 sum; with several ranks, hooks do so instead."""
        if not (self._is_alone and self.use_separate_grad_accum):
            return
        for index, parameters in enumerate(self.params_in_partition):
            sums = _without_padding(self._get_compact_grad_partition_buffer(index))
            pairs = [(s, p.grad) for s, p in zip(sums, parameters, strict=True) if p.grad is not None]
            if pairs:
                torch._foreach_add_(*(list(tensors) for tensors in zip(*pairs, strict=True)))
        self._clear_param_grad_only()

    def independent_gradient_partition_epilogue(self) -> None:
        """Finish the reduction of a backward pass and keep this rank's part of the averaged gradients."""
        if not self._is_alone:
            self.reduce_ipg_grads()
            self.params_already_reduced = [False] * len(self.params_already_reduced)
            self._join_reduction_stream()
        for index in range(len(self.bit16_groups)):
            self._keep_part(index)
        self._release_ipg_buffers()
        self._clear_param_grad_only()
        self._epilogue_ran_this_backward = True

    def _join_reduction_stream(self) -> None:
        """Make the compute stream wait for the reductions; DeepSpeed would block the host instead.

        This is safe for memory that is freed afterwards. Buckets and gradients were allocated on the stream
        that waits, so their memory is reused only after the wait. A rank's part was allocated on the
        reduction stream, which uses it again only after waiting for the next backward pass.
        """
        if self.overlap_comm and not get_accelerator().resolves_data_dependency():
            get_accelerator().current_stream().wait_stream(self.reduction_stream)
        self._clear_previous_reduced_grads()

    def _keep_part(self, index: int) -> None:
        """Sum a group's gradients; at the last micro-batch, set its `averaged_gradients`."""
        is_last, parameters = self.is_gradient_accumulation_boundary(), self.params_in_partition[index]
        if self._use_compact_grad_partition_buffer(index):
            if is_last:
                self._get_compact_grad_partition_buffer(index)
            return
        dtype, sums = self.gradient_accumulation_dtype, self.all_grad_tensors.get(index)
        new = self.get_all_grad_tensors(parameters, dtype=dtype)
        if sums:
            torch._foreach_add_(sums, new)
        else:
            self.all_grad_tensors[index] = new
        if is_last:
            self.averaged_gradients[index] = self.get_flat_partition(
                parameters,
                self.first_offset[index],
                self.partition_size[index],
                dtype=dtype,
                device=get_accelerator().current_device_name(),
                param_group_idx=index,
                return_tensor_list=True,
            )
            self.all_grad_tensors[index] = None

    def _fill_param_grad_accum_attribute(self, param: Any) -> None:
        if param.grad is None:
            return
        if param.grad_accum is None:
            param.grad_accum = param.grad.to(self.gradient_accumulation_dtype)
        else:
            param.grad_accum.add_(param.grad)
        param.grad = None

    @staticmethod
    def _add_to_grad_partition_buffer(output: Tensor | None, source: Tensor) -> None:
        if output is not None:
            output.add_(source)  # add_ converts to float32 as it reads, so no copy is needed

    @property
    def _is_alone(self) -> bool:
        return bool(dist.get_world_size(group=self.dp_process_group) == 1)

    def _scaled_norm(self) -> float:
        """Return the norm of all ranks' gradients, times the loss scale. The host synchronises only here."""
        gradients = {i: _without_padding(held) for i, held in self.averaged_gradients.items()}
        return math.sqrt(_global_sum_of_squares(self, gradients, self.params_in_partition).item())

    def _float32_gradients(self) -> list[Tensor]:
        """Return this rank's gradients, one flat float32 tensor per group, laid out as the master weights."""
        flats, targets, sources = list[Tensor](), list[Tensor](), list[Tensor]()
        for index, size in enumerate(self.partition_size):
            averaged = self.averaged_gradients[index]
            flat = getattr(averaged, "flat_partition", None)
            if flat is None:
                flat = torch.empty(int(size), dtype=torch.float32, device=averaged[0].device)
                targets += _unflatten_dense_tensors(flat, averaged)
                sources += averaged
            flats.append(flat)
        if targets:
            torch._foreach_copy_(targets, sources)
        return flats

    def _factor(self, norm: float, scale: float) -> float:
        """Return the factor that unscales and clips, computed in DeepSpeed's order of float32 operations."""
        combined = np.float32(scale)
        if self.clip_grad > 0.0:
            clip = (np.float32(norm) / combined + np.float32(1e-6)) / np.float32(self.clip_grad)
            combined *= max(clip, np.float32(1.0))
        return float(np.float32(1.0) / combined)

    def _step_masters(self, gradients: list[Tensor]) -> None:
        for master, gradient in zip(self.single_partition_of_fp32_groups, gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        gradients.clear()  # the all-gather that follows needs the memory
        for master in self.single_partition_of_fp32_groups:
            master.grad = None
        self._lazy_init_hp_params_optimizer_state()

    def _publish_masters(self) -> None:
        """Round the new weights to the training precision and all-gather the parts of the other ranks."""
        rank = dist.get_rank(group=self.dp_process_group)
        parts = [partitions[rank] for partitions in self.parallel_partitioned_bit16_groups]
        torch._foreach_copy_(parts, self.single_partition_of_fp32_groups)
        all_gather_dp_groups(
            groups_flat=self.bit16_groups_flat,
            partitioned_param_groups=self.parallel_partitioned_bit16_groups,
            dp_process_group=self.real_dp_process_group,
            start_alignment_factor=self.nccl_start_alignment_factor,
            allgather_bucket_size=self.allgather_bucket_size,
        )


class LeanZero3Optimizer(DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's optimiser of stage 3 with a batched norm; `make_norm_lean` converts an existing one."""

    def _get_norm_groups(self) -> list[Tensor]:
        return [_global_sum_of_squares(self, self.averaged_gradients, self.fp16_groups).sqrt().float()]


def _global_sum_of_squares(
    optimizer: Any, gradients: dict[int, list[Tensor]], parameters: list[list[Any]]
) -> Tensor:
    """Return the sum of squares over all ranks' gradients, given by parameter group, each counted once."""
    rank, counted = optimizer.model_parallel_rank, list[Tensor]()
    for index, group in enumerate(parameters):
        counted += _counted(gradients[index], group, rank)
    total = sum_of_squares(counted, get_accelerator().current_device_name())
    if dist.get_world_size(group=optimizer.dp_process_group) > 1:
        dist.all_reduce(total, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(total, dist.ReduceOp.SUM)
    return total


def _counted(gradients: list[Tensor], parameters: list[Any], tensor_rank: int) -> list[Tensor]:
    """Return the gradients that this rank contributes to the global norm.

    Gradients of weights that every tensor-parallel rank holds whole count on tensor rank 0 only.
    """
    pairs = zip(gradients, parameters, strict=False)  # padding without a parameter may follow
    return [g for g, p in pairs if tensor_rank == 0 or is_model_parallel_parameter(p)]


def _without_padding(gradients: Iterable[Tensor]) -> list[Tensor]:
    return [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
