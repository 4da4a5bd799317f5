"""What a run is about to do, in numbers, before anything is built: no model, no GPU, no ranks."""

from __future__ import annotations

from typing import Any

from everest_ds.config import BatchPlan, Experiment, plan_ranks
from everest_ds.profiling.compute import count_parameters, predict_macs
from everest_ds.units import format_count


def describe_plan(config: Experiment, num_ranks: int) -> dict[str, Any]:
    """Model, tokens, batch arithmetic and predicted compute, for a table.

    Raises:
        ConfigError, DataError: what cannot run, before any rank starts.
    """
    plan = plan_ranks(config, num_ranks)
    counts, macs = config.token_counts, predict_macs(config)
    step_flops = 2 * macs.training_macs * plan.global_batch_size
    return {
        "model": f"{config.model.backbone}, {format_count(count_parameters(config))} parameters",
        "clip": _clip(config),
        "tokens": f"{counts.num_tokens} in all, {counts.num_kept} kept ({_selection(config)}), "
        f"{counts.num_visible} in the encoder",
        "batch": str(plan),
        "steps": _steps(config, plan),
        "learning_rate": f"{config.schedule.base_lr * plan.samples_per_step / 256:.3g} at its peak",
        "ranks": _ranks(config, plan),
        "sharding": f"ZeRO-{config.parallelism.zero_stage}, {config.precision}",
        "recompute": config.recompute.mode,
        "forward_gmacs_per_clip": round(macs.forward_macs / 1e9, 3),
        "literature_gflops_per_clip": round(macs.literature_macs / 1e9, 3),
        "training_gmacs_per_clip": round(macs.training_macs / 1e9, 3),
        "training_flops_per_step": f"{format_count(step_flops)}FLOP (2 per MAC)",
    }


def _clip(config: Experiment) -> str:
    model, candidates = config.model, config.candidate_geometry
    drawn = f", drawn from {candidates.num_frames} (IIFS)" if candidates != model.geometry else ""
    return f"{model.num_frames} frames of {model.image_size}x{model.image_size}{drawn}"


def _selection(config: Experiment) -> str:
    tokens = config.tokens
    by = f" by {tokens.score} {tokens.distance}" if tokens.selection == "rero" else ""
    return f"{tokens.selection}{by}"


def _ranks(config: Experiment, plan: BatchPlan) -> str:
    tensor = config.parallelism.tensor
    shared = f" x {tensor} tensor-parallel (neighbours in a node)" if tensor > 1 else ""
    return f"{plan.data_parallel_degree * tensor} = {plan.data_parallel_degree} data-parallel{shared}"


def _steps(config: Experiment, plan: BatchPlan) -> str:
    if config.data.train is None:
        return "unknown: data.train is not set"
    from everest_ds.data.manifest import read_manifest
    from everest_ds.data.order import steps_per_epoch

    samples = read_manifest(
        config.data.train,
        root=config.data.root,
        num_classes=config.model.num_classes,
        labelled=config.task == "finetune",
    )
    steps = steps_per_epoch(len(samples), plan)
    return f"{steps * config.schedule.epochs} = {steps} a epoch x {config.schedule.epochs} epochs"
