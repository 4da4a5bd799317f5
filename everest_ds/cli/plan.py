"""What a run is about to do, in numbers, before anything is built: no model, no GPU, no ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from everest_ds.config import (
    BATCHES_AHEAD,
    BatchPlan,
    Experiment,
    batch_bytes,
    plan_ranks,
    shared_memory_bytes,
)
from everest_ds.launch.doctor import check_shared_memory
from everest_ds.profiling.compute import count_parameters, predict_macs
from everest_ds.units import format_bytes, format_count

_RANKS_PER_NODE = 8  # of the usual node with GPUs, where nothing says how many there are


class Epoch(NamedTuple):
    """The samples of an epoch, and where the number is from if not from the manifest."""

    num_samples: int
    source: str = ""


def describe_plan(
    config: Experiment, num_ranks: int, planned: bool = False, ranks_per_node: int | None = None
) -> dict[str, Any]:
    """Model, tokens, batch arithmetic and predicted compute, for a table.

    Args:
        ranks_per_node: ranks that share a node's memory; all of up to eight by default.
        planned: the data need not be there yet; see `count_samples`.

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
        "steps": _steps(config, plan, count_samples(config, planned)),
        "learning_rate": f"{config.schedule.base_lr * plan.samples_per_step / 256:.3g} at its peak",
        "ranks": _ranks(config, plan),
        "shared_memory": _shared_memory(config, ranks_per_node or min(num_ranks, _RANKS_PER_NODE)),
        "sharding": f"ZeRO-{config.parallelism.zero_stage}, {config.precision}",
        "recompute": config.recompute.mode,
        "compile": _compile(config),
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


def _compile(config: Experiment) -> str:
    """Describe where the blocks are compiled (parallel/compile.py)."""
    on_gpus = "on GPUs" if config.parallelism.zero_stage < 3 else "no: ZeRO-3"
    return {None: on_gpus, True: "yes", False: "no"}[config.model.compile]


def _ranks(config: Experiment, plan: BatchPlan) -> str:
    tensor = config.parallelism.tensor
    shared = f" x {tensor} tensor-parallel (neighbours in a node)" if tensor > 1 else ""
    return f"{plan.data_parallel_degree * tensor} = {plan.data_parallel_degree} data-parallel{shared}"


def _shared_memory(config: Experiment, ranks_per_node: int) -> str:
    """Describe the shared memory that a node's loaders need, with the fix where this machine has less."""
    workers, needed_bytes = config.data.num_workers, shared_memory_bytes(config, ranks_per_node)
    if not needed_bytes:
        return "none: the ranks decode themselves (data.num_workers=0)"
    found = check_shared_memory(needed_bytes)
    return (
        f"{format_bytes(needed_bytes)} of /dev/shm on a node with {ranks_per_node} ranks, on a GPU as much"
        f" again pinned: {workers} workers x {BATCHES_AHEAD} batches of {format_bytes(batch_bytes(config))}"
        " ahead, and two in use" + (f"; WARNING: here, {found.detail}: {found.fix}" if found.fix else "")
    )


def _steps(config: Experiment, plan: BatchPlan, epoch: Epoch | None) -> str:
    if epoch is None:
        return "unknown: no manifest"
    from everest_ds.data.order import steps_per_epoch

    steps, epochs = steps_per_epoch(epoch.num_samples, plan), config.schedule.epochs
    return f"{steps * epochs} = {steps} per epoch x {epochs} epochs{epoch.source}"


def count_samples(config: Experiment, planned: bool = False) -> Epoch | None:
    """The samples that an epoch has; None if `data.train` is not set.

    Args:
        planned: where there is no such manifest and its folder is called as an official data set, take
            what that has; None where it is called otherwise.

    Raises:
        DataError: the manifest is not there, or is wrong.
    """
    manifest = config.data.train
    if manifest is None:
        return None
    if planned and not manifest.is_file():
        return _official_epoch(manifest)
    from everest_ds.data.manifest import read_manifest

    samples = read_manifest(
        manifest,
        root=config.data.root,
        num_classes=config.model.num_classes,
        labelled=config.task == "finetune",
    )
    return Epoch(len(samples))


def _official_epoch(manifest: Path) -> Epoch | None:
    from everest_ds.data.official.registry import DATASETS

    dataset = DATASETS.get(manifest.parent.name)
    if dataset is None:
        return None
    source = f" ({dataset.num_train:,} samples, as published: {manifest} is not there)"
    return Epoch(dataset.num_train, source)
