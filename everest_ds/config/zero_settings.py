"""The ZeRO settings of a run's DeepSpeed file, as far as memory and time depend on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from everest_ds.config.schema import Experiment
from everest_ds.shipped import shipped

# key of DeepSpeed's JSON -> attribute
BUCKET_KEYS = {"reduce_bucket_size": "reduce_bucket_values", "allgather_bucket_size": "gather_bucket_values"}


@dataclass(frozen=True)
class ZeroSettings:
    """ZeRO's settings, with the defaults of DeepSpeed 0.19.8; sizes count values, not bytes.

    Attributes:
        overlap_comm: reduces gradients beside the backward pass.
        reduce_bucket_values: gradients that are reduced at once.
        gather_bucket_values: weights that stages 1 and 2 gather at once after the optimiser's step.
        prefetch_values: of stage 3: parameters on their way to their use.
        live_values: parameters that are whole at once, at most.
        reuse_values: a parameter stays whole if it is used again within so many.
        sub_group_values: parameters that the optimiser steps at once.
        persistent_values: a smaller parameter is whole on every rank.
        offloads_optimizer: optimiser states and gradients' shards are in host memory, or beyond.
        offloads_parameters: and shards of weights.
        grad_accum_dtype: of the sum of micro-batches' gradients; "auto" leaves it to `sums_in_float32`.
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
    grad_accum_dtype: str = "auto"

    def sums_in_float32(self, precision: str, accumulates: bool) -> bool:
        """Return whether gradients of several micro-batches are summed in float32 in half precision.

        By default in bf16, whose 8 bits lose almost 1 % over 32 micro-batches. Where gradients are offloaded,
        DeepSpeed sums in the precision of training: a float32 sum would stay on the device.
        """
        if self.grad_accum_dtype == "auto":
            return precision == "bf16" and accumulates and not self.offloads_optimizer
        return precision in ("bf16", "fp16") and self.grad_accum_dtype == "fp32"

    def shards_nothing(self, stage: int, data_degree: int) -> bool:
        """Return whether stage 1 or 2 runs on one data-parallel rank, with nobody to share or sum with."""
        return stage in (1, 2) and data_degree == 1 and not self.offloads_optimizer

    def with_buckets(self, num_values: int) -> ZeroSettings:
        """The same with other buckets, of reduction and of gathering alike."""
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


def ds_config_path(config: Experiment) -> Path:
    """The DeepSpeed file of this run: the user's, or the shipped one of the stage."""
    parallelism = config.parallelism
    offload = "_offload" if parallelism.offload_to_cpu else "_nvme" if parallelism.offload_to_nvme else ""
    return parallelism.ds_config or shipped("ds_configs") / f"zero{parallelism.zero_stage}{offload}.json"


def zero_settings(config: Experiment) -> ZeroSettings:
    """Read the settings of the DeepSpeed file that the config names."""
    path = ds_config_path(config)
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _read(path: Path, changed_ns: int) -> ZeroSettings:
    """`changed_ns` tells one content of a file from the next."""
    tree = json.loads(path.read_text())
    zero = tree["zero_optimization"]
    given = {attribute: zero[key] for attribute, key in _KEYS.items() if key in zero}
    given = {name: value if name == "overlap_comm" else int(value) for name, value in given.items()}
    return ZeroSettings(
        **given,
        offloads_optimizer=_is_offloaded(zero, "offload_optimizer"),
        offloads_parameters=_is_offloaded(zero, "offload_param"),
        grad_accum_dtype=tree.get("data_types", {}).get("grad_accum_dtype", "auto"),
    )


def _is_offloaded(zero: Mapping[str, Any], key: str) -> bool:
    section = zero.get(key)
    return isinstance(section, dict) and section.get("device", "none") != "none"
