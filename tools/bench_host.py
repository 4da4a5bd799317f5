"""Count and time, on a CPU, the work of a GPU's host in a training step, by phase.

The model has the real depth and number of tensors and a tiny width, so that an operator costs a CPU about
as much as its launch costs a GPU's host: 2 to 5 microseconds. A GPU runs equally many operators, except those
that depend on the device: attention in bf16 is one operator on a GPU and several on a CPU.

The script can also measure an older checkout, back to the commit that added the script:

    git worktree add ../before $(git log --diff-filter=A --format=%h -- tools/bench_host.py)
    PYTHONPATH=../before python tools/bench_host.py --json before.json
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import torch
import typer

from everest_ds.cli.options import JsonFile
from everest_ds.cli.program import run_program
from everest_ds.config import Experiment
from everest_ds.config.backbones import BACKBONES, Backbone, TransformerShape
from everest_ds.console import print_facts, print_table, write_json
from everest_ds.errors import UsageError, nearest
from everest_ds.parallel.world import World
from everest_ds.parallel.world_of_one import world_of_one
from everest_ds.profiling.launches import count_launches
from everest_ds.training.engine_step import EngineStep, MeasuredStep
from everest_ds.training.plain_step import PlainStep
from everest_ds.training.run_folder import describe_environment

_WIDTHS = {"encoder": 64, "decoder": 32}
_PHASES = ("forward", "backward", "update")
_WARM_UP = 4  # the first step imports modules and creates the optimiser's states


class Case(NamedTuple):
    """A training step to measure; ZeRO stage None is the plain loop without DeepSpeed."""

    backbone: str = "vit_large"
    task: str = "pretrain"
    stage: int | None = 2
    precision: str = "bf16"
    recompute: str = "none"
    accumulation: int = 1

    @property
    def config(self) -> Experiment:
        """Return the config: two clips of 16 frames of 32x32, with the recipes' drop path and layer decay."""
        fine_tuning = self.task == "finetune"
        model: dict[str, Any] = {"backbone": self.backbone, "image_size": 32, "patch_size": 8}
        if fine_tuning:
            model |= {"num_classes": 10, "drop_path": 0.1}
        tree = {
            "task": self.task,
            "model": model,
            "tokens": {"keep_ratio": 0.6 if fine_tuning else 0.3},
            "loss": {"label_smoothing": 0.1 if fine_tuning else 0.0},
            "optimizer": {"layer_decay": 0.75 if fine_tuning else 1.0},
            "batch": {"micro_batch_size": 2, "grad_accum_steps": self.accumulation},
            "precision": self.precision,
            "recompute": {"mode": self.recompute},
            "parallelism": {"zero_stage": 2 if self.stage is None else self.stage},
        }
        return Experiment.model_validate(tree)


CASES = {
    "l_pretrain": Case(),
    "l_pretrain_plain": Case(stage=None),
    "l_pretrain_zero1": Case(stage=1),
    "l_pretrain_zero3": Case(stage=3),
    "l_pretrain_fp32": Case(precision="fp32"),
    "l_pretrain_zero0_fp32": Case(stage=0, precision="fp32"),
    "l_pretrain_accumulate4": Case(accumulation=4),
    "l_pretrain_recompute": Case(recompute="full"),
    "l_finetune": Case(task="finetune"),
    "l_finetune_plain": Case(task="finetune", stage=None),
    "l_finetune_zero3": Case(task="finetune", stage=3),
    "b_pretrain": Case("vit_base"),
    "b_pretrain_plain": Case("vit_base", stage=None),
    "b_finetune": Case("vit_base", "finetune"),
}


def bench(
    cases: Annotated[
        list[str] | None, typer.Argument(help=f"Cases to measure. Default: {', '.join(CASES)}.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Timed steps per case.")] = 11,
    json_file: JsonFile = None,
) -> None:
    """Count operators and host waits of a step by phase, and time them on one thread of a CPU.

    `waits` counts reads of a tensor's value by the host and DeepSpeed's device-wide synchronisations, except
    those that DeepSpeed omits on CPUs (one after the backward pass with `overlap_comm`). Milliseconds are the
    median and the fastest of the timed steps; they are reliable on an idle machine only.

    Example: python tools/bench_host.py l_pretrain l_pretrain_plain --json after.json
    """
    if unknown := [name for name in cases or [] if name not in CASES]:
        raise UsageError("unknown case", given=unknown[0], allowed=nearest(unknown[0], CASES))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    for name, backbone in BACKBONES.items():
        BACKBONES[name] = Backbone(_narrow(backbone.encoder, "encoder"), _narrow(backbone.decoder, "decoder"))
    git = describe_environment(world_size=1)["git"]
    facts = {"torch": torch.__version__, "commit": git and git["commit"][:12], "steps": steps}
    with world_of_one() as world:
        rows = [row for name in cases or CASES for row in measure(name, CASES[name], world, steps)]
    print_facts("Host work of a training step, by phase", facts)
    print_table("Forward / backward / update (measured on a CPU, one thread)", _by_case(rows))
    write_json(json_file, {"facts": facts, "rows": rows})


def _narrow(shape: TransformerShape, stack: str) -> TransformerShape:
    return replace(shape, width=_WIDTHS[stack], heads=4)


def measure(name: str, case: Case, world: World, steps: int) -> list[dict[str, Any]]:
    """Return a row for each phase of a step, and a row for the whole step."""
    with _build(case, world) as step:
        for _ in range(_WARM_UP):
            _run(step, lambda _, act: act())
        seconds = [_timed(step) for _ in range(steps)]
        launches, waits = _counted(step)
    rows = [
        {
            "case": name,
            "phase": phase,
            "operators": launches[phase],
            "waits": waits[phase],
            "ms_median": 1e3 * statistics.median(each[phase] for each in seconds),
            "ms_fastest": 1e3 * min(each[phase] for each in seconds),
        }
        for phase in _PHASES
    ]
    whole = [sum(each.values()) for each in seconds]
    sums = {"operators": sum(launches.values()), "waits": sum(waits.values())}
    times = {"ms_median": 1e3 * statistics.median(whole), "ms_fastest": 1e3 * min(whole)}
    return [*rows, {"case": name, "phase": "step", **sums, **times}]


def _by_case(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the rows of each case into one row, with the three phases in every cell."""
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    return [
        {
            "case": name,
            "operators": _cells(row["operators"] for row in phases),
            "waits": _cells(row["waits"] for row in phases),
            "ms_median": _cells(f"{row['ms_median']:.1f}" for row in phases),
            "ms_fastest": _cells(f"{row['ms_fastest']:.1f}" for row in phases),
            "step_ms": step["ms_median"],
        }
        for name, (*phases, step) in by_case.items()
    ]


def _cells(values: Iterable[object]) -> str:
    return " / ".join(map(str, values))


@contextmanager
def _build(case: Case, world: World) -> Iterator[MeasuredStep]:
    if case.stage is None:
        yield PlainStep(case.config, world.device)
        return
    with EngineStep(case.config, world) as step:
        yield step


def _run(step: MeasuredStep, run: Callable[[str, Callable[[], object]], object]) -> None:
    """Run a step; `run` executes each phase of each micro-batch."""
    losses: list[torch.Tensor] = []
    for _ in range(step.micro_batches):
        batch = step.prepare(step.load())
        run("forward", lambda: losses.append(step.loss(batch)))  # noqa: B023
        run("backward", lambda: step.backward(losses.pop()))
        run("update", step.update)


def _timed(step: MeasuredStep) -> dict[str, float]:
    """Run a step and return the seconds by phase."""
    seconds = dict.fromkeys(_PHASES, 0.0)

    def run(phase: str, act: Callable[[], object]) -> None:
        started = time.perf_counter()
        act()
        seconds[phase] += time.perf_counter() - started

    _run(step, run)
    return seconds


def _counted(step: MeasuredStep) -> tuple[dict[str, int], dict[str, int]]:
    """Run a step and return its operators and waits by phase."""
    launches, waits = dict.fromkeys(_PHASES, 0), dict.fromkeys(_PHASES, 0)

    def run(phase: str, act: Callable[[], object]) -> None:
        with _synchronisations() as found:
            counter = count_launches(act)
        launches[phase] += counter.total
        waits[phase] += counter.waits + len(found)

    _run(step, run)
    return launches, waits


@contextmanager
def _synchronisations() -> Iterator[list[None]]:
    """Record DeepSpeed's device-wide synchronisations, which do nothing on a CPU."""
    from deepspeed.accelerator import get_accelerator

    accelerator, found = get_accelerator(), list[None]()
    accelerator.synchronize = lambda *_: found.append(None)
    try:
        yield found
    finally:
        del accelerator.synchronize  # restores the method of the class


if __name__ == "__main__":
    run_program(bench)
