"""Measured training steps of an experiment: their time and their share of the device's peak rate."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from everest_ds.config.schema import Experiment
from everest_ds.costs.compute import FLOPS_PER_MAC, predict_macs
from everest_ds.costs.hardware.gpus import peak_flops_per_s
from everest_ds.profiling.step_phases import PhaseTimes, TrainingStep, measure_phases

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class StepMeasurement:
    """A measured training step of one experiment, with the device and software it was measured on.

    Attributes:
        times: seconds by phase.
        batch_size: clips per step, over all its micro-batches.
        repeats: number of measured steps.
        useful_flops: floating-point operations per step that the masked model needs, without recomputation.
        peak_flops_per_s: peak rate of the device in `dtype`; None if unknown.
        device: name that the device's driver reports.
        dtype: `fp32`, `tf32` (float32 weights, tensor cores), `fp16` or `bf16`.
        torch_version: version of PyTorch.
        commit: commit of this project; None outside a checkout.
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
        """Clips per second, without data wait."""
        return self.batch_size / self.times.step.median_s

    @property
    def flops_per_s(self) -> float:
        """Useful floating-point operations per second."""
        return self.useful_flops / self.times.step.median_s

    @property
    def mfu_pct(self) -> float | None:
        """Model FLOPs utilisation (PaLM, 2022, appendix B): useful over peak rate, in percent, or None."""
        return None if self.peak_flops_per_s is None else 100 * self.flops_per_s / self.peak_flops_per_s

    def epoch_s(self, num_clips: int, num_ranks: int = 1) -> float:
        """Return the seconds of an epoch at this step's speed, without data wait and communication."""
        return num_clips / (num_ranks * self.clips_per_s)


def measure_step(
    step: TrainingStep,
    config: Experiment,
    device: torch.device,
    *,
    commit: str | None,
    warmup: int = 3,
    repeats: int = 10,
) -> StepMeasurement:
    """Measure training steps of an experiment on one device.

    Useful FLOPs come from the closed formula for the masked model, so recomputation adds time but no work.

    Args:
        step: phases of the step, with micro-batches of `config.batch.micro_batch_size` clips.
        config: the experiment.
        device: the device that runs the step.
        commit: commit of the running code.
        warmup: number of steps before the measured ones, to fill caches, finish autotuning and create the
            optimiser's states.
        repeats: number of measured steps.
    """
    times = measure_phases(step, device, warmup=warmup, repeats=repeats)
    name, dtype = device_name(device), compute_dtype(config.precision, device)
    batch_size = step.micro_batches * config.batch.micro_batch_size
    return StepMeasurement(
        times=times,
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
    """Return the device's name as the driver reports it, or the processor's name for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def compute_dtype(precision: str, device: torch.device) -> str:
    """Return the key of the device's rate: `precision`, or `tf32` where float32 products use tensor cores."""
    tensor_cores = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if precision == "fp32" and tensor_cores else precision
