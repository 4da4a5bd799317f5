"""Compare `everest-ds tune` with DeepSpeed's own autotuner: time to an answer, and the answer's speed.

python tools/bench_autotuner.py demo_pretrain batch.global_batch_size=32 --gpus 2 --out build/autotuner

Both get the same model, ranks and global batch. The same trainer then runs each answer for a few steps.
DeepSpeed's autotuner needs `pip install tabulate`; `everest-ds tune` needs a calibrated machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from everest_ds.cli.options import JsonFile
from everest_ds.cli.program import run_program
from everest_ds.config import Experiment, dump_experiment, load_experiment, plan_ranks
from everest_ds.console import print_table, write_json
from everest_ds.errors import UsageError
from everest_ds.parallel.ds_config import resolve_ds_config
from everest_ds.tuning.trials.one_trial import Setup, read_steps, run_here, trial_overrides
from everest_ds.units import GIB

_RANK = Path(__file__).with_name("autotuned_rank.py")
_STEPS, _PATIENCE_S = 12, 1800.0


def bench(
    source: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe that both tuners tune.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings to change.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks on this machine.")] = 2,
    trials: Annotated[int, typer.Option(min=1, help="Trials of `everest-ds tune --trials`.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each answer; the fastest counts.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the output of both tuners.")] = Path(
        "build/autotuner"
    ),
    json_file: JsonFile = None,
) -> None:
    """Time both tuners, then the config that each recommends."""
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    recipe = out / "recipe.yaml"
    config = load_experiment(source, overrides or [])
    if config.batch.global_batch_size is None:
        raise UsageError(
            "batch.global_batch_size is not set", fix="set it; both tuners must keep the same global batch"
        )
    recipe.write_text(dump_experiment(config))
    answers = [
        _ours("everest-ds tune", recipe, gpus, out / "predicted", []),
        _ours(f"everest-ds tune --trials {trials}", recipe, gpus, out / "tried", ["--trials", str(trials)]),
        _theirs(recipe, config, gpus, out / "deepspeed"),
    ]
    rows = _measured(answers, config, gpus, rounds, out)
    print_table(f"{source} on {gpus} ranks", rows)
    write_json(json_file, rows)


def _ours(name: str, recipe: Path, gpus: int, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    words = ["tune", str(recipe), "--gpus", str(gpus), "--out", str(folder), *options]
    seconds = _timed([sys.executable, "-m", "everest_ds", *words], folder, dict(os.environ))
    winner = load_experiment(folder / "winner.yaml")
    return _answer(name, seconds, winner, folder / "winner.yaml", _trials_of(folder))


def _theirs(recipe: Path, config: Experiment, gpus: int, folder: Path) -> dict[str, Any]:
    """Return DeepSpeed's answer, with all ZeRO stages allowed and at most the same global batch."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ds_config.json").write_text(json.dumps(_for_autotuner(config, gpus)))
    launcher = ["--autotuning", "tune", "--num_nodes", "1", "--num_gpus", str(gpus), str(_RANK), str(recipe)]
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        *launcher,
        "--deepspeed_config",
        "ds_config.json",
    ]
    seconds = _timed(command, folder, _autotuner_environment(folder, gpus))
    file = folder / "autotuning_results" / "ds_config_optimal.json"
    if not file.is_file():
        raise UsageError("DeepSpeed's autotuner found no config", given=f"output in {folder}/output.txt")
    found = json.loads(file.read_text())
    micro, accumulated = found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]
    settings = [
        f"parallelism.zero_stage={found['zero_optimization']['stage']}",
        f"batch.micro_batch_size={micro}",
        f"batch.grad_accum_steps={accumulated}",
        f"batch.global_batch_size={micro * accumulated * gpus}",
    ]
    answer = load_experiment(recipe, settings)
    (folder / "answer.yaml").write_text(dump_experiment(answer))
    experiments = len(list((folder / "autotuning_exps").glob("*.json")))
    return _answer("DeepSpeed's autotuner", seconds, answer, folder / "answer.yaml", experiments)


def _for_autotuner(config: Experiment, gpus: int) -> dict[str, Any]:
    """Return our DeepSpeed config without the settings that the autotuner is to find."""
    resolved = resolve_ds_config(config, gpus)
    kept = {key: value for key, value in resolved.items() if not key.startswith(("train_", "gradient_acc"))}
    tuning = {"enabled": True, "max_train_batch_size": config.batch.global_batch_size}
    return kept | {
        "zero_optimization": {"stage": "all"},
        "gradient_accumulation_steps": 1,
        "autotuning": tuning,
    }


def _autotuner_environment(folder: Path, gpus: int) -> dict[str, str]:
    """Return an environment with `deepspeed` on the PATH and a harmless `pdsh`.

    The autotuner calls `pdsh ... pkill -f NAME` after each experiment, although the experiment has ended.
    """
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "pdsh").write_text("#!/bin/sh\nexit 0\n")
    (programs / "pdsh").chmod(0o755)
    path = os.pathsep.join((str(programs), str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**os.environ, "PATH": path, "LOCAL_SIZE": str(gpus)}


def _timed(command: Sequence[str], folder: Path, environment: dict[str, str]) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    file = folder / "output.txt"
    with open(file, "wb") as output:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output)
    if done.returncode:
        said = file.read_text(errors="replace").strip().splitlines()
        raise UsageError(f"{file}: exit code {done.returncode}", given=said[-1] if said else "no output")
    return time.perf_counter() - began


def _answer(name: str, seconds: float, config: Experiment, file: Path, experiments: int) -> dict[str, Any]:
    spread, micro = config.parallelism, config.batch.micro_batch_size
    parts = (f"ZeRO-{spread.zero_stage}", f"tensor {spread.tensor}", f"micro-batch {micro}")
    return {
        "tuner": name,
        "seconds": round(seconds, 1),
        "short runs": experiments,
        "answer": ", ".join((*parts, f"recompute {config.recompute.mode}")),
        "file": str(file),
    }


def _measured(
    answers: Sequence[dict[str, Any]], config: Experiment, gpus: int, rounds: int, out: Path
) -> list[dict[str, Any]]:
    """Train each answer in turn, and return a row with the fastest round of each; equal answers run once."""
    clips = {one["answer"]: _clips(one["file"], gpus) for one in answers}
    files = {one["answer"]: one["file"] for one in answers}
    runs: dict[str, list[dict[str, Any]]] = {answer: [] for answer in files}
    for again in range(rounds):
        for number, (answer, file) in enumerate(files.items()):
            setup = Setup(config.task, file, (), gpus, out, _STEPS, _PATIENCE_S)
            overrides = trial_overrides(setup, load_experiment(file))
            runs[answer].append(_run(setup, overrides, out / f"run-{number}-{again}", clips[answer]))
    rows = []
    for one in answers:
        best = min(runs[one["answer"]], key=lambda run: run["step_s"])
        rows.append(
            {
                **{name: value for name, value in one.items() if name != "file"},
                "clips": clips[one["answer"]],
                "step s": best["step_s"],
                "clips/s": clips[one["answer"]] / best["step_s"],
                "memory GiB": best["peak_bytes"] / GIB,
            }
        )
    return rows


def _clips(file: str, gpus: int) -> int:
    return plan_ranks(load_experiment(file), gpus).global_batch_size


def _run(setup: Setup, overrides: Sequence[str], run: Path, clips: int) -> dict[str, Any]:
    ending = run_here(setup, overrides, run)
    if ending.outcome != "measured":
        raise UsageError(f"{run.name}: {ending.outcome}", given=ending.reason)
    return read_steps(run, clips)


def _trials_of(folder: Path) -> int:
    file = folder / "trials.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


if __name__ == "__main__":
    run_program(bench)
