"""The plan of a run as figures, computed from its config without a model, a GPU or other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from everest_ds.config import (
    BatchPlan,
    Experiment,
    batch_bytes,
    plan_ranks,
    shared_batches,
    shared_memory_bytes,
)
from everest_ds.config.deepspeed_claims import notes_on
from everest_ds.config.deepspeed_file import read_deepspeed_file
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.costs.compute import count_parameters, predict_macs
from everest_ds.data.data_set import check_frames, read_data_set
from everest_ds.data.official.registry import DATASETS
from everest_ds.data.order import steps_per_epoch
from everest_ds.data.store.staging import STAGE_FIX, StageRoom, plan_copies, stage_folder
from everest_ds.data.store.token_cache import open_token_cache
from everest_ds.errors import ConfigError
from everest_ds.launch.doctor import check_shared_memory
from everest_ds.parallel.ds_config import resolve_ds_config
from everest_ds.training.input_files import (
    check_evaluation_inputs,
    check_initial_weights_fit,
    manifest_of,
    splits_of,
    stores_to_stage,
)
from everest_ds.training.run_folder import RunFolder
from everest_ds.units import format_bytes, format_count

if TYPE_CHECKING:
    from everest_ds.config import Experiment

_RANKS_PER_NODE = 8  # assumed for a node with GPUs if the number is not given


class Epoch(NamedTuple):
    """The number of samples in an epoch, and the source of that number if it is not the manifest."""

    num_samples: int
    source: str = ""


def describe_plan(
    config: Experiment, num_ranks: int, planned: bool = False, ranks_per_node: int | None = None
) -> dict[str, Any]:
    """Describe model, tokens, batch arithmetic and predicted compute of a run as the rows of a table.

    Args:
        config: config of the run.
        num_ranks: number of ranks of the run.
        planned: True if the data need not exist yet; see `count_samples`.
        ranks_per_node: ranks that share a node's memory; by default all ranks, but at most eight.

    Raises:
        ConfigError: if the config cannot run on this number of ranks.
        DataError: if the manifest is missing or malformed.
    """
    plan = plan_ranks(config, num_ranks)
    counts, macs = config.token_counts, predict_macs(config)
    peak_lr = config.schedule.base_lr * config.schedule.rate_scale(plan.samples_per_step)
    tokens, model, candidates = config.tokens, config.model, config.candidate_geometry
    drawn = f", selected from {candidates.num_frames} by IIFS" if candidates != model.geometry else ""
    learned = f", positions interpolated from {model.positions_from}" if model.positions_from else ""
    scored = f" by {tokens.score} {tokens.distance}" if tokens.rule.scores else ""
    step_flops = 2 * macs.training_macs * plan.global_batch_size
    epoch = count_samples(config, planned)
    return {
        "model": f"{config.model.backbone}, {format_count(count_parameters(config))} parameters",
        "clip": f"{model.num_frames} frames of {model.image_size}x{model.image_size}{drawn}{learned}",
        "tokens": f"{counts.num_tokens} in all, {counts.num_kept} kept ({config.tokens.selection}{scored}),"
        f" {counts.num_visible} in the encoder",
        "batch": str(plan),
        "steps": _steps(config, plan, epoch),
        "learning_rate": f"{peak_lr:.3g} at the peak",
        "ranks": str(MeshShape.of(config, num_ranks)),
        "shared_memory": _shared_memory(config, ranks_per_node or min(num_ranks, _RANKS_PER_NODE)),
        "sharding": f"ZeRO-{config.parallelism.zero_stage}, {config.precision}",
        **_own_file(config, num_ranks, epoch),
        **_token_cache(config, planned),
        "recompute": config.recompute.mode,
        "compile": _compile(config),
        "forward_gmacs_per_clip": round(macs.forward_macs / 1e9, 3),
        "literature_gflops_per_clip": round(macs.literature_macs / 1e9, 3),
        "training_gmacs_per_clip": round(macs.training_macs / 1e9, 3),
        "training_flops_per_step": f"{format_count(step_flops)}FLOP (2 per MAC)",
    }


def _own_file(config: Experiment, num_ranks: int, epoch: Epoch | None) -> dict[str, str]:
    """Check the user's DeepSpeed file, if there is one, and describe what a run does not take from it."""
    if config.parallelism.ds_config is None:
        return {}
    resolve_ds_config(config, num_ranks, epoch and epoch.num_samples)
    notes = notes_on(read_deepspeed_file(config))
    return {"deepspeed_file": "; ".join([str(config.parallelism.ds_config), *notes])}


def _token_cache(config: Experiment, planned: bool) -> dict[str, str]:
    """Check the token cache, if the config names one, and describe it."""
    folder = config.data.token_cache
    if folder is None:
        return {}
    if planned and not folder.exists():
        return {"token_cache": f"{folder} does not exist yet: `everest-ds data cache` fills it"}
    from everest_ds.training.samples import read_training_samples  # imports torch, which is slow

    usable = read_training_samples(config, RunFolder(config.run.dir).excluded)
    cache = open_token_cache(config, usable.samples)
    assert cache is not None
    return {"token_cache": f"{config.data.draws} of {cache.checksum.shape[1]} draws per sample in {folder}"}


def _compile(config: Experiment) -> str:
    """Describe on which devices torch.compile is applied to the blocks (parallel/compile.py)."""
    on_gpus = "on GPUs" if config.parallelism.zero_stage < 3 else "no, because of ZeRO-3"
    return {None: on_gpus, True: "yes", False: "no"}[config.model.compile]


def _shared_memory(config: Experiment, ranks_per_node: int) -> str:
    """Describe the shared memory that a node's loaders need, with a fix if this machine has less."""
    workers, needed_bytes = config.data.num_workers, shared_memory_bytes(config, ranks_per_node)
    if not needed_bytes:
        return "none: the ranks decode the videos themselves (data.num_workers=0)"
    found = check_shared_memory(needed_bytes)
    return (
        f"{format_bytes(needed_bytes)} of /dev/shm on a node with {ranks_per_node} ranks, and the same amount"
        f" of pinned memory if they use GPUs. Per rank: {shared_batches(workers)} batches of"
        f" {format_bytes(batch_bytes(config))}, which {workers} worker{'s' if workers > 1 else ''} read in"
        " advance or the rank uses"
        + (f"; WARNING: this machine has {found.detail}; fix: {found.fix}" if found.fix else "")
    )


def describe_staging(config: Experiment, command: str) -> dict[str, str]:
    """Describe the shards that `command` stages on each node, and the room here, as a row of a table.

    Without `data.stage`, or if a store or the token cache does not exist yet, there is no such row.
    """
    data, stage = config.data, config.data.stage
    sources = [getattr(data, split) for split in splits_of(command, config)]
    if data.token_cache is not None and "train" in splits_of(command, config):
        sources.append(data.token_cache)
    if stage is None or not all(source is not None and source.exists() for source in sources):
        return {}
    try:
        folder = stage_folder(stage)
    except ConfigError:  # a variable that exists on the nodes only
        folder = Path(stage)
    copies = plan_copies(folder, stores_to_stage(config, command))
    total_bytes = sum(shard.num_bytes for shard in copies)
    text = f"{format_bytes(total_bytes)} in {len(copies)} shards, copied to {stage} on each node"
    if not folder.is_dir():
        return {"stage": f"{text}, where the free space is checked before training"}
    room = StageRoom.of(folder, copies)
    warning = f"; WARNING: too little space here; fix: {STAGE_FIX}" if room.is_short else ""
    return {"stage": f"{text}; here, {room}{warning}"}


def _steps(config: Experiment, plan: BatchPlan, epoch: Epoch | None) -> str:
    if epoch is None:
        return "unknown, because there is no manifest"
    steps, epochs = steps_per_epoch(epoch.num_samples, plan), config.schedule.epochs
    limit = config.run.max_steps
    end = f"; this run ends after {limit} (run.max_steps)" if limit and limit < steps * epochs else ""
    return f"{steps * epochs} = {steps} per epoch x {epochs} epochs{epoch.source}{end}"


def count_samples(config: Experiment, planned: bool = False) -> Epoch | None:
    """Count the samples of an epoch, or return None if their number is unknown.

    The number is unknown if `data.train` is not set.

    Args:
        config: config of the run.
        planned: True if the manifest need not exist yet. The published size then replaces the count if the
            manifest's folder has the name of a known data set; otherwise the number is unknown.

    Raises:
        DataError: if the manifest is missing (unless `planned`) or malformed.
    """
    manifest = config.data.train
    if manifest is None:
        return None
    if planned and not manifest.exists():
        dataset = DATASETS.get(manifest.parent.name)
        if dataset is None:
            return None
        published = f"{dataset.num_train:,} samples, the published number, because {manifest} does not exist"
        return Epoch(dataset.num_train, f" ({published})")
    samples = read_data_set(
        manifest_of(config, "train"),
        root=config.data.root,
        num_classes=config.model.num_classes,
        labelled=config.task == "finetune",
    )
    check_frames(samples, manifest, config.data)
    return Epoch(len(samples))


def check_plan(config: Experiment, num_ranks: int, planned: bool = False) -> dict[str, Any]:
    """Check that a run can start, as `--dry-run` does, and describe its plan as the rows of a table.

    Raises:
        EverestError: if the run cannot start.
    """
    check_evaluation_inputs(config, planned)
    check_initial_weights_fit(config)
    facts = describe_plan(config, num_ranks, planned)
    resolve_ds_config(config, num_ranks)
    return facts
