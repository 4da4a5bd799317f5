"""The keys of DeepSpeed's JSON: the values that each key takes, and the use that a run makes of it.

The list covers DeepSpeed 0.19.8 and the keys that older files carry; a test compares it with DeepSpeed's own
config classes. DeepSpeed itself is not imported, because that takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

AUTO = "auto"
KeyUse = Literal["passed", "compared", "ignored", "refused"]


class ValueKind(NamedTuple):
    """A kind of values: its human-readable name, and the test that tells whether a value is of this kind."""

    name: str
    holds: Callable[[Any], bool]


class DeepSpeedKey(NamedTuple):
    """A key of DeepSpeed's JSON.

    Attributes:
        use: `passed` to DeepSpeed; `compared` with the run config, which decides; `ignored`, because it
            changes neither training nor sharding; or `refused`, unless its value asks for nothing.
        kind: the values that the key takes; a refused key may have any value.
        reason: why the key is refused, and what to do instead.
        harmless: values of a refused key with which a run agrees; if there are none, these are the values
            that switch the key off.
    """

    use: KeyUse
    kind: ValueKind
    reason: str = ""
    harmless: tuple[Any, ...] = ()

    def asks_for_nothing(self, value: Any) -> bool:
        """Return whether a value of this key leaves a run as it is."""
        if not self.harmless:
            return is_off(value)
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.harmless)


def is_off(value: Any) -> bool:
    """Return whether a value switches its key off, as `false` or `{"enabled": false}` do."""
    if isinstance(value, dict):
        return is_off(value["enabled"]) if "enabled" in value else all(map(is_off, value.values()))
    return value is None or value is False or value == AUTO


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**63


def _whole(low: int, high: int | None = None) -> ValueKind:
    name = f"a whole number from {low}" + (f" to {high}" if high else "")
    most = high or 2**63
    return ValueKind(name, lambda value: _is_number(value) and value == int(value) and low <= value <= most)


def _between(low: float, high: float, name: str) -> ValueKind:
    return ValueKind(name, lambda value: _is_number(value) and low <= value <= high)


def _one_of(*names: str) -> ValueKind:
    return ValueKind(" or ".join(names), lambda value: isinstance(value, str) and value.lower() in names)


_FLAG = ValueKind("true or false", lambda value: isinstance(value, bool))
_COUNT, _SIZE = _whole(0), _whole(1)
_NUMBER = _between(0, math.inf, "a number from 0")
_SHARE = _between(0, 1, "a number from 0 to 1")
_TEXT = ValueKind("text", lambda value: isinstance(value, str))
_BETAS = ValueKind(
    "two numbers from 0 to 1",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(_SHARE.holds, value)),
)
_ANYTHING = ValueKind("any value", lambda value: True)
_DTYPE, _DEVICE = _one_of("fp32", "fp16", "bf16"), _one_of("none", "cpu", "nvme")


def _rows(use: KeyUse, kind: ValueKind, section: str, names: str) -> Iterator[tuple[str, DeepSpeedKey]]:
    prefix = f"{section}." if section else ""
    return ((prefix + name, DeepSpeedKey(use, kind)) for name in names.split())


def _refused(section: str, names: str, reason: str, *harmless: object) -> Iterator[tuple[str, DeepSpeedKey]]:
    prefix = f"{section}." if section else ""
    key = DeepSpeedKey("refused", _ANYTHING, reason, harmless)
    return ((prefix + name, key) for name in names.split())


ZERO = "zero_optimization"
_ADAM, _COSINE = "optimizer.params", "scheduler.params"
_REMOVED = "DeepSpeed 0.19 no longer has it; remove it"
_OWN_ADAMW = "a run trains with torch's AdamW; remove it"
_OWN_CHECKPOINTS = "a run writes and reads its own checkpoints; remove it"
_UNTESTED = "it changes the values that are communicated and is untested here; remove it"
_OTHER_AXES = "a run has data and tensor parallelism only; remove it and set parallelism.tensor"
_ALWAYS_SKIPPED = "a step with a gradient that is not finite is always skipped; remove it"
_FLOAT32 = "the optimiser's weights and states are float32; remove it"

# Dotted key -> use. A key of a section is listed below the section's name.
DEEPSPEED_KEYS: dict[str, DeepSpeedKey] = dict(
    row
    for rows in (
        # The run config decides; deepspeed_claims.py compares.
        _rows("compared", _SIZE, "", "train_batch_size train_micro_batch_size_per_gpu"),
        _rows("compared", _SIZE, "", "gradient_accumulation_steps"),
        _rows("compared", _NUMBER, "", "gradient_clipping"),
        _rows("compared", _FLAG, "", "fp16.enabled bf16.enabled"),
        _rows("compared", _whole(0, 3), ZERO, "stage"),
        _rows("compared", _TEXT, "", "optimizer.type scheduler.type"),
        _rows("compared", _NUMBER, _ADAM, "lr eps weight_decay max_grad_norm"),
        _rows("compared", _BETAS, _ADAM, "betas"),
        _rows("compared", _COUNT, _COSINE, "total_num_steps warmup_num_steps"),
        _rows("compared", _NUMBER, _COSINE, "warmup_min_lr warmup_max_lr warmup_min_ratio cos_min_ratio"),
        _rows("compared", _one_of("linear", "log"), _COSINE, "warmup_type"),
        _rows("compared", _FLAG, "activation_checkpointing", "partition_activations cpu_checkpointing"),
        _rows("compared", _DTYPE, "data_types", "grad_accum_dtype"),
        # DeepSpeed reads them.
        _rows("passed", _DTYPE, "", "communication_data_type"),
        _rows("passed", _FLAG, "", "prescale_gradients zero_allow_untested_optimizer disable_python_gc"),
        _rows("passed", _between(1e-9, math.inf, "a number above 0"), "", "gradient_predivide_factor"),
        _rows("passed", _FLAG, "timers.throughput", "enabled synchronized"),
        _rows("passed", _SIZE, "aio", "block_size queue_depth intra_op_parallelism"),
        _rows("passed", _FLAG, "aio", "single_submit overlap_events"),
        _rows("passed", _NUMBER, "fp16", "loss_scale"),
        _rows("passed", _whole(0, 64), "fp16", "initial_scale_power"),
        _rows("passed", _SIZE, "fp16", "loss_scale_window hysteresis min_loss_scale"),
        _rows("passed", _FLAG, "fp16", "consecutive_hysteresis"),
        _rows("passed", _SIZE, ZERO, "reduce_bucket_size allgather_bucket_size sub_group_size"),
        _rows("passed", _FLAG, ZERO, "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce"),
        _rows("passed", _FLAG, ZERO, "allgather_partitions overlap_comm ignore_unused_parameters"),
        _rows("passed", _FLAG, ZERO, "round_robin_gradients memory_efficient_linear override_module_apply"),
        _rows("passed", _FLAG, ZERO, "enable_sanity_checks log_trace_cache_warnings"),
        _rows("passed", _COUNT, ZERO, "stage3_prefetch_bucket_size stage3_param_persistence_threshold"),
        _rows("passed", _COUNT, ZERO, "stage3_model_persistence_threshold stage3_max_live_parameters"),
        _rows("passed", _COUNT, ZERO, "stage3_max_reuse_distance stage3_module_granularity_threshold"),
        _rows("passed", _FLAG, ZERO, "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential"),
        _rows("passed", _DEVICE, ZERO, "offload_optimizer.device offload_param.device"),
        _rows("passed", _TEXT, ZERO, "offload_optimizer.nvme_path offload_param.nvme_path"),
        _rows("passed", _COUNT, ZERO, "offload_optimizer.buffer_count offload_param.buffer_count"),
        _rows("passed", _COUNT, f"{ZERO}.offload_param", "buffer_size max_in_cpu"),
        _rows("passed", _FLAG, ZERO, "offload_optimizer.pin_memory offload_param.pin_memory"),
        _rows("passed", _FLAG, f"{ZERO}.offload_optimizer", "pipeline_read pipeline_write fast_init"),
        # A run logs, profiles, loads and saves by itself, and calls no function of DeepSpeed that reads them.
        _rows("ignored", _ANYTHING, "", "steps_per_print wall_clock_breakdown memory_breakdown dump_state"),
        _rows("ignored", _ANYTHING, "", "tensorboard wandb csv_monitor comet comms_logger flops_profiler"),
        _rows("ignored", _ANYTHING, "", "log_level vocabulary_size dataloader_drop_last disable_allgather"),
        _rows("ignored", _ANYTHING, "", "seq_parallel_communication_data_type optimizer.legacy_fusion"),
        _rows(
            "ignored",
            _ANYTHING,
            "checkpoint",
            "tag_validation parallel_write writer checkpoint_serialization",
        ),
        _rows("ignored", _ANYTHING, "activation_checkpointing", "number_checkpoints profile"),
        _rows("ignored", _ANYTHING, "activation_checkpointing", "synchronize_checkpoint_boundary"),
        _rows(
            "ignored", _ANYTHING, _ADAM, "torch_adam fused foreach capturable differentiable set_grad_none"
        ),
        _rows("ignored", _ANYTHING, _ADAM, "fp32_optimizer_states"),
        _rows("ignored", _ANYTHING, _COSINE, "last_batch_iteration"),
        _rows("ignored", _ANYTHING, "bf16", "immediate_grad_update"),
        _rows("ignored", _ANYTHING, ZERO, "load_from_fp32_weights elastic_checkpoint"),
        _rows("ignored", _ANYTHING, ZERO, "stage3_gather_16bit_weights_on_model_save"),
        _rows("ignored", _ANYTHING, ZERO, "stage3_gather_fp16_weights_on_model_save"),
        _rows("ignored", _ANYTHING, ZERO, "save_muon_momentum_buffer_in_memory"),
        _rows("ignored", _ANYTHING, f"{ZERO}.offload_optimizer", "cpuadam_cores_perc"),
        # A run cannot do what they ask for.
        _refused("", "amp torch_autocast", "the run's `precision` decides; remove it"),
        _refused("", "autotuning", "everest-ds tune searches here; remove it"),
        _refused("", "pipeline tensor_parallel expert_parallel", _OTHER_AXES),
        _refused("", "use_data_before_expert_parallelism", _OTHER_AXES),
        _refused("", "sequence_parallel_size", _OTHER_AXES, 1),
        _refused("", "compile", "model.compile compiles the blocks of a run; remove it"),
        _refused("", "hybrid_engine weight_quantization", "it is for inference; remove it"),
        _refused("", "data_efficiency", "a run's own loader chooses the clips and tokens; remove it"),
        _refused("", "datastates_ckpt", _OWN_CHECKPOINTS),
        _refused("checkpoint", "load_universal use_node_local_storage", _OWN_CHECKPOINTS),
        _refused("", "sparse_attention sparse_gradients curriculum_learning eigenvalue", _REMOVED),
        _refused("", "progressive_layer_drop compression_training quantize_training", _REMOVED),
        _refused("", "elasticity nebula graph_harvesting", _REMOVED),
        _refused("", "gradient_allreduce_op", 'a run averages gradients; write "mean"', "mean"),
        _refused("", "managed_gradient_accumulation", "the engine counts micro-batches; remove it", True),
        _refused("", "zero_force_ds_cpu_optimizer", "a run trains with torch's AdamW; write false"),
        _refused("", "bfloat16", 'it is the old name of "bf16"; rename it'),
        _refused("", "allgather_size", "it is an old name; write zero_optimization.allgather_bucket_size"),
        _refused("", "fp32_allreduce", 'it is an old name; write "communication_data_type": "fp32"'),
        _refused("optimizer", "adam_w_mode", _OWN_ADAMW, True),
        _refused(_ADAM, "adam_w_mode bias_correction", _OWN_ADAMW, True),
        _refused(_ADAM, "amsgrad maximize", _OWN_ADAMW),
        _refused(
            "activation_checkpointing", "contiguous_memory_optimization", "recompute has none; remove it"
        ),
        _refused("data_types", "param_dtype buffer_dtype", "the run's `precision` decides; remove it"),
        _refused("data_types", "keep_in_fp32_modules", "the run's `precision` decides; remove it"),
        _refused("fp16", "auto_cast", "the model converts its clips; remove it"),
        _refused("fp16", "fp16_master_weights_and_grads", _FLOAT32),
        _refused("bf16", "bf16_master_weights_and_grads bf16_optimizer_states", _FLOAT32),
        _refused("bf16", "check_grad_overflow check_overflow", _ALWAYS_SKIPPED, True),
        _refused("aio", "thread_count", "it is an old name; write intra_op_parallelism"),
        _refused("aio", "use_gds", "swapping to a disk goes through host memory; remove it"),
        _refused(ZERO, "zero_hpz_partition_size", _UNTESTED, 0, 1),
        _refused(ZERO, "zero_quantized_weights zero_quantized_nontrainable_weights", _UNTESTED),
        _refused(ZERO, "zero_quantized_gradients zenflow parameter_alignment", _UNTESTED),
        _refused(ZERO, "pipeline_loading_checkpoint", _OWN_CHECKPOINTS),
        _refused(ZERO, "leaf_module", "it names modules of other models; remove it"),
        _refused(ZERO, "compute_grad_norm", "a run logs the gradient norm; remove it", True),
        _refused(ZERO, "legacy_stage1 max_elements_per_comm mics_shard_size", _REMOVED),
        _refused(ZERO, "mics_hierarchical_params_gather zeropp_loco_param", _REMOVED),
        _refused(ZERO, "cpu_offload", 'it is an old name; write "offload_optimizer": {"device": "cpu"}'),
        _refused(ZERO, "cpu_offload_param", 'it is an old name; write "offload_param": {"device": "cpu"}'),
        _refused(ZERO, "cpu_offload_use_pin_memory", "it is an old name; write pin_memory in the offload"),
        *(
            _refused(ZERO, name, f"it is the short name of stage3_{name}; write that")
            for name in (
                "prefetch_bucket_size",
                "param_persistence_threshold",
                "model_persistence_threshold",
                "max_live_parameters",
                "max_reuse_distance",
                "gather_16bit_weights_on_model_save",
                "module_granularity_threshold",
                "use_all_reduce_for_fetch_params",
                "allgather_sequential",
            )
        ),
        _refused(f"{ZERO}.offload_optimizer", "ratio", "all states are offloaded; remove it", 1),
        _refused(f"{ZERO}.offload_optimizer", "super_offload", "it needs DeepSpeed's optimiser; remove it"),
    )
    for row in rows
)
SECTIONS = frozenset(
    name.rsplit(".", depth)[0] for name in DEEPSPEED_KEYS for depth in range(1, name.count(".") + 1)
)
