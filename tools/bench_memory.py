"""Benchmark of each rank's host memory: while a run is set up, between steps, and at the peak of a step."""

from __future__ import annotations

import ctypes
import gc
import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from everest_ds.cli.program import run_program
from everest_ds.config import Experiment, load_experiment, plan_ranks
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.console import print_facts, print_table, write_json
from everest_ds.costs.memory import predict_memory
from everest_ds.data.clip_batches import ClipBatch
from everest_ds.host_memory import resident_bytes
from everest_ds.launch.environment import detect_environment
from everest_ds.models.initial_weights import draw_initial_weights, outline
from everest_ds.parallel.ds_config import resolve_ds_config
from everest_ds.parallel.engine import Engine, build_engine
from everest_ds.parallel.mesh import Mesh, form_mesh
from everest_ds.parallel.world import World, join_world, leave_world
from everest_ds.profiling.allocations import measure_resident_peak
from everest_ds.training.optimization import build_objective, parameter_groups

MIB = 2**20
WARM_UP_STEPS = 2  # the first step creates the optimiser's states
_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES = -3, 2**18  # mallopt(3)


def set_up(config: Experiment, mesh: Mesh) -> Engine:
    """Build the engine of a run from random weights."""
    model, ds_config = outline(config), resolve_ds_config(config, mesh.world.size)
    groups = parameter_groups(model, config.optimizer)
    return build_engine(model, groups, config, ds_config, mesh, weights=lambda: draw_initial_weights(config))


def random_clips(config: Experiment, size: int, share: int) -> ClipBatch:
    """Return a micro-batch of noise for the data-parallel rank `share`; every rank gets other clips."""
    g, generator = config.candidate_geometry, torch.Generator().manual_seed(share)
    shape = (size, g.num_frames, g.image_size, g.image_size, 3)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    ids = torch.arange(size) + size * share
    return ClipBatch(clip, ids % (config.model.num_classes or 1), ids, ids)


def measure(config: Experiment, mesh: Mesh) -> dict[str, Any]:
    """Measure this rank's memory in MiB above the process's memory before the model was built."""
    world = mesh.world
    load_libraries(config, world)
    plan, objective, engines = plan_ranks(config, world.size), build_objective(config), list[Engine]()
    batch = random_clips(config, plan.micro_batch_size, mesh.share)

    def step() -> None:
        for _ in range(plan.grad_accum_steps):
            engines[0].backward(objective(engines[0], batch))
            engines[0].step()

    base_bytes = settled_bytes()
    set_up_peak = measure_resident_peak(lambda: engines.append(set_up(config, mesh)))
    for _ in range(WARM_UP_STEPS):
        step()
    between_bytes = settled_bytes()
    step_peak = measure_resident_peak(step)
    engines[0].destroy()
    peak, predicted = step_peak.peak_bytes - base_bytes, predict_memory(config, world.size).peak_bytes
    return {
        "set_up_mib": (set_up_peak.peak_bytes - base_bytes) / MIB,
        "between_steps_mib": (between_bytes - base_bytes) / MIB,
        "step_peak_mib": peak / MIB,
        "predicted_peak_mib": predicted / MIB,
        "predicted_error_pct": 100 * (predicted / peak - 1),
    }


def load_libraries(config: Experiment, world: World) -> None:
    """Run one step of a tiny model, so that imports of the first step do not count as model memory."""
    tiny = Experiment.model_validate(
        {
            "task": "pretrain",
            "model": {"backbone": "vit_tiny"},
            "batch": {"micro_batch_size": 1},
            "precision": config.precision,
            "parallelism": {"zero_stage": config.parallelism.zero_stage},
        }
    )
    mesh = form_mesh(world, MeshShape.of(tiny, world.size))
    engine = set_up(tiny, mesh)
    engine.backward(build_objective(tiny)(engine, random_clips(tiny, 1, 0)))
    engine.step()
    engine.destroy()


def give_back_what_is_freed() -> None:
    """Make glibc return freed memory at once, so that resident memory is that of live tensors.

    By default, glibc allocates tensors of up to 32 MiB on its heap and keeps the freed ones, which can take
    up to a third more memory.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


def settled_bytes() -> int:
    """Return the resident bytes after garbage collection, once the heap has returned its free memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def main(
    experiment: Annotated[str, typer.Argument(help="Recipe name, YAML file or run folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value ...")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write facts and rows to this file.")
    ] = None,
) -> None:
    r"""Measure the host memory of every rank on CPUs.

    A launcher such as torchrun starts one process per rank:

        torchrun --nproc-per-node 2 -- tools/bench_memory.py k400_pretrain_vit_base \
            model.backbone=vit_large batch.micro_batch_size=1 batch.global_batch_size=null \
            precision=fp32 parallelism.zero_stage=3
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # only host memory is measured
    give_back_what_is_freed()
    config = load_experiment(experiment, overrides or [])
    os.environ.update(detect_environment().as_variables())
    world = join_world()
    rows = world.gather(measure(config, form_mesh(world, MeshShape.of(config, world.size))))
    leave_world()
    if world.is_main:
        spread = config.parallelism
        facts = {
            "model": f"{config.task} {config.model.backbone}, {config.precision}",
            "batch": f"{config.batch.micro_batch_size} clips, {config.token_counts}",
            "mesh": f"ZeRO-{spread.zero_stage}, tensor {spread.tensor}, {world.size} ranks",
            "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "fairscale")),
        }
        print_facts("Resident memory of each rank, measured", facts)
        print_table("", [{"rank": rank, **row} for rank, row in enumerate(rows)])
        write_json(json_file, {"facts": facts, "rows": rows})


if __name__ == "__main__":
    run_program(main)
