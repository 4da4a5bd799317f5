"""Contenders of a step benchmark: our engine, our model in a plain loop, and the released systems (peers).

All of them get the same clips. Ours is the engine that a run builds; the plain loop is the same step without
DeepSpeed; a peer steps as its released script does, with torch's AdamW in its default settings.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from typing import Any, Protocol

import torch
from peers import Peer, PeerBatch
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.costs.compute import predict_macs
from everest_ds.data.clip_batches import Batch
from everest_ds.parallel.world import World
from everest_ds.training.engine_step import EngineStep, MeasuredStep
from everest_ds.training.plain_step import PlainStep

_AMP_NAMES = {torch.float16: "fp16 amp", torch.bfloat16: "bf16 amp"}
OUT_OF_MEMORY = "out of memory"
_ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.05}


class Step(Protocol):
    """The phases of a contender's step, like those of `everest_ds.training.engine_step.MeasuredStep`."""

    def load(self) -> Any:
        """Return a batch."""

    def prepare(self, batch: Any) -> Any:
        """Copy the batch to the device and augment it."""

    def loss(self, prepared: Any) -> Tensor:
        """Run the forward pass and return the loss."""

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""

    def update(self) -> bool:
        """Run the optimiser step; return True if it was skipped."""


@dataclass(frozen=True)
class StepTime:
    """The times of one step, in seconds; processor time is that of the whole process, over all threads.

    Attributes:
        prepare_s: augmentation, timed before the step because peers leave it to their loader's workers.
        forward_s: forward pass.
        backward_s: backward pass.
        optimizer_s: optimiser step.
        user_cpu_s: processor time in user mode.
    """

    prepare_s: float
    forward_s: float
    backward_s: float
    optimizer_s: float
    user_cpu_s: float

    @property
    def step_s(self) -> float:
        """Return the time of the whole step: forward, backward and optimiser."""
        return self.forward_s + self.backward_s + self.optimizer_s


@dataclass
class Contender:
    """A model that takes part in the benchmark, with its training step and its results.

    Attributes:
        label: name in the tables.
        dtype: fp32 or bf16; a peer's half precision on CUDA is fp16.
        step: training step; None after a failure.
        states: returns the tensors that stay between steps: parameters and optimiser states.
        scale: reads the loss scale of a peer in fp16; None for all others.
        drop_gradients: frees gradients that stay from step to step.
        macs: predicted multiply-accumulates per step; None for peers, whose path differs.
        is_engine: whether it is our engine, with which all others are compared.
        times: times by round; None if the step was skipped and so has no update.
        skipped: number of steps that did not update the weights, warm-up included.
        failure: why the contender was dropped; None if it was not.
    """

    label: str
    dtype: str
    step: Step | None
    states: Callable[[], Iterable[Tensor]] = list
    scale: Callable[[], float] | None = None
    drop_gradients: Callable[[], object] = lambda: None
    macs: int | None = None
    is_engine: bool = False
    times: list[StepTime | None] = field(default_factory=list)
    skipped: int = 0
    failure: str | None = None

    @property
    def running(self) -> Step:
        """Return the step of a contender that has not failed."""
        assert self.step is not None, self.failure
        return self.step

    @property
    def taken(self) -> list[StepTime]:
        """Return the times of the steps that updated the weights."""
        return [step for step in self.times if step is not None]

    def passes(self) -> None:
        """Run a forward and a backward pass, without the update that would use the gradients."""
        step = self.running
        step.backward(step.loss(step.prepare(step.load())))

    def state_bytes(self) -> int:
        """Return the bytes held between steps: parameters, their float32 masters and AdamW's moments."""
        storages = [tensor.untyped_storage() for tensor in self.states()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def fail(self, reason: str) -> None:
        """Drop the contender because of `reason`, and free its memory."""
        self.drop_gradients()
        self.step, self.states, self.scale, self.failure = None, list, None, reason
        gc.collect()
        torch.cuda.empty_cache()


def attempt(contender: Contender, act: Callable[[], object]) -> None:
    """Run `act` unless the contender has failed; running out of memory counts as a failure."""
    if contender.step is not None and not fits(act):
        contender.fail(OUT_OF_MEMORY)


def build(label: str, dtype: str, make: Callable[[], Contender]) -> Contender:
    """Make a contender, or a failed one if memory does not suffice."""
    made: list[Contender] = []
    if not fits(lambda: made.append(make())):
        made.append(Contender(label, dtype, step=None))
        made[0].fail(OUT_OF_MEMORY)
    return made[0]


def fits(act: Callable[[], object]) -> bool:
    """Run `act` and return whether memory, of a GPU or of the host, sufficed."""
    try:
        act()
    except (MemoryError, RuntimeError) as error:
        given_up = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not given_up and "can't allocate memory" not in str(error):
            raise
        return False
    return True


def engine_contender(config: Experiment, world: World) -> Contender:
    """Make a contender of our engine, in the config's precision."""

    def make() -> Contender:
        step = EngineStep(config, world)
        optimizer: Any = getattr(step.engine.optimizer, "optimizer", step.engine.optimizer)
        return _of_ours("ours", config, step, lambda: _held(step.engine.module, optimizer))

    return build(f"ours {config.precision}", config.precision, make)


def plain_contender(config: Experiment, device: torch.device) -> Contender:
    """Make a contender of our model in a plain loop, in the config's precision."""

    def make() -> Contender:
        step = PlainStep(config, device)
        return _of_ours("plain", config, step, lambda: _held(step.model, step.optimizer))

    return build(f"plain {config.precision}", config.precision, make)


def _of_ours(
    name: str, config: Experiment, step: MeasuredStep, states: Callable[[], list[Tensor]]
) -> Contender:
    macs = predict_macs(config).training_macs * config.batch.micro_batch_size
    return Contender(
        f"{name} {config.precision}",
        config.precision,
        step,
        states,
        macs=macs,
        is_engine=isinstance(step, EngineStep),
    )


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    groups = (group["params"] for group in optimizer.param_groups)
    states = (value for state in optimizer.state.values() for value in state.values())
    return [*model.parameters(), *chain.from_iterable(groups), *filter(torch.is_tensor, states)]


class PeerStep:
    """A peer's training step: autocast in half precision, with a gradient scaler in fp16."""

    def __init__(
        self, peer: Peer, batch: PeerBatch, optimizer: torch.optim.AdamW, half: torch.dtype | None
    ) -> None:
        self._peer, self._batch, self._optimizer, self._half = peer, batch, optimizer, half
        device = batch.video_BCFHW.device.type
        self.scaler = torch.amp.GradScaler(device) if half is torch.float16 else None

    def load(self) -> PeerBatch:
        """Return the clips as the peer's loader delivers them."""
        return self._batch

    def prepare(self, batch: PeerBatch) -> PeerBatch:
        """Return the batch as it is: the peer's loader has prepared it."""
        return batch

    def loss(self, prepared: PeerBatch) -> Tensor:
        """Run the forward pass and return the loss."""
        device = prepared.video_BCFHW.device.type
        with torch.autocast(device, self._half or torch.bfloat16, enabled=self._half is not None):
            return self._peer.loss(prepared)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass, on the scaled loss if there is a gradient scaler."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self) -> bool:
        """Run the optimiser step and zero the gradients in place, so that their memory stays.

        Returns:
            Always False: the loss scale shows after the step, without a wait in it, whether it was skipped.
        """
        if self.scaler is None:
            self._optimizer.step()
        else:
            self.scaler.step(self._optimizer)
            self.scaler.update()
        self._optimizer.zero_grad(set_to_none=False)
        return False


def peer_contenders(peer: Peer, dtypes: list[str], clips: Batch) -> list[Contender]:
    """Make a contender of a peer's model in each dtype, all with the same float32 weights.

    Half precision is autocast, as in the peers' loops: fp16 with a gradient scaler on CUDA, bf16 on a CPU.
    """
    device = clips.clip.device
    # AdamW creates its states at its first step, on the device where the parameters are by then.
    optimizer = torch.optim.AdamW(peer.model.parameters(), **_ADAMW)
    half = _half(device)

    @cache
    def batch() -> PeerBatch:
        peer.model.to(device)
        return peer.prepare(clips.clip, clips.label)

    def contender(label: str, dtype: str) -> Contender:
        step = PeerStep(peer, batch(), optimizer, half if dtype == "bf16" else None)
        return Contender(
            label,
            dtype,
            step,
            lambda: _held(peer.model, optimizer),
            scale=None if step.scaler is None else step.scaler.get_scale,
            drop_gradients=optimizer.zero_grad,
        )

    labels = {dtype: f"{peer.name} {_AMP_NAMES[half] if dtype == 'bf16' else dtype}" for dtype in dtypes}
    return [build(label, dtype, partial(contender, label, dtype)) for dtype, label in labels.items()]


def _half(device: torch.device) -> torch.dtype:
    """Return the half precision of the peers' scripts on this device: fp16 on a GPU, bf16 on a CPU."""
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def timed_step(contender: Contender, device: torch.device) -> StepTime | None:
    """Train one step and time its parts: by CUDA events on a GPU, by the clock elsewhere.

    Returns:
        The times, or None if the step was skipped and so has no update; `skipped` counts such steps.
    """
    step, scale = contender.running, contender.scale and contender.scale()
    batch = step.load()
    _wait(device)
    marks = [_mark(device)]
    prepared = step.prepare(batch)
    user = _user_cpu_s()
    marks.append(_mark(device))
    loss = step.loss(prepared)
    marks.append(_mark(device))
    step.backward(loss)
    marks.append(_mark(device))
    skipped = step.update()
    marks.append(_mark(device))
    _wait(device)
    user = _user_cpu_s() - user
    if contender.scale is not None and scale is not None:
        skipped = contender.scale() < scale
    if skipped:
        contender.skipped += 1
        return None
    prepare, forward, backward, update = (_between(*pair) for pair in zip(marks, marks[1:], strict=False))
    return StepTime(prepare, forward, backward, update, user)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, second: Any) -> float:
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1000


def _user_cpu_s() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime
