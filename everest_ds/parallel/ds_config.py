"""The DeepSpeed JSON of a run: a file of ds_configs/ whose `"auto"` values are filled in from the run config.

The DeepSpeed file says how to shard. Batch sizes, clipping and precision belong to the run config alone: a
DeepSpeed file that sets one of them to another value is refused. On one data-parallel rank, stages 1 and 2
without offload have no gradients to reduce, so the file's settings for the reduction are replaced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from everest_ds.config import BatchPlan, Experiment, plan_ranks
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.config.zero_settings import ds_config_path, zero_settings
from everest_ds.errors import ConfigError, nearest
from everest_ds.parallel.deepspeed_internals import validate, zero_optimization_keys
from everest_ds.parallel.nvme import check_nvme, swap_folder

AUTO = "auto"
# Top-level keys of DeepSpeed's JSON that affect training with an optimiser that the caller builds. Others,
# such as "optimizer" or "scheduler", would compete with settings of the run config.
_KNOWN_KEYS = frozenset(
    "train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping bf16 fp16 "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization aio "
    "communication_data_type prescale_gradients gradient_predivide_factor sparse_gradients data_types "
    "comms_logger flops_profiler wall_clock_breakdown memory_breakdown steps_per_print timers".split()
)

# On one data-parallel rank, stage 2 equals stage 1: there is no bucket to fill and no stream to wait for.
_UNREDUCED = {"stage": 1, "overlap_comm": False, "contiguous_gradients": False}


def resolve_ds_config(config: Experiment, num_ranks: int) -> dict[str, Any]:
    """Read the DeepSpeed file that the config names and fill in its `"auto"` values for `num_ranks` ranks.

    Raises:
        ConfigError: if the file has unknown keys, another ZeRO stage or another value for a setting of the
            run config, or if this machine does not support the offload.
    """
    plan = plan_ranks(config, num_ranks)
    check_nvme(config)
    path = ds_config_path(config)
    tree = _read(path)
    _check_keys(tree, path)
    stage = tree["zero_optimization"].get("stage")
    if stage != config.parallelism.zero_stage:
        raise ConfigError(
            f"{path}: zero_optimization.stage differs from parallelism.zero_stage",
            given=f"{stage} and {config.parallelism.zero_stage}",
            fix="set parallelism.zero_stage to the file's stage",
        )
    _fill(tree, "train_micro_batch_size_per_gpu", plan.micro_batch_size, path)
    _fill(tree, "gradient_accumulation_steps", plan.grad_accum_steps, path)
    _fill(tree, "gradient_clipping", config.optimizer.clip_grad_norm or 0.0, path)
    _fill_swap_folder(tree["zero_optimization"], config, path)
    _fill_accumulation(tree, config, plan, path)
    if zero_settings(config).shards_nothing(stage, MeshShape.of(config, num_ranks).degrees.data):
        tree["zero_optimization"] |= _UNREDUCED
    for precision in ("bf16", "fp16"):
        if precision == config.precision or precision in tree:
            _fill(tree.setdefault(precision, {}), "enabled", precision == config.precision, path)
    return {"steps_per_print": 2**31, **tree}


def check_by_deepspeed(resolved: dict[str, Any]) -> None:
    """Check a resolved DeepSpeed JSON with DeepSpeed's own validation, as its engine does at the start.

    Raises:
        ConfigError: with DeepSpeed's message, if DeepSpeed refuses it.
    """
    _tell_device()
    try:
        validate(resolved)
    except (AssertionError, ValueError, TypeError, KeyError) as error:  # pydantic raises ValueErrors
        raise ConfigError("DeepSpeed refuses the config", given=" ".join(str(error).split())) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as DeepSpeed JSON", given=str(error)) from None
    if not isinstance(tree, dict) or not isinstance(tree.get("zero_optimization"), dict):
        raise ConfigError(
            f"{path}: the `zero_optimization` section is missing", fix='add "zero_optimization": {...}'
        )
    return tree


def _tell_device() -> None:
    """Set DeepSpeed's device before its import; otherwise DeepSpeed searches for one and warns about it."""
    import torch  # heavy

    from everest_ds.parallel.world import prepare_deepspeed

    prepare_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _check_keys(tree: dict[str, Any], path: Path) -> None:
    _tell_device()
    for section, known in (("", _KNOWN_KEYS), ("zero_optimization", zero_optimization_keys())):
        for key in tree[section] if section else tree:
            if key not in known:
                name = f"{section}.{key}" if section else key
                raise ConfigError(f"{path}: unknown DeepSpeed key `{name}`", allowed=nearest(key, known))


def _fill_swap_folder(zero: dict[str, Any], config: Experiment, path: Path) -> None:
    folder = swap_folder(config)
    if folder is not None:
        _fill(zero["offload_optimizer"], "nvme_path", str(folder), path)
    offloads = [zero.get(key) for key in ("offload_optimizer", "offload_param")]
    if folder is None and any(isinstance(one, dict) and one.get("device") == "nvme" for one in offloads):
        raise ConfigError(
            f"{path}: the file asks for offload to nvme, which only the run config may set",
            fix="remove it and set parallelism.offload_to_nvme; weights offload to host memory at most",
        )


def _fill_accumulation(tree: dict[str, Any], config: Experiment, plan: BatchPlan, path: Path) -> None:
    """Choose the dtype in which the gradients of micro-batches are summed, unless the file sets it."""
    types, key = tree.get("data_types", {}), "grad_accum_dtype"
    given, accumulates = types.pop(key, AUTO), plan.grad_accum_steps > 1
    allowed = (AUTO, "fp32", *([config.precision] if config.in_half_precision else []))
    if given not in allowed:
        raise ConfigError(
            f"{path}: data_types.{key} is neither fp32 nor the run's precision",
            given=given,
            allowed=", ".join(allowed),
        )
    if given != AUTO or zero_settings(config).sums_in_float32(config.precision, accumulates):
        tree["data_types"] = {**types, key: "fp32" if given == AUTO else given}


def _fill(tree: dict[str, Any], key: str, value: object, path: Path) -> None:
    if tree.get(key, AUTO) not in (AUTO, value):
        raise ConfigError(
            f"{path}: `{key}` contradicts the run config",
            given=f"{tree[key]} in the file, {value} from the run config",
            fix=f'write "{key}": "auto"',
        )
    tree[key] = value
