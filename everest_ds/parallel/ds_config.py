"""The DeepSpeed JSON of a run: a DeepSpeed file whose open values are filled in from the run config.

The DeepSpeed file says how to shard. All other settings that it may repeat belong to the run config alone: a
DeepSpeed file that sets one of them to another value is refused. On one data-parallel rank, stages 1 and 2
without offload have no gradients to reduce, so the file's settings for the reduction are replaced.
"""

from __future__ import annotations

from typing import Any

from everest_ds.config import Experiment, plan_ranks
from everest_ds.config.deepspeed_claims import check_claims
from everest_ds.config.deepspeed_file import read_deepspeed_file, zero_values
from everest_ds.config.deepspeed_keys import DEEPSPEED_KEYS, ZERO
from everest_ds.config.load import nested
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.config.zero_settings import zero_settings
from everest_ds.errors import ConfigError
from everest_ds.parallel.deepspeed_internals import validate
from everest_ds.parallel.nvme import check_nvme, swap_folder

# On one data-parallel rank, stage 2 equals stage 1: there is no bucket to fill and no stream to wait for.
_UNREDUCED = {"stage": 1, "overlap_comm": False, "contiguous_gradients": False}
# The timers would wait for the device, to print figures that a run does not show.
_QUIET = {"steps_per_print": 2**31, "timers": {"throughput": {"enabled": False}}}
# The optimiser of a run is torch's AdamW, which a file for DeepSpeed's own optimisers does not expect.
_TORCH_ADAMW = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def resolve_ds_config(config: Experiment, num_ranks: int, num_samples: int | None = None) -> dict[str, Any]:
    """Read the DeepSpeed file that the config names and fill in its open values for `num_ranks` ranks.

    Args:
        config: the run config.
        num_ranks: ranks of the run.
        num_samples: samples per epoch, to compare a schedule that counts steps; None if it is not known.

    Raises:
        ConfigError: if the file has unknown keys, keys that a run cannot honour, or other values for settings
            of the run config; or if this machine does not support the offload.
    """
    plan = plan_ranks(config, num_ranks)
    check_nvme(config)
    file, stage = read_deepspeed_file(config), config.parallelism.zero_stage
    check_claims(file, config, plan, num_samples)
    values = file.settings | zero_values(file, stage)
    passed = {key: value for key, value in values.items() if DEEPSPEED_KEYS[key].use == "passed"}
    tree = {**_QUIET, **nested(passed), **_TORCH_ADAMW}
    tree["train_micro_batch_size_per_gpu"] = plan.micro_batch_size
    tree["gradient_accumulation_steps"] = plan.grad_accum_steps
    tree["gradient_clipping"] = config.optimizer.clip_grad_norm or 0.0
    tree[ZERO] = {**tree.get(ZERO, {}), "stage": stage}
    folder = swap_folder(config)
    if folder is not None:
        tree[ZERO]["offload_optimizer"]["nvme_path"] = str(folder)
    zero = zero_settings(config)
    in_float32 = zero.sums_in_float32(config.precision, plan.grad_accum_steps > 1)
    if in_float32 or "data_types.grad_accum_dtype" in file.settings:
        given = file.settings.get("data_types.grad_accum_dtype", "fp32")
        tree["data_types"] = {"grad_accum_dtype": given}
    if zero.shards_nothing(stage, MeshShape.of(config, num_ranks).degrees.data):
        tree[ZERO] |= _UNREDUCED
    for precision in ("bf16", "fp16"):
        if precision == config.precision or precision in tree:
            tree[precision] = {**tree.get(precision, {}), "enabled": precision == config.precision}
    return tree


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


def _tell_device() -> None:
    """Set DeepSpeed's device before its import; otherwise DeepSpeed searches for one and warns about it."""
    import torch  # heavy

    from everest_ds.parallel.world import prepare_deepspeed

    prepare_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
