"""The ZeRO settings in a run's DeepSpeed file on which predicted memory and time depend."""

from __future__ import annotations

from dataclasses import dataclass, replace

from everest_ds.config.deepspeed_file import read_deepspeed_file, zero_values
from everest_ds.config.deepspeed_keys import AUTO, ZERO
from everest_ds.config.schema import Experiment

ALLREDUCE_VALUES = 500_000_000  # values that stage 0 all-reduces at once; DeepSpeed has no setting for it
# key of DeepSpeed's JSON -> attribute
BUCKET_KEYS = {"reduce_bucket_size": "reduce_bucket_values", "allgather_bucket_size": "gather_bucket_values"}


@dataclass(frozen=True)
class ZeroSettings:
    """The ZeRO settings of a run, with the defaults of DeepSpeed 0.19.8; sizes count values, not bytes.

    Attributes:
        overlap_comm: whether gradients are reduced during the backward pass.
        reduce_bucket_values: gradient values reduced in one collective.
        gather_bucket_values: weight values that stages 1 and 2 gather at once after the optimiser step.
        prefetch_values: stage 3: parameter values gathered ahead of their use.
        live_values: stage 3: at most this many parameter values are whole at the same time.
        reuse_values: stage 3: a parameter stays whole if it is used again within this many values.
        sub_group_values: stage 3: parameter values that the optimiser updates at once.
        persistent_values: stage 3: a parameter smaller than this stays whole on every rank.
        offloads_optimizer: whether optimiser states and gradient shards are in host memory or on a disk.
        offloads_parameters: whether weight shards are in host memory or on a disk.
        grad_accum_dtype: type of the gradient sum over micro-batches; "auto" leaves it to `sums_in_float32`.
    """

    overlap_comm: bool = False
    reduce_bucket_values: int = 500_000_000
    gather_bucket_values: int = 500_000_000
    prefetch_values: int = 50_000_000
    live_values: int = 10**9
    reuse_values: int = 10**9
    sub_group_values: int = 10**9
    persistent_values: int = 100_000
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    grad_accum_dtype: str = AUTO

    def sums_in_float32(self, precision: str, accumulates: bool) -> bool:
        """Return whether half-precision gradients are summed over micro-batches in float32.

        The default is yes for bf16, whose 8 significant bits lose almost 1 % over 32 micro-batches. If
        gradients are offloaded, DeepSpeed sums in the precision of training, as a float32 sum would stay on
        the device.
        """
        if self.grad_accum_dtype == AUTO:
            return precision == "bf16" and accumulates and not self.offloads_optimizer
        return precision in ("bf16", "fp16") and self.grad_accum_dtype == "fp32"

    def shards_nothing(self, stage: int, data_degree: int) -> bool:
        """Return whether stage 1 or 2 shards nothing: on one data-parallel rank, without offload."""
        return stage in (1, 2) and data_degree == 1 and not self.offloads_optimizer

    def with_buckets(self, num_values: int) -> ZeroSettings:
        """Return a copy whose reduce and gather buckets both hold `num_values` values."""
        return replace(self, reduce_bucket_values=num_values, gather_bucket_values=num_values)


# attribute -> key of DeepSpeed's `zero_optimization`
_KEYS = {
    "overlap_comm": "overlap_comm",
    **{attribute: key for key, attribute in BUCKET_KEYS.items()},
    "prefetch_values": "stage3_prefetch_bucket_size",
    "live_values": "stage3_max_live_parameters",
    "reuse_values": "stage3_max_reuse_distance",
    "sub_group_values": "sub_group_size",
    "persistent_values": "stage3_param_persistence_threshold",
}


def zero_settings(config: Experiment) -> ZeroSettings:
    """Read the ZeRO settings from the DeepSpeed file of a run.

    Raises:
        ConfigError: if the file cannot be read, or has keys or values that a run cannot use.
    """
    file, stage = read_deepspeed_file(config), config.parallelism.zero_stage
    file.check()
    values = zero_values(file, stage)
    given = {name: values[f"{ZERO}.{key}"] for name, key in _KEYS.items() if f"{ZERO}.{key}" in values}
    return ZeroSettings(
        **{"overlap_comm": stage == 3, **given},  # DeepSpeed's default
        offloads_optimizer=values.get(f"{ZERO}.offload_optimizer.device", "none") != "none",
        offloads_parameters=values.get(f"{ZERO}.offload_param.device", "none") != "none",
        grad_accum_dtype=file.settings.get("data_types.grad_accum_dtype", AUTO),
    )
