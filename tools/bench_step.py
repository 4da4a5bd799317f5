"""Time training steps of our model, and of the original systems if clones of them are given.

python tools/bench_step.py pretrain --backbone vit_base --batch 2 --dtype fp32 --dtype bf16
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from bench_contenders import (
    Contender,
    StepTime,
    attempt,
    engine_contender,
    peer_contenders,
    plain_contender,
    timed_step,
)
from bench_rates import measure_rates, record
from bench_report import print_report
from peers import Peer, load_peer
from torch.profiler import ProfilerActivity, profile

from everest_ds.cli.options import JsonFile
from everest_ds.cli.program import run_program
from everest_ds.config import Experiment, load_experiment
from everest_ds.console import write_json
from everest_ds.costs.hardware.gpus import peak_flops_per_s
from everest_ds.errors import UsageError
from everest_ds.parallel.world import World
from everest_ds.parallel.world_of_one import world_of_one
from everest_ds.profiling.allocations import ResidentPeak, measure_resident_peak, track_allocations
from everest_ds.profiling.step_measurement import device_name
from everest_ds.training.engine_step import noise_batch
from everest_ds.training.run_folder import describe_environment

Task = Literal["pretrain", "finetune"]
DTYPES = ("fp32", "bf16")
KEEP_RATIO = {"pretrain": 0.3, "finetune": 0.6}
_RECIPE = {"pretrain": "k400_pretrain_vit_base", "finetune": "k400_finetune_vit_base"}
# glibc's mallopt(3): allocations up to these sizes stay in the heap and are not returned to the system.
_MALLOPT = {"M_MMAP_THRESHOLD": (-3, 2**30), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}
_PROFILE_ROWS = 20


# The loss scale of fp16 starts at 65536 and halves with every skipped step: after 20, it is below 1.
_MAX_SKIPPED = 20


@dataclass(frozen=True)
class Plan:
    """The experiments to run, one per dtype, with the numbers of timed and warm-up steps."""

    configs: list[Experiment]
    rounds: int
    warmup: int

    @property
    def config(self) -> Experiment:
        """Return the first config; the others differ in precision only."""
        return self.configs[0]


def bench(
    task: Annotated[Task, typer.Argument(help="Phase of training.")],
    backbone: Annotated[str, typer.Option(help="vit_tiny, vit_small, vit_base, vit_large or vit_huge.")] = (
        "vit_base"
    ),
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="fp32, or bf16: bf16 weights with fp32 masters. Repeat to compare in one run."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips per step.")] = 2,
    keep_ratio: Annotated[
        float | None, typer.Option(help="Share of kept tokens; 0.3 to pre-train, 0.6 to fine-tune.")
    ] = None,
    selection: Annotated[str, typer.Option(help="tokens.selection of our model.")] = "rero",
    recompute: Annotated[str, typer.Option(help="recompute.mode of our model.")] = "none",
    attention: Annotated[str, typer.Option(help="model.attention of our model.")] = "fused",
    frames: Annotated[int, typer.Option(help="Frames per clip.")] = 16,
    size: Annotated[int, typer.Option(help="Height and width of a frame, pixels.")] = 224,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="everest=DIR or videomae=DIR, a clone to run beside ours."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Timed steps per contender; contenders take turns.")] = 7,
    warmup: Annotated[int, typer.Option(min=1, help="Warm-up steps per contender.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's own.")] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Default: cuda if torch sees a CUDA device.")
    ] = None,
    rates: Annotated[
        bool, typer.Option(help="Time the step's matrix products alone, as its lower bound.")
    ] = True,
    profile_step: Annotated[
        bool,
        typer.Option(
            "--profile", help="Also print the most expensive operators of our step in the last dtype."
        ),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure training steps: time of forward, backward and optimiser; memory; share of the machine's rates.

    "Ours" is the engine that a run builds from the Kinetics-400 recipe, with ZeRO, drop path and
    label smoothing; "plain" is the same step in a PyTorch loop without DeepSpeed. All contenders run in one
    process on the same clips, one step each in turn, so that a busy machine slows them alike: trust the
    ratios and their quartiles more than the times. Peers run as in their authors' scripts, with float32
    weights, autocast for bf16 (fp16 on CUDA) and torch's AdamW in its default settings, but without drop
    path. Augmentation is timed apart from the step, because peers leave it to their loader.
    `without_optimizer` is the ratio of forward and backward alone. The peak of the passes counts what they
    allocate: activations, gradients, and autocast's copies of the weights. Steps that fp16's loss scale
    skips are counted but not timed. The column of a contender that runs out of memory shows the failure, and
    the other contenders continue.

    Example: python tools/bench_step.py finetune --peer videomae=../VideoMAE --dtype fp32 --json step.json
    """
    heap = _keep_heap_warm()
    if threads is not None:
        torch.set_num_threads(threads)
    _choose_device(device)
    overrides = [
        f"model.backbone={backbone}",
        f"model.attention={attention}",
        f"model.num_frames={frames}",
        f"model.image_size={size}",
        f"tokens.selection={selection}",
        f"tokens.keep_ratio={keep_ratio or KEEP_RATIO[task]}",
        f"recompute.mode={recompute}",
        f"batch.micro_batch_size={batch}",
        "batch.global_batch_size=null",
    ]
    precisions = [[*overrides, f"precision={name}"] for name in _dtypes(dtype or ["fp32"])]
    plan = Plan([load_experiment(_RECIPE[task], each) for each in precisions], rounds, warmup)
    peers = [load_peer(name, folder, plan.config) for name, folder in _peers(peer or []).items()]
    with world_of_one() as world:
        result = {"environment": _environment(plan, heap, world.device)}
        result |= run(plan, world, peers, rates, profile_step)
    write_json(json_file, result)
    print_report(result)


def run(plan: Plan, world: World, peers: list[Peer], rates: bool, profile_step: bool) -> dict[str, Any]:
    """Measure all contenders and return the results, ready for JSON."""
    device, clips = world.device, noise_batch(plan.config, world.device)
    contenders = [engine_contender(config, world) for config in plan.configs]
    contenders += [plain_contender(config, device) for config in plan.configs]
    for peer in peers:
        contenders += peer_contenders(peer, [config.precision for config in plan.configs], clips)
    for contender in contenders:
        attempt(contender, partial(_warm_up, contender, plan.warmup, device))
    resident = _resident_peak(lambda: _take_turns(plan.rounds, contenders, device))
    size = plan.config.batch.micro_batch_size
    summaries = [_summary(contender, size, device) for contender in contenders]
    engines = [contender for contender in contenders if contender.is_engine and contender.step]
    return {
        "contenders": summaries,
        "ratios": _ratios(contenders),
        "resident_peak_bytes": resident and resident.peak_bytes,
        "rates": [_rates(contender, device) for contender in engines] if rates else [],
        "profile": _profile(engines[-1], device) if profile_step and engines else [],
        "steps": {c.label: [time and asdict(time) for time in c.times] for c in contenders},
    }


def _warm_up(contender: Contender, steps: int, device: torch.device) -> None:
    """Step until `steps` steps have updated the weights, because fp16's loss scale must first fall."""
    for _ in range(steps):
        while timed_step(contender, device) is None:
            if contender.skipped >= _MAX_SKIPPED:
                contender.fail(f"skipped its first {contender.skipped} steps")
                return


def _take_turns(rounds: int, contenders: list[Contender], device: torch.device) -> None:
    for _ in range(rounds):
        for contender in contenders:
            attempt(contender, partial(_time, contender, device))


def _time(contender: Contender, device: torch.device) -> None:
    contender.times.append(timed_step(contender, device))


def _resident_peak(call: Callable[[], None]) -> ResidentPeak | None:
    if sys.platform.startswith("linux"):
        return measure_resident_peak(call)
    call()
    return None


def _summary(contender: Contender, clips: int, device: torch.device) -> dict[str, Any]:
    """Return a column of the table; a failed contender has a reason and no figures."""
    peaks: list[int] = []
    attempt(contender, lambda: peaks.append(_passes_peak_bytes(contender, device)))
    steps = contender.taken if contender.step else []
    step_s = _median(step.step_s for step in steps)
    flops = 2 * contender.macs / step_s if contender.macs and step_s else None
    peak = peak_flops_per_s(device_name(device), contender.dtype)
    return {
        "contender": contender.label,
        "failure": contender.failure,
        "augment_ms": _ms(_median(step.prepare_s for step in steps)),
        "forward_ms": _ms(_median(step.forward_s for step in steps)),
        "backward_ms": _ms(_median(step.backward_s for step in steps)),
        "optimizer_ms": _ms(_median(step.optimizer_s for step in steps)),
        "step_ms": _ms(step_s),
        "fastest_step_ms": _ms(min((step.step_s for step in steps), default=None)),
        "clips_per_s": step_s and clips / step_s,
        "user_cpu_s": _median(step.user_cpu_s for step in steps),
        "skipped_steps": contender.skipped,
        "loss_scale": contender.scale and contender.scale(),
        "passes_peak_bytes": peaks[0] if peaks else None,
        "states_bytes": contender.state_bytes() if contender.step else None,
        "gmacs_per_step": contender.macs and contender.macs / 1e9,
        "gflop_per_s": flops and flops / 1e9,
        "mfu_pct": 100 * flops / peak if flops and peak else None,
    }


def _passes_peak_bytes(contender: Contender, device: torch.device) -> int:
    contender.drop_gradients()
    tracked = track_allocations(contender.passes, device)
    contender.running.update()
    return tracked.peak_bytes


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _ratios(contenders: list[Contender]) -> list[dict[str, Any]]:
    """Compare each contender with our engine in the same dtype, and our engine's dtypes with its last one."""
    alive = [contender for contender in contenders if contender.step is not None]
    engines = {contender.dtype: contender for contender in alive if contender.is_engine}
    rows = []
    for contender in alive:
        base = list(engines.values())[-1] if contender.is_engine else engines.get(contender.dtype)
        if base is not None and contender is not base:
            rows += _ratio(contender, base)
    return rows


def _ratio(contender: Contender, base: Contender) -> list[dict[str, Any]]:
    pairs = [(a, b) for a, b in zip(base.times, contender.times, strict=True) if a and b]
    if len(pairs) < 2:  # nearly all steps were skipped: too few to compare
        return []
    ours, theirs = zip(*pairs, strict=True)
    low, _, high = statistics.quantiles([b.step_s / a.step_s for a, b in pairs], n=4, method="inclusive")
    without_optimizer = [
        statistics.median(s.forward_s + s.backward_s for s in steps) for steps in (theirs, ours)
    ]
    return [
        {
            "step time": f"{contender.label} / {base.label}",
            "of_medians": _over(statistics.median, theirs, ours),
            "of_fastest": _over(min, theirs, ours),
            "quartile_1": low,
            "quartile_3": high,
            "without_optimizer": without_optimizer[0] / without_optimizer[1],
        }
    ]


def _over(of: Callable[[list[float]], float], theirs: Sequence[StepTime], ours: Sequence[StepTime]) -> float:
    return of([step.step_s for step in theirs]) / of([step.step_s for step in ours])


def _rates(contender: Contender, device: torch.device) -> dict[str, Any]:
    recorder = record(contender.passes)
    contender.running.update()
    measured = measure_rates(recorder, device)
    fastest, macs = min(step.step_s for step in contender.taken), contender.macs or 0
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
    """Return the operators with the most time of their own in a step, on the GPU if there is one."""
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


def _choose_device(name: str | None) -> None:
    """Hide the GPUs for `cpu`, so that the world of ranks chooses the CPU; otherwise it chooses a GPU."""
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device", allowed="cpu")


def _dtypes(names: list[str]) -> list[str]:
    if wrong := [name for name in names if name not in DTYPES]:
        raise UsageError("--dtype is unknown", given=wrong[0], allowed=", ".join(DTYPES))
    return list(dict.fromkeys(names))


def _peers(texts: list[str]) -> dict[str, Path]:
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (_, _, folder) in zip(texts, pairs, strict=True) if not folder]:
        raise UsageError("--peer has no folder", given=wrong[0], allowed="everest=DIR, videomae=DIR")
    return {name: Path(folder) for name, _, folder in pairs}


def _environment(plan: Plan, heap: str, device: torch.device) -> dict[str, Any]:
    about, config, counts = describe_environment(1), plan.config, plan.config.token_counts
    git, model = about["git"], config.model
    return {
        "task": f"{config.task} {model.backbone}, {config.batch.micro_batch_size} clips of"
        f" {model.num_frames} frames, {model.image_size} pixels",
        "tokens": f"{counts.num_tokens}: {counts.num_kept} kept by {config.tokens.selection},"
        f" {counts.num_visible} in the encoder",
        "device": device_name(device),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "dtypes": ", ".join(config.precision for config in plan.configs),
        "ours": f"ZeRO-{config.parallelism.zero_stage}, {model.attention} attention,"
        f" recompute {config.recompute.mode}, drop path {model.drop_path:g}",
        "torch": torch.__version__,
        "commit": git and git["commit"][:12] + (" with uncommitted changes" if git["dirty"] else ""),
        "rounds": f"{plan.rounds} after {plan.warmup} warm-up steps",
        "heap": heap,
    }


def _keep_heap_warm() -> str:
    """Make glibc keep freed memory, so that large activations are not returned and faulted in every step.

    Returns:
        A description of the heap for the report.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return "default of the system's allocator"
    refused = [name for name, (option, value) in _MALLOPT.items() if mallopt(option, value) != 1]
    return f"mallopt refused {', '.join(refused)}" if refused else "freed memory is kept (mallopt)"


if __name__ == "__main__":
    run_program(bench)
