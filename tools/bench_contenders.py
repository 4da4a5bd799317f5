"""Who takes part in a step benchmark: our model in some dtype, or a peer's, each with its optimiser.

All of them see the same clips. Ours steps as our engine does, with torch's fused AdamW; a peer as its
released script does, with torch's AdamW as it comes.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peers import Peer
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.models import build_model
from everest_ds.parallel.recompute import apply_recompute
from everest_ds.profiling.compute import predict_macs

# Elements of master weights that one fused optimiser call covers: its float32 gradients are its temporary.
_CHUNK_ELEMENTS = 32 * 2**20
_AMP_NAMES = {torch.float16: "fp16 amp", torch.bfloat16: "bf16 amp"}
_ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.05}


class MasterAdamW:
    """AdamW on float32 masters of bfloat16 parameters, as DeepSpeed's bf16 mode steps.

    A chunk of parameters at a time: gradients to float32, update of the masters, masters back to bfloat16.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.chunks: list[tuple[list[nn.Parameter], torch.optim.AdamW]] = []
        for chunk in _in_chunks(parameters):
            masters = [parameter.detach().float().clone() for parameter in chunk]
            self.chunks.append((chunk, torch.optim.AdamW(masters, fused=True, **_ADAMW)))

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from their gradients."""
        for parameters, optimizer in self.chunks:
            masters = optimizer.param_groups[0]["params"]
            for master, parameter in zip(masters, parameters, strict=True):
                assert parameter.grad is not None
                master.grad = parameter.grad.float()
            optimizer.step()
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)
                master.grad = None

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero the gradients of the parameters in place."""
        for parameters, _ in self.chunks:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()

    def state_bytes(self) -> int:
        """Masters and moments."""
        return sum(
            tensor_bytes(optimizer.param_groups[0]["params"]) + adamw_bytes(optimizer)
            for _, optimizer in self.chunks
        )


def _in_chunks(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    chunk: list[nn.Parameter] = []
    for parameter in parameters:
        if chunk and sum(p.numel() for p in chunk) + parameter.numel() > _CHUNK_ELEMENTS:
            yield chunk
            chunk = []
        chunk.append(parameter)
    if chunk:
        yield chunk


def tensor_bytes(tensors: list[Any]) -> int:
    """Memory of the elements of `tensors`; None counts nothing."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def adamw_bytes(optimizer: torch.optim.AdamW) -> int:
    """The moments that it holds."""
    return sum(tensor_bytes([v for v in s.values() if torch.is_tensor(v)]) for s in optimizer.state.values())


@dataclass
class Contender:
    """A model that trains, and how.

    Attributes:
        loss: runs the forward pass on the benchmark's clips.
        scaler: of a peer in fp16; None elsewhere.
        macs: multiply-accumulates of a step, predicted; None for peers, whose path is another.
    """

    label: str
    dtype: str
    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: MasterAdamW | torch.optim.AdamW
    scaler: torch.amp.GradScaler | None = None
    macs: int | None = None

    def backward(self, loss: Tensor) -> None:
        """Gradients, of the scaled loss where there is a scaler."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self) -> None:
        """Optimiser step; gradients are zeroed in place, their memory stays."""
        if self.scaler is not None and isinstance(self.optimizer, torch.optim.AdamW):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def state_bytes(self) -> int:
        """Parameters, gradients and optimiser states."""
        parameters = list(self.model.parameters())
        held = tensor_bytes(parameters) + tensor_bytes([parameter.grad for parameter in parameters])
        if isinstance(self.optimizer, MasterAdamW):
            return held + self.optimizer.state_bytes()
        return held + adamw_bytes(self.optimizer)


@dataclass(frozen=True)
class Inputs:
    """What every contender sees: uint8 clips (B, F, H, W, 3), their keys (B,), their labels (B,)."""

    clip_BFHWC: Tensor
    key_B: Tensor
    label_B: Tensor


def draw_inputs(config: Experiment, batch_size: int, device: torch.device) -> Inputs:
    """Noise: the time of a step does not depend on the pixels."""
    model = config.model
    generator = torch.Generator().manual_seed(0)
    size = (batch_size, model.num_frames, model.image_size, model.image_size, 3)
    clip = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    label = torch.randint(0, model.num_classes or 1, (batch_size,), generator=generator)
    return Inputs(clip.to(device), torch.arange(batch_size, device=device), label.to(device))


def our_contender(config: Experiment, dtype: str, inputs: Inputs) -> Contender:
    """Our model: float32, or bfloat16 weights with float32 masters."""
    torch.manual_seed(0)
    model = build_model(config).to(inputs.clip_BFHWC.device, torch.bfloat16 if dtype == "bf16" else None)
    apply_recompute(model, config.recompute)

    def loss() -> Tensor:
        output = model(inputs.clip_BFHWC, inputs.key_B)
        if config.task == "pretrain":
            return output.loss
        return F.cross_entropy(output.float(), inputs.label_B)

    parameters = list(model.parameters())
    fp32 = dtype == "fp32"
    optimizer = torch.optim.AdamW(parameters, fused=True, **_ADAMW) if fp32 else MasterAdamW(parameters)
    macs = predict_macs(config).training_macs * len(inputs.clip_BFHWC)
    return Contender(f"ours {dtype}", dtype, model, loss, optimizer, macs=macs)


def peer_contenders(peer: Peer, dtypes: list[str], inputs: Inputs) -> list[Contender]:
    """A peer's model in each dtype: one set of float32 weights; half precision is autocast, as in their loop.

    That is fp16 with a gradient scaler on CUDA, bf16 on a CPU.
    """
    device = inputs.clip_BFHWC.device
    peer.model.to(device)
    batch = peer.prepare(inputs.clip_BFHWC, inputs.label_B)
    optimizer = torch.optim.AdamW(peer.model.parameters(), **_ADAMW)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16

    def contender(dtype: str) -> Contender:
        mixed = dtype == "bf16"

        def loss() -> Tensor:
            with torch.autocast(device.type, half, enabled=mixed):
                return peer.loss(batch)

        name = f"{peer.name} {_AMP_NAMES[half] if mixed else dtype}"
        scaler = torch.amp.GradScaler("cuda") if mixed and half is torch.float16 else None
        return Contender(name, dtype, peer.model, loss, optimizer, scaler)

    return [contender(dtype) for dtype in dtypes]


@dataclass(frozen=True)
class StepTime:
    """One step, in seconds; the processor time is the whole process's, over all threads."""

    forward_s: float
    backward_s: float
    optimizer_s: float
    user_cpu_s: float

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.forward_s + self.backward_s + self.optimizer_s


def timed_step(contender: Contender, device: torch.device) -> StepTime:
    """Train one step and time its parts: by CUDA events on a GPU, by the clock elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    user = _user_cpu_s()
    marks = [_mark(device)]
    loss = contender.loss()
    marks.append(_mark(device))
    contender.backward(loss)
    marks.append(_mark(device))
    contender.update()
    marks.append(_mark(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    forward, backward, optimizer = (_between(*pair) for pair in zip(marks, marks[1:], strict=False))
    return StepTime(forward, backward, optimizer, _user_cpu_s() - user)


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
