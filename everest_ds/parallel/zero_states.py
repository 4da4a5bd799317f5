"""Access to the float32 weights and AdamW's moments of a DeepSpeed engine, the same for all ZeRO stages.

A rank holds at most one contiguous range of each parameter (or of its tensor-parallel shard): all elements at
stage 0, those that fall into its part of a flattened group at stages 1 and 2, an equal share at stage 3.
Nothing is gathered here: a rank saves the elements that it holds, and reads the elements that it will hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from everest_ds.checkpoints.reader import STATES, WEIGHT
from everest_ds.checkpoints.sealed_manifest import WHOLE, Cut
from everest_ds.parallel.mesh import Mesh
from everest_ds.parallel.tensor_parallel import split_of

_MOMENTS = tuple(state for state in STATES if state != WEIGHT)
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class LocalShard:
    """The range `start` .. `start + numel` of a flattened parameter, or of its shard, held by this rank.

    Attributes:
        name: the parameter's name.
        parameter: the parameter itself.
        shape: shape of the whole parameter.
        cut: this rank's tensor-parallel shard of the parameter.
        start: first element of the range.
        numel: number of elements in the range.
        saved_here: True if this rank saves the range; False if another rank holds a copy and saves it.
    """

    name: str
    parameter: Any  # nn.Parameter, with the attributes that DeepSpeed adds
    shape: tuple[int, ...]
    cut: Cut
    start: int
    numel: int
    saved_here: bool


class ZeroStates(Protocol):
    """Interface to the states of a model (weights and AdamW's moments), one implementation per sharding."""

    def held(self) -> Iterator[LocalShard]:
        """Yield the ranges that this rank holds, in the order of the parameters."""

    def get(self, held: LocalShard, state: str) -> Tensor:
        """Return the elements of `state` in the range `held`, float32 and flat; a view if possible."""

    def put(self, held: LocalShard, state: str, values: Tensor) -> None:
        """Set the elements of `state` in the range `held`. Call `refresh` after the last `put`."""

    def refresh(self) -> None:
        """Update the weights of the forward pass from the float32 weights. Call on every rank."""

    def slots(self) -> list[dict[str, Any]]:
        """Return AdamW's records on this rank (a step count and moments each); create missing ones."""


def states_of_engine(engine: Any, mesh: Mesh) -> ZeroStates:
    """Return the implementation of `ZeroStates` for the engine's ZeRO stage and offload."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _Replicated(engine, mesh)
    if stage < 3:
        return _Flattened(engine, mesh)
    return _Swapped(engine, mesh) if engine.optimizer.swap_optimizer else _Partitioned(engine, mesh)


def whole_shape(parameter: Any, mesh: Mesh) -> tuple[int, ...]:
    """Return the shape of a parameter before ZeRO or tensor parallelism sharded it."""
    shape = list(getattr(parameter, "ds_shape", parameter.shape))
    split = split_of(parameter)
    if split is not None:
        shape[split.dim] *= mesh.degrees.tensor
    return tuple(shape)


def _held(
    name: str, parameter: Any, mesh: Mesh, start: int, numel: int, saved_by_data_rank: bool = True
) -> LocalShard:
    shape, split = whole_shape(parameter, mesh), split_of(parameter)
    if split is None:  # equal on every rank of the tensor group, so only the first one saves it
        return LocalShard(
            name, parameter, shape, WHOLE, start, numel, saved_by_data_rank and mesh.coordinates.tensor == 0
        )
    outer = math.prod(shape[: split.dim]) * split.pieces
    cut = Cut(mesh.coordinates.tensor, mesh.degrees.tensor, outer)
    return LocalShard(name, parameter, shape, cut, start, numel, saved_by_data_rank)


def optimizer_step(states: ZeroStates) -> int:
    """Return the number of steps that AdamW has counted."""
    return max(int(slot["step"]) for slot in states.slots())


def set_optimizer_step(states: ZeroStates, step: int) -> None:
    """Set AdamW's step counters to `step`."""
    for slot in states.slots():
        slot["step"].fill_(step)


def loss_scale(engine: Any) -> dict[str, int | float] | None:
    """Return the state of the fp16 loss scaler; None in other precisions."""
    if not engine.fp16_enabled():
        return None
    scaler = engine.optimizer.loss_scaler
    return {name: getattr(scaler, name) for name in _LOSS_SCALE if hasattr(scaler, name)}


def set_loss_scale(engine: Any, saved: dict[str, int | float] | None) -> None:
    """Restore a saved state of the fp16 loss scaler; None keeps DeepSpeed's initial state."""
    if saved is not None and engine.fp16_enabled():
        for name, value in saved.items():
            setattr(engine.optimizer.loss_scaler, name, value)


class _Replicated:
    """The states at stage 0: torch's AdamW over whole parameters, the same on every rank."""

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        self._module: nn.Module = engine.module
        self._optimizer: torch.optim.AdamW = engine.optimizer
        self._mesh = mesh

    def held(self) -> Iterator[LocalShard]:
        parameters = list(self._module.named_parameters())
        total = sum(parameter.numel() for _, parameter in parameters)
        before = 0
        for name, parameter in parameters:
            writer = before * self._mesh.degrees.data // total  # ranks write about the same number of bytes
            is_mine = writer == self._mesh.coordinates.data
            yield _held(name, parameter, self._mesh, 0, parameter.numel(), is_mine)
            before += parameter.numel()

    def get(self, held: LocalShard, state: str) -> Tensor:
        return self._tensor(held.parameter, state).detach().view(-1)

    @torch.no_grad()
    def put(self, held: LocalShard, state: str, values: Tensor) -> None:
        self._tensor(held.parameter, state).copy_(values.view_as(held.parameter))

    def refresh(self) -> None:
        pass  # the forward pass uses the float32 weights themselves

    def slots(self) -> list[dict[str, Any]]:
        return _slots(self._optimizer, list(self._module.parameters()))

    def _tensor(self, parameter: nn.Parameter, state: str) -> Tensor:
        if state == WEIGHT:
            return parameter
        moment: Tensor = self._optimizer.state[parameter][state]
        return moment


class _Flattened:
    """The states at stages 1 and 2: each parameter group is a flat tensor, split over the ranks."""

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        self._module: nn.Module = engine.module
        self._mesh = mesh
        self._zero = engine.optimizer
        self._optimizer: torch.optim.AdamW = engine.optimizer.optimizer
        self._parts: list[Tensor] = [group["params"][0] for group in self._optimizer.param_groups]

    def held(self) -> Iterator[LocalShard]:
        parameter: Any
        for name, parameter in self._module.named_parameters():
            mapping = parameter._hp_mapping  # None if no element falls into this rank's part
            if mapping is not None:
                address = mapping.lp_fragment_address
                yield _held(name, parameter, self._mesh, address.start, address.numel)

    def get(self, held: LocalShard, state: str) -> Tensor:
        return self._elements(held, state).detach()

    def put(self, held: LocalShard, state: str, values: Tensor) -> None:
        self._elements(held, state).copy_(values)

    def refresh(self) -> None:
        self._zero.update_lp_params()

    def slots(self) -> list[dict[str, Any]]:
        return _slots(self._optimizer, self._parts)

    def _elements(self, held: LocalShard, state: str) -> Tensor:
        mapping = held.parameter._hp_mapping
        part = self._parts[mapping.param_group_index]
        source: Tensor = part.detach() if state == WEIGHT else self._optimizer.state[part][state]
        return source.narrow(0, mapping.hp_fragment_address.start, held.numel)


class _Partitioned:
    """The states at stage 3: every parameter is cut into equal shares, padded with zeros at the end."""

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        self._module: nn.Module = engine.module
        self._zero = engine.optimizer
        self._mesh = mesh

    def held(self) -> Iterator[LocalShard]:
        parameter: Any
        for name, parameter in self._module.named_parameters():
            share = parameter.ds_tensor.ds_numel
            start = self._mesh.coordinates.data * share
            numel = min(share, parameter.ds_numel - start)
            if numel > 0:
                yield _held(name, parameter, self._mesh, start, numel)

    def get(self, held: LocalShard, state: str) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state  # heavy

        if state == WEIGHT:
            share: Tensor = safe_get_local_fp32_param(held.parameter)
        else:
            share = safe_get_local_optimizer_state(held.parameter, state)
        return share.detach()[: held.numel]

    def put(self, held: LocalShard, state: str, values: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state  # heavy

        share = torch.zeros(held.parameter.ds_tensor.ds_numel)
        share[: held.numel] = values
        if state == WEIGHT:
            safe_set_local_fp32_param(held.parameter, share)
            held.parameter.ds_tensor.data.copy_(share)
        else:
            safe_set_local_optimizer_state(held.parameter, share, state)

    def refresh(self) -> None:
        # Small parameters stay gathered between steps: release them, then gather the new shares again.
        self._zero.checkpoint_event_prologue()
        self._zero.checkpoint_event_epilogue()

    def slots(self) -> list[dict[str, Any]]:
        return _slots(self._zero.optimizer, self._zero.fp32_partitioned_groups_flat)


class _Swapped(_Partitioned):
    """The states at stage 3 with optimiser offload to a disk; DeepSpeed fetches one group at a time.

    Neighbouring parameters share a group, so each group is fetched about once, not once per parameter.
    """

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        super().__init__(engine, mesh)
        self._fetched: int | None = None  # the group whose states are in memory and may have changed
        self._copied: tuple[int, str] | None = None  # the group and state that `_copy` holds
        self._copy: Tensor

    def get(self, held: LocalShard, state: str) -> Tensor:
        # A view of a host copy, because the fetched states themselves go back to the disk.
        group, start, _ = self._place(held)
        if self._copied != (group, state):
            self._send_back()
            self._fetch(group)
            self._copied, self._copy = (group, state), self._flat(group, state).detach().cpu().clone()
            self._send_back()
        return self._copy.narrow(0, start, held.numel)

    def put(self, held: LocalShard, state: str, values: Tensor) -> None:
        group, start, share = self._place(held)
        if group != self._fetched:
            self._send_back()
            self._fetch(group)
        self._copied = None
        elements = self._flat(group, state).detach().narrow(0, start, share)
        elements.zero_()
        elements[: held.numel].copy_(values)
        if state == WEIGHT:
            held.parameter.ds_tensor.data.copy_(elements)

    def refresh(self) -> None:
        self._send_back()
        super().refresh()

    def slots(self) -> list[dict[str, Any]]:
        self._send_back()
        for group, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            if not self._zero.optimizer.state[flat]:
                self._fetch(group)
                _slots(self._zero.optimizer, [flat])
                self._send_back()
        return [self._zero.optimizer.state[flat] for flat in self._zero.fp32_partitioned_groups_flat]

    def _place(self, held: LocalShard) -> tuple[int, int, int]:
        """Return the parameter's group, and the start and length of this rank's share in it."""
        place: tuple[int, int, int] = self._zero.grad_position[self._zero.get_param_id(held.parameter)]
        return place

    def _flat(self, group: int, state: str) -> Tensor:
        flat: Tensor = self._zero.fp32_partitioned_groups_flat[group]
        return flat if state == WEIGHT else self._zero.optimizer.state[flat][state]

    def _fetch(self, group: int) -> None:
        if self._zero._swappable_optimizer_subgroup(group):  # small groups always stay in memory
            self._zero._optimizer_states_and_gradient_swap_in(group)
        self._fetched = group

    def _send_back(self) -> None:
        if self._fetched is not None and self._zero._swappable_optimizer_subgroup(self._fetched):
            self._zero._optimizer_states_and_gradient_swap_out(self._fetched)
        self._fetched = None


def _slots(optimizer: torch.optim.AdamW, tensors: list[Tensor]) -> list[dict[str, Any]]:
    """Return AdamW's records of `tensors`, creating missing ones.

    AdamW itself creates a record at the first step, which is too late for a resumed run.
    """
    for tensor in tensors:
        slot = optimizer.state[tensor]
        if not slot:
            slot["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            slot.update({moment: torch.zeros_like(tensor) for moment in _MOMENTS})
    return [optimizer.state[tensor] for tensor in tensors]
