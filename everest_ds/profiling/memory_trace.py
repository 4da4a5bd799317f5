"""Counted memory: the lifetime of every tensor of a real training step, traced without allocating any.

The step runs under fake tensors, which have shapes but no values: a ViT-H takes seconds at any batch size.
Every storage that an operator allocates is recorded on creation and on release. Memory that a kernel uses
internally and the allocator's rounding are not tracked.

The fake device is a CPU, so kernels are chosen as on a CPU (models/attention.py, models/linear.py).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from everest_ds.profiling.autocast import cuda_autocast

# Categories of storages. The first five live on between steps; the last two are created within a step.
PARAMETERS, MASTERS, GRADIENTS, STATES = "parameters", "master_parameters", "gradients", "optimizer_states"
INPUTS, ACTIVATIONS, TEMPORARY = "inputs", "activations", "temporary"
CATEGORIES = (PARAMETERS, MASTERS, GRADIENTS, STATES, INPUTS, ACTIVATIONS, TEMPORARY)


class LiveSample(NamedTuple):
    """Live memory just after a storage was created or released.

    Attributes:
        phase: `forward`, `backward` or `optimizer`.
        operator: operator that ran last, such as `aten.mm`.
        live_bytes: live bytes by category, for all `CATEGORIES`.
    """

    phase: str
    operator: str
    live_bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Live bytes of all categories together."""
        return sum(self.live_bytes.values())


@dataclass(frozen=True)
class MemoryTrace:
    """The memory of one training step: forward pass, backward pass, AdamW.

    Activations are tensors that the forward pass keeps for the backward pass. Temporary tensors are those
    that the forward pass releases itself, and all that the backward pass and the optimiser create.

    Attributes:
        resting_bytes: bytes by category that live between steps.
        timeline: live memory after every creation and release of a storage in the step.
    """

    resting_bytes: dict[str, int]
    timeline: list[LiveSample]

    @property
    def peak(self) -> LiveSample:
        """The moment with the most live memory."""
        return max(self.timeline, key=lambda moment: moment.total_bytes)

    @property
    def peak_bytes(self) -> int:
        """Peak of live bytes."""
        return self.peak.total_bytes

    @property
    def step_bytes(self) -> int:
        """Peak of live bytes minus the bytes that live between steps."""
        return self.peak_bytes - sum(self.resting_bytes.values())


def trace_memory(
    build: Callable[[], nn.Module],
    make_inputs: Callable[[], Sequence[Tensor]],
    loss_of: Callable[..., Tensor],
    amp_dtype: torch.dtype | None = None,
) -> MemoryTrace:
    """Trace a training step of a model after the first one, so that gradients already exist.

    Weights in half precision have float32 masters, which AdamW updates.

    Args:
        build: builds the model; called on the meta device.
        make_inputs: creates the inputs of a step, such as clips; called under fake tensors.
        loss_of: runs one forward pass, `loss_of(model, *inputs)`, and returns the loss.
        amp_dtype: if given, autocast the forward pass to this dtype by CUDA's rules, as in the published
            systems.
    """
    with torch.device("meta"):
        model = build()
    with FakeTensorMode(allow_non_fake_inputs=True), _Ledger() as ledger:
        _allocate(model)
        inputs = make_inputs()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer = _Optimizer(weights)
        optimizer.step()
        ledger.know(PARAMETERS, (*model.parameters(), *model.buffers()))
        ledger.know(GRADIENTS, (weight.grad for weight in weights if weight.grad is not None))
        ledger.know(MASTERS, optimizer.masters)
        ledger.know(STATES, optimizer.states)
        ledger.know(INPUTS, inputs)
        ledger.start("forward")
        with cuda_autocast(amp_dtype):
            loss = loss_of(model, *inputs)
        ledger.know_the_rest(ACTIVATIONS)
        ledger.enter("backward")
        loss.backward()
        del loss
        ledger.enter("optimizer")
        optimizer.step()
        return ledger.close()


def _allocate(model: nn.Module) -> None:
    """Replace the meta weights and buffers of a model by fake CPU tensors."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            empty = torch.empty_like(weight, device="cpu")
            setattr(module, name, nn.Parameter(empty, requires_grad=weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))


class _Optimizer:
    """AdamW that updates float32 masters of the weights that are not float32."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        exact = [weight for weight in weights if weight.dtype == torch.float32]
        self._halves = [weight for weight in weights if weight.dtype != torch.float32]
        self.masters = [weight.detach().float() for weight in self._halves]
        self._adamw = torch.optim.AdamW([*exact, *self.masters], fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights, through their masters where they are not float32."""
        for master, weight in zip(self.masters, self._halves, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        self._adamw.step()
        for master, weight in zip(self.masters, self._halves, strict=True):
            weight.copy_(master)
            master.grad = None

    @property
    def states(self) -> list[Tensor]:
        """Both moments and the step counter of every weight."""
        return [leaf for leaf in tree_leaves(dict(self._adamw.state)) if isinstance(leaf, Tensor)]


@dataclass
class _Storage:
    """A storage that an operator allocated."""

    num_bytes: int
    category: str | None = None  # None until the storage is released or the forward pass is over


class _Event(NamedTuple):
    """The creation (positive change) or release (negative change) of a storage."""

    phase: str
    operator: str
    storage: _Storage
    change_bytes: int


class _Ledger(TorchDispatchMode):
    """A dispatch mode that records the creation and release of every storage that operators allocate."""

    def __init__(self) -> None:
        super().__init__()
        self._phase = self._operator = ""
        self._live: dict[int, _Storage] = {}  # by address
        self._events: list[_Event] = []
        self._resting_bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._operator = str(func.overloadpacket)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return out

    def know(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Assign `category` to the storages of `tensors`."""
        for tensor in tensors:
            self._live[tensor.untyped_storage()._cdata].category = category

    def know_the_rest(self, category: str) -> None:
        """Assign `category` to all live storages that have none yet."""
        for storage in self._live.values():
            storage.category = storage.category or category

    def start(self, phase: str) -> None:
        """Start the step in `phase`: live storages count as resting, and earlier events are discarded."""
        for storage in self._live.values():
            self._resting_bytes[storage.category or ""] += storage.num_bytes
        self._events.clear()
        self.enter(phase)

    def enter(self, phase: str) -> None:
        """Label all following events with `phase`."""
        self._phase = phase

    def close(self) -> MemoryTrace:
        """Replay the events with the final category of every storage and return the trace."""
        resting = {category: self._resting_bytes[category] for category in CATEGORIES}
        live, timeline = dict(resting), []
        for event in self._events:
            live[event.storage.category or TEMPORARY] += event.change_bytes
            timeline.append(LiveSample(event.phase, event.operator, dict(live)))
        return MemoryTrace(resting, timeline)

    def _see(self, memory: torch.UntypedStorage) -> None:
        if memory._cdata not in self._live:
            self._live[memory._cdata] = _Storage(memory.nbytes())
            self._book(self._live[memory._cdata], memory.nbytes())
            weakref.finalize(memory, self._forget, memory._cdata)

    def _forget(self, address: int) -> None:
        storage = self._live.pop(address)
        self._book(storage, -storage.num_bytes)

    def _book(self, storage: _Storage, change_bytes: int) -> None:
        self._events.append(_Event(self._phase, self._operator, storage, change_bytes))
