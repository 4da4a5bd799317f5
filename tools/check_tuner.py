"""Print the errors of the tuner's predictions, against measured steps of the real trainer on this machine.

    MALLOC_MMAP_THRESHOLD_=262144 python tools/check_tuner.py --json tuner.json

The script calibrates, then runs a few steps of each configuration, pre-training and fine-tuning, over ZeRO
stages, tensor degrees, micro-batches, recompute modes, keep ratios and precisions: 24 with small clips on 1,
2 and 4 CPU ranks, or 12 with full-size clips on one GPU. The predictions are not corrected by trials. The
variable limits a CPU rank's resident memory to that of live tensors.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from everest_ds.cli.program import run_program
from everest_ds.config import Experiment, load_experiment, plan_ranks
from everest_ds.console import print_facts, print_table, write_json
from everest_ds.costs.memory import predict_memory
from everest_ds.costs.step_time import predict_step
from everest_ds.errors import EverestError
from everest_ds.profiling.device import num_gpus
from everest_ds.tuning.calibration.local_machine import facts_here
from everest_ds.tuning.cluster import cluster_here
from everest_ds.tuning.trials.correction import kendall_tau
from everest_ds.tuning.trials.one_trial import Setup, read_steps, run_here, trial_overrides

MIB = 2**20
COMMON = ("data.frame_stride=1", "batch.global_batch_size=null")
ON_CPU = (*COMMON, "model.num_frames=8", "data.num_workers=1")
ON_GPU = (*COMMON, "data.num_workers=8")
RECIPES = {"pretrain": "k400_pretrain_vit_base", "finetune": "k400_finetune_vit_base"}
SHORT = {
    "b": "model.backbone=vit_{}",
    "px": "model.image_size={}",
    "micro": "batch.micro_batch_size={}",
    "accum": "batch.grad_accum_steps={}",
    "zero": "parallelism.zero_stage={}",
    "tensor": "parallelism.tensor={}",
    "again": "recompute.mode={}",
    "keep": "tokens.keep_ratio={}",
    "p": "precision={}",
}
# Per line: task, ranks, settings that differ from the recipe. The first three words name its family.
CASES = """
pretrain 1 b=small px=96 micro=2 zero=0 p=fp32
pretrain 1 b=small px=96 micro=8 zero=0 p=fp32
pretrain 1 b=small px=96 micro=8 zero=1 p=bf16
pretrain 1 b=small px=96 micro=8 zero=2 again=full p=fp32
pretrain 1 b=base px=64 micro=4 zero=0 p=fp32
pretrain 1 b=base px=64 micro=4 zero=2 p=bf16
finetune 1 b=small px=96 micro=4 zero=0 p=fp32
finetune 1 b=small px=96 micro=4 zero=3 p=fp32
pretrain 2 b=small px=96 micro=4 zero=0 p=fp32
pretrain 2 b=small px=96 micro=4 zero=1 p=fp32
pretrain 2 b=small px=96 micro=4 zero=2 p=fp32
pretrain 2 b=small px=96 micro=4 zero=3 p=fp32
pretrain 2 b=small px=96 micro=8 zero=2 p=bf16
pretrain 2 b=small px=96 micro=2 accum=2 zero=2 p=fp32
pretrain 2 b=small px=112 micro=8 zero=1 keep=0.6 p=fp32
finetune 2 b=small px=96 micro=4 zero=0 p=fp32
finetune 2 b=small px=96 micro=4 zero=2 again=blocks p=fp32
finetune 2 b=small px=96 micro=8 zero=0 tensor=2 p=fp32
finetune 2 b=small px=96 micro=8 zero=1 tensor=2 again=mlp p=bf16
finetune 2 b=base px=64 micro=2 zero=2 keep=0.3 p=fp32
pretrain 4 b=small px=64 micro=4 zero=0 p=fp32
pretrain 4 b=small px=64 micro=4 zero=2 p=bf16
finetune 4 b=small px=64 micro=4 zero=1 tensor=2 p=fp32
finetune 4 b=small px=64 micro=4 zero=2 again=attention p=fp32
"""
GPU_CASES = """
pretrain 1 b=base px=224 micro=32 zero=0 p=fp32
pretrain 1 b=base px=224 micro=32 zero=1 p=bf16
pretrain 1 b=base px=224 micro=64 zero=2 p=bf16
pretrain 1 b=large px=224 micro=32 zero=1 p=bf16
pretrain 1 b=large px=224 micro=32 zero=3 p=bf16
pretrain 1 b=large px=224 micro=64 zero=2 again=full p=bf16
pretrain 1 b=huge px=224 micro=32 zero=1 again=blocks p=bf16
finetune 1 b=base px=224 micro=8 zero=1 p=bf16
finetune 1 b=base px=224 micro=16 zero=2 again=mlp p=bf16
finetune 1 b=large px=224 micro=8 zero=1 p=bf16
finetune 1 b=large px=224 micro=8 zero=3 keep=0.3 p=bf16
finetune 1 b=large px=224 micro=16 zero=2 again=full p=bf16
"""


@dataclass(frozen=True)
class Case:
    """A configuration of the error table."""

    task: str
    num_ranks: int
    overrides: tuple[str, ...]
    name: str

    @classmethod
    def parse(cls, line: str) -> Case:
        """Parse a line of CASES."""
        task, ranks, *choices = line.split()
        pairs = [choice.split("=") for choice in choices]
        return cls(task, int(ranks), tuple(SHORT[key].format(value) for key, value in pairs), line)


def calibrate(file: Path, num_ranks: int) -> float:
    """Calibrate this machine into `file` and return the seconds that it took."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "everest_ds", "tune", "--calibrate", "--nproc", str(num_ranks)]
    subprocess.run([*command, "--calibration", str(file)], check=True)
    return time.perf_counter() - began


def check(case: Case, calibration: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Predict and measure a case, and return its row."""
    config = load_experiment(RECIPES[case.task], (*_clips(), *case.overrides))
    cluster = cluster_here(case.num_ranks, calibration)
    predicted_s = predict_step(config, case.num_ranks, cluster.machine).step_s
    predicted_bytes = cluster.needed_bytes(predict_memory(config, case.num_ranks))
    measured = run(case, config, folder, steps)
    clips = plan_ranks(config, case.num_ranks).global_batch_size
    step_s, peak_bytes = measured["step_s"], measured["peak_bytes"]
    return {
        "configuration": case.name,
        "predicted_ms": 1e3 * predicted_s,
        "measured_ms": 1e3 * step_s,
        "time_error_pct": 100 * (predicted_s / step_s - 1),
        "predicted_mib": predicted_bytes / MIB,
        "measured_mib": peak_bytes / MIB,
        "memory_error_pct": 100 * (predicted_bytes / peak_bytes - 1),
        "predicted_clips_s": clips / predicted_s,
        "measured_clips_s": clips / step_s,
    }


def run(case: Case, config: Experiment, folder: Path, steps: int) -> dict[str, Any]:
    """Run a few steps of a case in the real trainer.

    Raises:
        EverestError: the run did not end with a measurement.
    """
    setup = Setup(case.task, RECIPES[case.task], _clips(), case.num_ranks, folder, steps, timeout_s=300)
    place = folder / case.name.replace(" ", "-")
    ending = run_here(setup, (*trial_overrides(setup, config), *case.overrides), place)
    if ending.outcome != "measured":
        raise EverestError(f"{case.name}: {ending.outcome}", given=ending.reason)
    return read_steps(place, plan_ranks(config, case.num_ranks).global_batch_size)


def _clips() -> tuple[str, ...]:
    return ON_GPU if num_gpus() else ON_CPU


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures by which the table is judged."""
    families = {" ".join(row["configuration"].split()[:3]) for row in rows}
    taus = kendall_tau([row["predicted_clips_s"] for row in rows], [row["measured_clips_s"] for row in rows])
    losses = [lost_pct([row for row in rows if row["configuration"].startswith(name)]) for name in families]
    memory = [row["memory_error_pct"] for row in rows]
    return {
        "configurations": len(rows),
        "median_time_error_pct": median(abs(row["time_error_pct"]) for row in rows),
        "median_memory_error_pct": median(abs(error) for error in memory),
        "memory_errors_pct": f"{min(memory):.1f} to {max(memory):.1f}",
        "kendall_tau": taus,
        "best_of_all_lost_pct": lost_pct(rows),
        "best_of_each_family_lost_pct": ", ".join(f"{loss:.1f}" for loss in sorted(losses)),
    }


def lost_pct(rows: Sequence[dict[str, Any]]) -> float:
    """Return the loss in clips per second of the predicted best against the measured best, in percent."""
    chosen = max(rows, key=lambda row: row["predicted_clips_s"])["measured_clips_s"]
    return 100 * (1 - chosen / max(row["measured_clips_s"] for row in rows))


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write facts and rows here.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration file to use; default: calibrate anew.")
    ] = None,
    steps: Annotated[int, typer.Option(min=5, help="Steps per run.")] = 9,
    only: Annotated[str, typer.Option(help="Run only configurations whose line contains this text.")] = "",
) -> None:
    """Predict each configuration, run it, and print the errors."""
    began = time.perf_counter()
    lines = (GPU_CASES if num_gpus() else CASES).strip().splitlines()
    cases = [Case.parse(line) for line in lines if only in line]
    with tempfile.TemporaryDirectory(prefix="everest-ds-") as own:
        folder = Path(own)
        file = calibration or folder / "calibration.json"
        most = max(case.num_ranks for case in cases)
        calibrating_s = 0.0 if calibration else calibrate(file, most)
        rows = []
        for number, case in enumerate(cases, 1):
            rows.append(check(case, file, folder, steps))
            told = " ".join(f"{value:.1f}" for value in list(rows[-1].values())[1:7])
            print(f"{number}/{len(cases)} {case.name}: {told}", file=sys.stderr, flush=True)
    facts = {
        **summarise(rows),
        "calibration_s": calibrating_s,
        "all_s": time.perf_counter() - began,
        **facts_here(),
        "load": os.getloadavg()[0],
    }
    print_table("", rows, key="configuration")
    print_facts("Predicted and measured", facts)
    write_json(json_file, {"facts": facts, "rows": rows})


if __name__ == "__main__":
    run_program(main)
