"""Times training steps of our model, beside the original systems' if clones of them are given.

python tools/bench_step.py pretrain --backbone vit_base --batch 2 --dtype fp32 --dtype bf16
"""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from bench_contenders import (
    Contender,
    Inputs,
    StepTime,
    draw_inputs,
    our_contender,
    peer_contenders,
    timed_step,
)
from bench_rates import measure_rates, record
from bench_report import print_report
from peers import load_peer
from pydantic import ValidationError
from torch.profiler import ProfilerActivity, profile

from everest_ds.cli.output import JsonFile, write_json
from everest_ds.cli.program import run_program
from everest_ds.config import Experiment
from everest_ds.errors import ConfigError, UsageError
from everest_ds.profiling.allocations import ResidentPeak, measure_resident_peak, track_allocations
from everest_ds.profiling.devices import peak_flops_per_s
from everest_ds.profiling.time import device_name
from everest_ds.training.run_folder import describe_environment

Task = Literal["pretrain", "finetune"]
DTYPES = ("fp32", "bf16")
NUM_CLASSES = 400  # Kinetics-400
KEEP_RATIO = {"pretrain": 0.3, "finetune": 0.6}
# glibc's mallopt(3): allocations as large as these stay in the heap and are not given back to the system.
_MALLOPT = {"M_MMAP_THRESHOLD": (-3, 2**30), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}
_PROFILE_ROWS = 20


@dataclass(frozen=True)
class Plan:
    """What to run: the experiment, the contenders and how often."""

    config: Experiment
    dtypes: list[str]
    peers: dict[str, Path]
    batch_size: int
    rounds: int
    warmup: int
    device: torch.device


Times = dict[str, list[StepTime]]


def bench(
    task: Annotated[Task, typer.Argument(help="Which phase of training.")],
    backbone: Annotated[str, typer.Option(help="vit_tiny, vit_small, vit_base, vit_large or vit_huge.")] = (
        "vit_base"
    ),
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="fp32, or bf16: bf16 weights with fp32 masters. Repeat to compare in one run."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips a step.")] = 2,
    keep_ratio: Annotated[
        float | None, typer.Option(help="Share of kept tokens; 0.3 to pre-train, 0.6 to fine-tune.")
    ] = None,
    selection: Annotated[str, typer.Option(help="tokens.selection of our model.")] = "rero",
    recompute: Annotated[str, typer.Option(help="recompute.mode of our model.")] = "none",
    attention: Annotated[str, typer.Option(help="model.attention of our model.")] = "fused",
    frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 16,
    size: Annotated[int, typer.Option(help="Height and width of a frame, pixels.")] = 224,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="everest=DIR or videomae=DIR, a clone to run beside ours."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Timed steps of each, taken in turn.")] = 7,
    warmup: Annotated[int, typer.Option(min=1, help="Steps of each before those.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's own.")] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Default: cuda where there is one.")
    ] = None,
    rates: Annotated[bool, typer.Option(help="Time the step's matrix products alone, as its limit.")] = True,
    profile_step: Annotated[
        bool,
        typer.Option(
            "--profile", help="Also print where a step of ours, in the last dtype, spends its time."
        ),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Time training steps: forward, backward, optimiser; memory; how far from the machine's own rates.

    All contenders run in one process on the same clips, one step each in turn, so that a busy machine hurts
    them alike: trust the ratios and their quartiles more than the times. Peers run as their authors do, with
    float32 weights, autocast for bf16 (fp16 on CUDA) and torch's AdamW as it comes; `without_optimizer` is
    the ratio of forward and backward alone. The peak of the activations is what those allocate, autocast's
    copies of the weights included.

    Example: python tools/bench_step.py finetune --peer videomae=../VideoMAE --dtype fp32 --json step.json
    """
    heap = _keep_heap_warm()
    if threads is not None:
        torch.set_num_threads(threads)
    model = {"backbone": backbone, "attention": attention, "num_frames": frames, "image_size": size}
    tokens = {"selection": selection, "keep_ratio": keep_ratio or KEEP_RATIO[task]}
    config = _experiment(task, model, tokens, recompute)
    dtypes, peers = _dtypes(dtype or ["fp32"]), _peers(peer or [])
    plan = Plan(config, dtypes, peers, batch, rounds, warmup, _device(device))
    result = {"environment": _environment(plan, heap), **run(plan, rates, profile_step)}
    write_json(json_file, result)
    print_report(result)


def run(plan: Plan, rates: bool, profile_step: bool) -> dict[str, Any]:
    """Everything that is measured, ready for JSON."""
    inputs = draw_inputs(plan.config, plan.batch_size, plan.device)
    contenders = _contenders(plan, inputs)
    for _ in range(plan.warmup):
        for contender in contenders:
            timed_step(contender, plan.device)
    times: Times = {contender.label: [] for contender in contenders}
    resident = _resident_peak(lambda: _take_turns(plan, contenders, times))
    ours = [contender for contender in contenders if contender.macs is not None]
    return {
        "contenders": [_summary(contender, times[contender.label], plan) for contender in contenders],
        "ratios": _ratios(contenders, times),
        "resident_peak_bytes": resident and resident.peak_bytes,
        "rates": [_rates(contender, times[contender.label], plan) for contender in ours] if rates else [],
        "profile": _profile(ours[-1], plan.device) if profile_step else [],
        "steps": {label: [asdict(step) for step in steps] for label, steps in times.items()},
    }


def _contenders(plan: Plan, inputs: Inputs) -> list[Contender]:
    contenders = [our_contender(plan.config, dtype, inputs) for dtype in plan.dtypes]
    for name, folder in plan.peers.items():
        contenders += peer_contenders(load_peer(name, folder, plan.config), plan.dtypes, inputs)
    return contenders


def _take_turns(plan: Plan, contenders: list[Contender], times: Times) -> None:
    for _ in range(plan.rounds):
        for contender in contenders:
            times[contender.label].append(timed_step(contender, plan.device))


def _resident_peak(call: Callable[[], None]) -> ResidentPeak | None:
    if sys.platform.startswith("linux"):
        return measure_resident_peak(call)
    call()
    return None


def _summary(contender: Contender, steps: list[StepTime], plan: Plan) -> dict[str, Any]:
    tracked = track_allocations(lambda: contender.backward(contender.loss()), plan.device)
    contender.optimizer.zero_grad(set_to_none=False)
    step_s = statistics.median(step.step_s for step in steps)
    user_s = statistics.median(step.user_cpu_s for step in steps)
    gflops = None if contender.macs is None else 2 * contender.macs / step_s / 1e9
    peak = peak_flops_per_s(device_name(plan.device), "bf16") if contender.dtype == "bf16" else None
    return {
        "contender": contender.label,
        "forward_ms": 1e3 * statistics.median(step.forward_s for step in steps),
        "backward_ms": 1e3 * statistics.median(step.backward_s for step in steps),
        "optimizer_ms": 1e3 * statistics.median(step.optimizer_s for step in steps),
        "step_ms": 1e3 * step_s,
        "fastest_step_ms": 1e3 * min(step.step_s for step in steps),
        "clips_per_s": plan.batch_size / step_s,
        "user_cpu_s": user_s,
        "busy_cores": user_s / step_s,
        "activations_peak_bytes": tracked.peak_bytes,
        "states_bytes": contender.state_bytes(),
        "gmacs_per_step": contender.macs and contender.macs / 1e9,
        "gflop_per_s": gflops,
        "mfu_pct": 100 * gflops * 1e9 / peak if gflops and peak else None,
    }


def _ratios(contenders: list[Contender], times: Times) -> list[dict[str, Any]]:
    """Each contender over ours in the same dtype; our other dtypes over our last one."""
    ours = {contender.dtype: contender for contender in contenders if contender.macs is not None}
    last = list(ours.values())[-1]
    rows = []
    for contender in contenders:
        base = last if contender.macs is not None else ours[contender.dtype]
        if contender is not base:
            rows.append(_ratio(contender.label, base.label, times))
    return rows


def _ratio(label: str, base: str, times: Times) -> dict[str, Any]:
    ours, theirs = ([step.step_s for step in times[name]] for name in (base, label))
    models = ([step.forward_s + step.backward_s for step in times[name]] for name in (base, label))
    base_model, model = (statistics.median(values) for values in models)
    per_round = [b / a for a, b in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(per_round, n=4, method="inclusive")
    return {
        "step time": f"{label} / {base}",
        "of_medians": statistics.median(theirs) / statistics.median(ours),
        "of_fastest": min(theirs) / min(ours),
        "quartile_1": low,
        "quartile_3": high,
        "without_optimizer": model / base_model,
    }


def _rates(contender: Contender, steps: list[StepTime], plan: Plan) -> dict[str, Any]:
    recorder = record(lambda: contender.backward(contender.loss()))
    contender.optimizer.zero_grad(set_to_none=False)
    measured = measure_rates(recorder, plan.device)
    fastest, macs = min(step.step_s for step in steps), contender.macs or 0
    gflops = 2 * macs / fastest / 1e9
    return {
        "contender": contender.label,
        "fastest_step_ms": 1e3 * fastest,
        "step_gflop_per_s": gflops,
        "limit_ms": 1e3 * measured.products.seconds,
        "products_gflop_per_s": measured.products.gflops,
        "step_rate_pct_of_products": 100 * gflops / measured.products.gflops,
        "attention_ms": 1e3 * measured.attention.seconds,
        "attention_gflop_per_s": measured.attention.gflops,
        "products_gmacs": recorder.product_macs / 1e9,
        "attention_gmacs": recorder.attention_macs / 1e9,
        "predicted_gmacs": macs / 1e9,
        "products": measured.rows,
    }


def _profile(contender: Contender, device: torch.device) -> list[dict[str, Any]]:
    """The operators in which a step spends most time itself: on the GPU where there is one."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        timed_step(contender, device)
    events = recorded.key_averages()

    def own_ms(event: Any) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3

    total = sum(own_ms(event) for event in events)
    return [
        {"operator": e.key, "calls": e.count, "own_ms": own_ms(e), "share_pct": 100 * own_ms(e) / total}
        for e in sorted(events, key=own_ms, reverse=True)[:_PROFILE_ROWS]
    ]


def _experiment(task: str, model: dict[str, Any], tokens: dict[str, Any], recompute: str) -> Experiment:
    if task == "finetune":
        model = {**model, "num_classes": NUM_CLASSES}
    tree = {"task": task, "model": model, "tokens": tokens, "recompute": {"mode": recompute}}
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{key}: {reason}" if key else reason) from None


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here", allowed="cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _dtypes(names: list[str]) -> list[str]:
    if wrong := [name for name in names if name not in DTYPES]:
        raise UsageError("--dtype is unknown", given=wrong[0], allowed=", ".join(DTYPES))
    return list(dict.fromkeys(names))


def _peers(texts: list[str]) -> dict[str, Path]:
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (_, _, folder) in zip(texts, pairs, strict=True) if not folder]:
        raise UsageError("--peer names no folder", given=wrong[0], allowed="everest=DIR, videomae=DIR")
    return {name: Path(folder) for name, _, folder in pairs}


def _environment(plan: Plan, heap: str) -> dict[str, Any]:
    about, counts, model = describe_environment(1), plan.config.token_counts, plan.config.model
    git = about["git"]
    on_gpu = plan.device.type == "cuda"
    return {
        "task": f"{plan.config.task} {model.backbone}, {plan.batch_size} clips of {model.num_frames} frames,"
        f" {model.image_size} pixels",
        "tokens": f"{counts.num_tokens}: {counts.num_kept} kept by {plan.config.tokens.selection},"
        f" {counts.num_visible} in the encoder",
        "device": torch.cuda.get_device_name(plan.device) if on_gpu else _processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "dtypes": ", ".join(plan.dtypes),
        "ours": f"{model.attention} attention, recompute {plan.config.recompute.mode}",
        "torch": torch.__version__,
        "commit": git and git["commit"][:12] + (" with uncommitted changes" if git["dirty"] else ""),
        "rounds": f"{plan.rounds} after {plan.warmup} to warm up",
        "heap": heap,
    }


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _keep_heap_warm() -> str:
    """Have glibc keep freed memory, or large activations are returned and faulted in again every step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return "as the system's allocator has it"
    refused = [name for name, (option, value) in _MALLOPT.items() if mallopt(option, value) != 1]
    return f"mallopt refused {', '.join(refused)}" if refused else "kept warm by mallopt: freed memory stays"


if __name__ == "__main__":
    run_program(bench)
