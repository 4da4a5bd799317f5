"""Access to the float32 weights and AdamW's moments of a DeepSpeed engine: one interface for all ZeRO stages.

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

from everest_ds.checkpoints.sealed_manifest import STATES, WEIGHT, WHOLE, Cut
from everest_ds.parallel import deepspeed_internals as internals
from everest_ds.parallel.mesh import Mesh
from everest_ds.parallel.tensor_parallel import split_of

_MOMENTS = tuple(state for state in STATES if state != WEIGHT)


@dataclass(frozen=True)
class LocalShard:
    """The range of a flattened parameter, or of its tensor-parallel shard, that this rank holds.

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
    parameter: nn.Parameter
    shape: tuple[int, ...]
    cut: Cut
    start: int
    numel: int
    saved_here: bool


class ZeroStates(Protocol):
    """Interface to the states of a model (weights and AdamW's moments), one implementation per sharding."""

    def shards(self) -> Iterator[LocalShard]:
        """Yield the ranges that this rank holds, in the order of the parameters."""

    def get(self, shard: LocalShard, state: str) -> Tensor:
        """Return the elements of `state` in the range of `shard`, float32 and flat; a view if possible."""

    def put(self, shard: LocalShard, state: str, values: Tensor) -> None:
        """Set the elements of `state` in the range of `shard`. Call `refresh` after the last `put`."""

    def refresh(self) -> None:
        """Update the weights of the forward pass from the float32 weights. Call on every rank."""

    def slots(self) -> list[dict[str, Any]]:
        """Return AdamW's state per tensor on this rank (step count and moments); create missing states."""


def states_of_engine(engine: Any, mesh: Mesh) -> ZeroStates:
    """Return the implementation of `ZeroStates` for the engine's ZeRO stage and offload."""
    stage = internals.zero_stage(engine)
    if stage == 0:
        return _Replicated(engine, mesh)
    if stage < 3:
        return _Flattened(engine, mesh)
    return (
        _Swapped(engine, mesh) if internals.offloads_to_disk(engine.optimizer) else _Partitioned(engine, mesh)
    )


def whole_shape(parameter: Any, mesh: Mesh) -> tuple[int, ...]:
    """Return the shape of a parameter before ZeRO or tensor parallelism sharded it."""
    shape = list(internals.unsharded_shape(parameter))
    split = split_of(parameter)
    if split is not None:
        shape[split.dim] *= mesh.degrees.tensor
    return tuple(shape)


def _shard(
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


class _Replicated:
    """The states at stage 0: torch's AdamW over whole parameters, the same on every rank."""

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        self._module: nn.Module = engine.module
        self._optimizer: torch.optim.AdamW = engine.optimizer
        self._mesh = mesh

    def shards(self) -> Iterator[LocalShard]:
        parameters = list(self._module.named_parameters())
        total = sum(parameter.numel() for _, parameter in parameters)
        before = 0
        for name, parameter in parameters:
            writer = before * self._mesh.degrees.data // total  # ranks write about the same number of bytes
            is_mine = writer == self._mesh.coordinates.data
            yield _shard(name, parameter, self._mesh, 0, parameter.numel(), is_mine)
            before += parameter.numel()

    def get(self, shard: LocalShard, state: str) -> Tensor:
        return self._tensor(shard.parameter, state).detach().view(-1)

    @torch.no_grad()
    def put(self, shard: LocalShard, state: str, values: Tensor) -> None:
        self._tensor(shard.parameter, state).copy_(values.view_as(shard.parameter))

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
        self._optimizer = internals.inner_optimizer(engine.optimizer)
        self._parts: list[Tensor] = [group["params"][0] for group in self._optimizer.param_groups]

    def shards(self) -> Iterator[LocalShard]:
        for name, parameter in self._module.named_parameters():
            fragment = internals.fragment_of(parameter)
            if fragment is not None:
                yield _shard(name, parameter, self._mesh, fragment.start, fragment.numel)

    def get(self, shard: LocalShard, state: str) -> Tensor:
        return self._elements(shard, state).detach()

    def put(self, shard: LocalShard, state: str, values: Tensor) -> None:
        self._elements(shard, state).copy_(values)

    def refresh(self) -> None:
        internals.publish_masters(self._zero)

    def slots(self) -> list[dict[str, Any]]:
        return _slots(self._optimizer, self._parts)

    def _elements(self, shard: LocalShard, state: str) -> Tensor:
        fragment = internals.fragment_of(shard.parameter)
        assert fragment is not None, shard.name  # `shards` yields no parameter without a fragment here
        part = self._parts[fragment.group]
        source: Tensor = part.detach() if state == WEIGHT else self._optimizer.state[part][state]
        return source.narrow(0, fragment.offset, shard.numel)


class _Partitioned:
    """The states at stage 3: every parameter is cut into equal shares, padded with zeros at the end."""

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        self._module: nn.Module = engine.module
        self._zero = engine.optimizer
        self._optimizer = internals.inner_optimizer(engine.optimizer)
        self._mesh = mesh

    def shards(self) -> Iterator[LocalShard]:
        for name, parameter in self._module.named_parameters():
            share = internals.share_numel(parameter)
            start = self._mesh.coordinates.data * share
            numel = min(share, internals.numel_of_all_shares(parameter) - start)
            if numel > 0:
                yield _shard(name, parameter, self._mesh, start, numel)

    def get(self, shard: LocalShard, state: str) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state  # heavy

        if state == WEIGHT:
            share: Tensor = safe_get_local_fp32_param(shard.parameter)
        else:
            share = safe_get_local_optimizer_state(shard.parameter, state)
        return share.detach()[: shard.numel]

    def put(self, shard: LocalShard, state: str, values: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state  # heavy

        share = torch.zeros(internals.share_numel(shard.parameter))
        share[: shard.numel] = values
        if state == WEIGHT:
            safe_set_local_fp32_param(shard.parameter, share)
            internals.set_share(shard.parameter, share)
        else:
            safe_set_local_optimizer_state(shard.parameter, share, state)

    def refresh(self) -> None:
        internals.regather(self._zero)

    def slots(self) -> list[dict[str, Any]]:
        return _slots(self._optimizer, internals.flat_groups(self._zero))


class _Swapped(_Partitioned):
    """The states at stage 3 with optimiser offload to a disk; DeepSpeed fetches one group at a time.

    Neighbouring parameters share a group, so each group is fetched about once, not once per parameter.
    """

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        super().__init__(engine, mesh)
        self._fetched: int | None = None  # the group whose states are in memory and may have changed
        self._copied: tuple[int, str] | None = None  # the group and state that `_copy` holds
        self._copy: Tensor

    def get(self, shard: LocalShard, state: str) -> Tensor:
        # A view of a host copy, because the fetched states themselves go back to the disk.
        group, start, _ = internals.place_in_groups(self._zero, shard.parameter)
        if self._copied != (group, state):
            self._send_back()
            self._fetch(group)
            self._copied, self._copy = (group, state), self._flat(group, state).detach().cpu().clone()
            self._send_back()
        return self._copy.narrow(0, start, shard.numel)

    def put(self, shard: LocalShard, state: str, values: Tensor) -> None:
        group, start, share = internals.place_in_groups(self._zero, shard.parameter)
        if group != self._fetched:
            self._send_back()
            self._fetch(group)
        self._copied = None
        elements = self._flat(group, state).detach().narrow(0, start, share)
        elements.zero_()
        elements[: shard.numel].copy_(values)
        if state == WEIGHT:
            internals.set_share(shard.parameter, elements)

    def refresh(self) -> None:
        self._send_back()
        super().refresh()

    def slots(self) -> list[dict[str, Any]]:
        self._send_back()
        groups = internals.flat_groups(self._zero)
        for group, flat in enumerate(groups):
            if not self._optimizer.state[flat]:
                self._fetch(group)
                _slots(self._optimizer, [flat])
                self._send_back()
        return [self._optimizer.state[flat] for flat in groups]

    def _flat(self, group: int, state: str) -> Tensor:
        flat = internals.flat_groups(self._zero)[group]
        if state == WEIGHT:
            return flat
        moment: Tensor = self._optimizer.state[flat][state]
        return moment

    def _fetch(self, group: int) -> None:
        internals.fetch_states(self._zero, group)
        self._fetched = group

    def _send_back(self) -> None:
        if self._fetched is not None:
            internals.send_back_states(self._zero, self._fetched)
        self._fetched = None


def _slots(optimizer: torch.optim.AdamW, tensors: list[Tensor]) -> list[dict[str, Any]]:
    """Return AdamW's state (step count and moments) of each of `tensors`; create missing states.

    AdamW itself creates a tensor's state at the first step, which is too late for a resumed run.
    """
    for tensor in tensors:
        slot = optimizer.state[tensor]
        if not slot:
            slot["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            slot.update({moment: torch.zeros_like(tensor) for moment in _MOMENTS})
    return [optimizer.state[tensor] for tensor in tensors]
