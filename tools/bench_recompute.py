"""Benchmark of the time and memory of every recompute mode, with and without offload, on one device."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from everest_ds.cli.program import run_program
from everest_ds.config import Experiment, load_experiment
from everest_ds.config.schema import RecomputeConfig
from everest_ds.console import print_facts, print_table, write_json
from everest_ds.data.clip_batches import ClipBatch
from everest_ds.launch.environment import detect_environment
from everest_ds.models import build_model
from everest_ds.parallel.engine import check_precision
from everest_ds.parallel.recompute import apply_recompute
from everest_ds.parallel.world import join_world, leave_world
from everest_ds.profiling.allocations import track_allocations
from everest_ds.training.optimization import build_objective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cases(every: int) -> list[RecomputeConfig]:
    """Return the cases to compare: `none` and `gelu`, then every other mode without and with offload."""
    modes = [
        ("none", False),
        ("gelu", False),
        *product(("attention", "mlp", "blocks", "full"), (False, True)),
    ]
    return [RecomputeConfig(mode=mode, every=every, offload_to_cpu=offload) for mode, offload in modes]


def training_step(model: nn.Module, config: Experiment, device: torch.device) -> Callable[[], None]:
    """Return a function that runs a micro-batch of random pixels forward and backward.

    Gradients stay allocated between calls.
    """
    g, size = config.candidate_geometry, config.batch.micro_batch_size
    clip = torch.randint(0, 256, (size, g.num_frames, g.image_size, g.image_size, 3), dtype=torch.uint8)
    ids = torch.arange(size)
    batch = ClipBatch(clip, ids % (config.model.num_classes or 1), ids, ids).to(device)
    objective = build_objective(config)

    def step() -> None:
        model.zero_grad(set_to_none=False)
        objective(model, batch).backward()

    return step


def time_step(step: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of one step, including the device's work."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def bench(config: Experiment, every: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Measure one row per case.

    Every round runs all cases in turn, so that slow phases of the machine affect all of them alike.
    """
    torch.manual_seed(0)
    model = build_model(config).to(device, DTYPES[config.precision]).train()
    step, candidates = training_step(model, config, device), cases(every)
    seconds: list[list[float]] = [[] for _ in candidates]
    for turn in range(rounds + 1):
        for case, times in list(zip(candidates, seconds, strict=True))[:: -1 if turn % 2 else 1]:
            apply_recompute(model, case)
            times.append(time_step(step, device))
    rows, expected = [], list[Tensor]()
    for case, times in zip(candidates, seconds, strict=True):
        apply_recompute(model, case)
        peak_mib = track_allocations(step, device).peak_bytes / 2**20
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        expected = expected or gradients
        difference = max(float((a - b).abs().max()) for a, b in zip(gradients, expected, strict=True))
        facts = {
            "recompute": case.mode + f" (every {case.every})" * (case.mode == "blocks"),
            "offload": "host" if case.offload_to_cpu else "-",
            "peak_mib": peak_mib,
            "gradients": f"differ by {difference:.1e}" if difference else "equal",
        }
        rows.append(facts | compare_times(times[1:], seconds[0][1:]))  # the first round warms up
    return rows


def compare_times(seconds: list[float], base: list[float]) -> dict[str, Any]:
    """Return the time of the fastest step, and the ratios to the step of `none` in the same round."""
    ratios = [mine / none for mine, none in zip(seconds, base, strict=True)]
    return {
        "min_ms": min(seconds) * 1e3,
        "time_ratio_median": statistics.median(ratios),
        "time_ratio_of_minima": min(seconds) / min(base),
        "time_ratio_spread": f"{min(ratios):.2f}..{max(ratios):.2f}",
    }


def _facts(config: Experiment, device: torch.device) -> dict[str, Any]:
    gpu = device.type == "cuda"
    return {
        "model": f"{config.task} {config.model.backbone}, {config.model.attention} attention",
        "batch": f"{config.batch.micro_batch_size} clips, {config.token_counts}, {config.precision}",
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads",
        "load": "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg()),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "fairscale")),
        "offload": "to host memory"
        if gpu
        else "to the same memory on a CPU: it costs time and saves no memory",
    }


def main(
    experiment: Annotated[str, typer.Argument(help="Recipe name, YAML file or run folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value ...")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of timed rounds, after one warm-up round.")] = 5,
    every: Annotated[int, typer.Option(min=2, help="Mode `blocks`: recompute one of every n blocks.")] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write facts and rows to this file.")
    ] = None,
) -> None:
    """Measure time and peak memory of every recompute mode, with and without offload, relative to none.

    The experiment sets phase, backbone, clip size, batch and precision; overrides change them:

        python tools/bench_recompute.py k400_pretrain_vit_base batch.micro_batch_size=2 precision=fp32

    Peak memory is the memory that a step allocates beyond weights and gradients: the caching allocator's
    figure on a GPU, the sum of tracked allocations on a CPU. Gradients are compared with those of mode none;
    on a GPU some kernels are not deterministic.
    """
    config = load_experiment(experiment, overrides or [])
    os.environ.update(detect_environment().as_variables())
    world = join_world()
    check_precision(config, world)
    rows = bench(config, every, rounds, world.device)
    facts = _facts(config, world.device)
    leave_world()
    print_facts(f"Forward and backward of one micro-batch, {rounds} rounds, measured", facts)
    print_table("", rows)
    write_json(json_file, {"facts": facts, "rows": rows})


if __name__ == "__main__":
    run_program(main)
