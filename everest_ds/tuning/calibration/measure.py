"""The measurements of a calibration, which all ranks take at the same time; their means are kept."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import fmean, quantiles
from typing import NamedTuple

from everest_ds.config import Experiment, load_experiment
from everest_ds.costs.memory import predict_memory
from everest_ds.data.clips import TrainingClips
from everest_ds.data.order import Visit
from everest_ds.data.synthetic import SyntheticSpec, synthesize
from everest_ds.data.video_list import Sample
from everest_ds.launch.local import available_cores
from everest_ds.parallel.collective_timing import measure_collectives
from everest_ds.parallel.world import World
from everest_ds.profiling import device_rates as rates
from everest_ds.profiling.device import HOST, free_bytes, num_threads, precisions_of
from everest_ds.profiling.step_measurement import device_name
from everest_ds.training.loop import train
from everest_ds.training.run_folder import read_metrics
from everest_ds.tuning.calibration.fit import CollectiveSample, Measurements, TrainedStep

# Clips per rank, each seen twice, and first steps that do not count, because they create optimizer states.
_STEPS, _WARM_UP = 6, 4
_CLIP_SIZES = (64, 224)
# A rank fits if its predicted peak is at most this share of its memory: in 24 configurations on a CPU, the
# real peak was at most 12 % above the prediction, with ZeRO-3 (docs/tune.md).
_USABLE_SHARE = 0.85
_CLIP_FRAMES = 16


class _Shapes(NamedTuple):
    """The measured sizes: tokens per micro-batch, widths, tokens per clip, and bytes per collective."""

    rows: Sequence[int]
    widths: Sequence[int]
    tokens: Sequence[int]
    sizes: Sequence[int]


# The widths are those of ViT-S and ViT-B on a CPU, and up to ViT-H on a GPU.
_CPU = _Shapes((16, 64, 256, 1024), (192, 384, 768), (16, 64, 256, 784), (2**12, 2**18, 2**22, 2**25))
_GPU = _Shapes(
    (256, 1024, 4096, 16384), (384, 640, 1024, 1280), (64, 160, 320, 640, 1568), (2**12, 2**20, 2**24, 2**28)
)


def measure_machine(world: World) -> Measurements:
    """Measure all rates of this machine. Call on every rank."""
    on_gpu, device = world.device.type == "cuda", world.device
    shapes, threads, precisions = _GPU if on_gpu else _CPU, num_threads(), precisions_of(device)
    with tempfile.TemporaryDirectory(prefix="everest-ds-") as own:
        folder = Path(world.share(lambda: own))
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            steps, baseline = _train_tiny(world, folder)  # first: later measurements leave memory allocated
        clips = _decode(world, folder)
    # Ranks with more threads than there are cores take turns: this is the share of time that each rank gets.
    turn = 1.0 if on_gpu else min(1.0, available_cores() / (world.local_size * threads))

    def mean(rate: float) -> float:
        return turn * fmean(world.gather(rate))

    copy, adam = mean(rates.copy_bytes_per_s(device)), mean(rates.adam_values_per_s(device))
    linear = {name: rates.linear_rates(device, name, shapes.rows, shapes.widths) for name in precisions}
    attention = {name: rates.attention_rates(device, name, shapes.tokens) for name in precisions}
    moving = {name: rates.moving_rates(device, name, shapes.rows, shapes.widths[-1:]) for name in precisions}
    return Measurements(
        device=device_name(device),
        memory_bytes=_memory_bytes(world),
        asynchronous=on_gpu,
        num_ranks=world.size,
        threads=threads,
        products={name: [(r.shape, mean(r.rate)) for r in found] for name, found in linear.items()},
        attention={
            name: [(float(r.shape[0]), mean(r.rate)) for r in found] for name, found in attention.items()
        },
        moving={name: [(float(r.shape[0]), mean(r.rate)) for r in found] for name, found in moving.items()},
        copy_bytes_per_s=copy,
        fresh_bytes_per_s=mean(rates.fresh_bytes_per_s(device)),
        adam_values_per_s=adam,
        launch_s=1 / mean(1 / rates.launch_seconds(device)),
        host_bytes_per_s=mean(rates.host_bytes_per_s(device)) if on_gpu else copy / 2,
        host_adam_values_per_s=mean(rates.adam_values_per_s(HOST)) if on_gpu else adam,
        collectives=[CollectiveSample(*row) for row in measure_collectives(world, shapes.sizes)],
        clips=[(pixels, 1 / mean(1 / seconds)) for pixels, seconds in clips],
        steps=steps,
        spare_cores=max(0.0, available_cores() / world.local_size - (1 if on_gpu else threads)),
        # The largest difference comes from the stage whose predicted buffers the tiny model fills. The other
        # stages reserve buffers that do not become resident.
        baseline_bytes=0 if on_gpu else max(baseline.values()),
    )


def _memory_bytes(world: World) -> int:
    """Return the usable memory per rank: a share of the free GPU memory, or of its part of the host."""
    if world.device.type == "cuda":
        return int(_USABLE_SHARE * free_bytes(world.device))
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(_USABLE_SHARE * host_bytes / world.local_size)


def _train_tiny(world: World, folder: Path) -> tuple[list[TrainedStep], dict[int, int]]:
    """Time the real trainer at each ZeRO stage; return also each stage's memory beyond its prediction."""
    counts, spec = {"train": _STEPS * world.size}, SyntheticSpec(num_frames=4, size=32)
    world.share(lambda: synthesize(folder, counts, spec, workers=1))
    steps, baseline = [], {}
    for stage in (0, 1, 2, 3):
        config = _tiny_config(folder, stage)
        train(config, world)
        rows = world.share(partial(read_metrics, config.run.dir))
        seconds = [(1 - row["data_wait_pct"] / 100) * world.size / row["clips_per_s"] for row in rows]
        steps.append(TrainedStep(config, world.size, quantiles(seconds[_WARM_UP:], n=4)[0]))
        baseline[stage] = rows[-1]["memory_bytes"] - predict_memory(config, world.size).peak_bytes
    return steps, baseline


def _tiny_config(folder: Path, stage: int) -> Experiment:
    return load_experiment(
        "demo_pretrain",
        [
            f"data.train={folder / 'train.txt'}",
            f"run.dir={folder / f'zero{stage}'}",
            f"parallelism.zero_stage={stage}",
            "model.num_frames=4",
            "batch.micro_batch_size=1",
            "schedule.epochs=2",
            "run.log_every_steps=1",
        ],
    )


def _decode(world: World, folder: Path) -> list[tuple[float, float]]:
    """Time how long one worker takes to read a training clip; return (pixels per clip, seconds) pairs."""
    rows = []
    for size in _CLIP_SIZES:
        spec = SyntheticSpec(num_frames=_CLIP_FRAMES, size=size)
        world.share(partial(synthesize, folder / str(size), {"train": 1}, spec, workers=1))
        config = load_experiment(
            "demo_pretrain", [f"model.image_size={size}", f"model.num_frames={_CLIP_FRAMES}"]
        )
        clips = TrainingClips([Sample(folder / str(size) / "train" / "00000.mp4", 0)], config)
        world.barrier()
        seconds = rates.best_time(partial(clips.__getitem__, Visit(0, 0)), HOST)
        rows.append((float(_CLIP_FRAMES * size**2), seconds))
    return rows
