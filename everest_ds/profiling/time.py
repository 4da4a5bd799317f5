"""Measured training steps of an experiment: their time, and what share of the device's peak rate they reach.

Shape legend: B clips.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.config.schema import Experiment
from everest_ds.profiling.compute import FLOPS_PER_MAC, predict_macs
from everest_ds.profiling.devices import peak_flops_per_s
from everest_ds.profiling.phases import PhaseTimes, TrainingStep, measure_phases

Batch = tuple[Tensor, Tensor, Tensor]  # uint8 clips (B, F, H, W, 3), keys (B,), labels (B,)
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class StepMeasurement:
    """A measured training step of one experiment on one device, and where it was measured.

    Attributes:
        times: seconds by phase.
        batch_size: clips of a step.
        repeats: measured steps.
        useful_flops: floating-point operations of a step that the masked model needs, none repeated.
        peak_flops_per_s: of the device in `dtype`; None if unknown.
        device: the name that its driver reports.
        dtype: `fp32`, `tf32` (float32 weights, tensor cores), `fp16` or `bf16`.
        torch_version: of PyTorch.
        commit: of this project; None outside a checkout.
    """

    times: PhaseTimes
    batch_size: int
    repeats: int
    useful_flops: int
    peak_flops_per_s: float | None
    device: str
    dtype: str
    torch_version: str
    commit: str | None

    @property
    def clips_per_s(self) -> float:
        """Clips a second, were data always there."""
        return self.batch_size / self.times.step.median_s

    @property
    def flops_per_s(self) -> float:
        """Useful floating-point operations a second."""
        return self.useful_flops / self.times.step.median_s

    @property
    def mfu_pct(self) -> float | None:
        """Model FLOPs utilisation (PaLM, 2022, appendix B): useful over peak rate; None if unknown."""
        return None if self.peak_flops_per_s is None else 100 * self.flops_per_s / self.peak_flops_per_s

    def epoch_s(self, num_clips: int, num_ranks: int = 1) -> float:
        """Seconds of an epoch if this step were all there is: data never waited for, communication free."""
        return num_clips / (num_ranks * self.clips_per_s)


def measure_experiment(
    model: nn.Module,
    config: Experiment,
    device: torch.device,
    *,
    commit: str | None,
    load: Callable[[], Batch] | None = None,
    warmup: int = 3,
    repeats: int = 10,
) -> StepMeasurement:
    """Measure training steps of `config.batch.micro_batch_size` clips, on this device alone.

    Weights are of `config.precision`, with float32 masters if that is half; AdamW is torch's fused one.
    Useful FLOPs are the closed formula's for the masked model: what recompute repeats adds time but no work.

    Args:
        model: of `config`, recompute applied if wanted; moved to the device and stepped.
        commit: of the code that runs.
        load: the next clips, keys and labels, on the device. Default: the same noise every time, and a data
            wait of None.
        warmup: steps before the measured ones: caches, autotuning, the optimiser's states.
    """
    model.to(device, _DTYPES[config.precision]).train()
    batch = _noise(config, device)
    step = TrainingStep(load or (lambda: batch), _loss_of(model, config), Tensor.backward, _optimizer(model))
    times = measure_phases(step, device, warmup=warmup, repeats=repeats)
    name, dtype = device_name(device), compute_dtype(config.precision, device)
    batch_size = config.batch.micro_batch_size
    return StepMeasurement(
        times=times if load else replace(times, data_wait=None),
        batch_size=batch_size,
        repeats=repeats,
        useful_flops=FLOPS_PER_MAC * predict_macs(config).training_macs * batch_size,
        peak_flops_per_s=peak_flops_per_s(name, dtype),
        device=name,
        dtype=dtype,
        torch_version=torch.__version__,
        commit=commit,
    )


def device_name(device: torch.device) -> str:
    """As the driver reports it; the processor's name for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def compute_dtype(precision: str, device: torch.device) -> str:
    """The key of a device's rates: `config.precision`, or `tf32` where float32 products go through it."""
    tensor_cores = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if precision == "fp32" and tensor_cores else precision


def _noise(config: Experiment, device: torch.device) -> Batch:
    """Random clips (uint8), keys and labels on the device."""
    clip, num_clips = config.candidate_geometry, config.batch.micro_batch_size
    generator = torch.Generator().manual_seed(0)
    size = (num_clips, clip.num_frames, clip.image_size, clip.image_size, 3)
    clip_BFHWC = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    key_B = torch.randint(0, 2**62, (num_clips,), generator=generator)
    label_B = torch.randint(0, config.model.num_classes or 1, (num_clips,), generator=generator)
    return clip_BFHWC.to(device), key_B.to(device), label_B.to(device)


def _loss_of(model: nn.Module, config: Experiment) -> Callable[[Batch], Tensor]:
    def loss(batch: Batch) -> Tensor:
        clip_BFHWC, key_B, label_B = batch
        output = model(clip_BFHWC, key_B)
        return output.loss if config.task == "pretrain" else F.cross_entropy(output.float(), label_B)

    return loss


def _optimizer(model: nn.Module) -> Callable[[], None]:
    """AdamW on the weights, or on float32 masters of them as mixed-precision training steps."""
    weights: list[Tensor] = list(model.parameters())
    has_masters = any(weight.dtype != torch.float32 for weight in weights)
    masters = [weight.detach().float() for weight in weights] if has_masters else weights
    adamw = torch.optim.AdamW(masters, lr=0.0, fused=True)  # takes as long as with any other lr

    @torch.no_grad()
    def step() -> None:
        if has_masters:
            for master, weight in zip(masters, weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
        adamw.step()
        if has_masters:
            torch._foreach_copy_(weights, masters)
        model.zero_grad(set_to_none=True)

    return step
