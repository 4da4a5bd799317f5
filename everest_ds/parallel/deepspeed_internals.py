"""The undocumented names of DeepSpeed that this package uses, and a check that this version has all of them.

A release of DeepSpeed may rename any of them. The tables list them by the object that has them, and building
an engine looks each one up, so that a rename ends a run at its start with an error that names it. All modules
use them through the functions below, except `lean_update`, whose classes extend DeepSpeed's optimisers.

DeepSpeed is imported within the functions, because the device must be set before its import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from everest_ds.errors import EverestError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_VERSIONS = "0.19.8 or a later 0.19"  # as setup.py requires

# Names that this package uses, by module of DeepSpeed or, after a colon, by class of a module.
MODULES = {
    "deepspeed.ops.op_builder": "AsyncIOBuilder",
    "deepspeed.runtime.config": "DeepSpeedConfig",
    "deepspeed.runtime.utils": "all_gather_dp_groups is_model_parallel_parameter",
    "deepspeed.runtime.zero.partition_parameters:Init": "_convert_to_zero_parameters",
    "deepspeed.runtime.zero.stage3": "DeepSpeedZeroOptimizer_Stage3",
    "deepspeed.runtime.zero.stage_1_and_2": "DeepSpeedZeroOptimizer INITIAL_MICRO_STEP_ID",
    "deepspeed.utils.groups": "mpu",
    "deepspeed.utils.logging": "logger",
}
ENGINE = (
    "_global_grad_norm clip_fp32_gradients device fp16_enabled gradient_clipping mpu zero_optimization_stage"
)
# Optimisers of DeepSpeed by ZeRO stage: names that saving, restoring and logging use.
_FLATTENED = "loss_scaler optimizer overflow update_lp_params"
OPTIMIZERS = {
    1: _FLATTENED,
    2: _FLATTENED,
    3: "_optimizer_states_and_gradient_swap_in _optimizer_states_and_gradient_swap_out"
    " _swappable_optimizer_subgroup checkpoint_event_epilogue checkpoint_event_prologue"
    " fp32_partitioned_groups_flat get_param_id grad_position loss_scaler optimizer overflow swap_optimizer",
}
_NORM = "_model_parallel_all_reduce averaged_gradients dp_process_group model_parallel_rank"
_LEAN = (
    f"{_NORM} _add_to_grad_partition_buffer _clear_param_grad_only _clear_previous_reduced_grads"
    " _epilogue_ran_this_backward _fill_param_grad_accum_attribute _get_compact_grad_partition_buffer"
    " _global_grad_norm _lazy_init_hp_params_optimizer_state _release_ipg_buffers _update_scale"
    " _use_compact_grad_partition_buffer all_grad_tensors allgather_bucket_size backward_epilogue"
    " bit16_groups bit16_groups_flat clip_grad dtype first_offset get_all_grad_tensors get_flat_partition"
    " gradient_accumulation_dtype independent_gradient_partition_epilogue is_gradient_accumulation_boundary"
    " loss_scale micro_step_id nccl_start_alignment_factor optimizer overflow overlap_comm"
    " parallel_partitioned_bit16_groups params_already_reduced params_in_partition partition_gradients"
    " partition_size real_dp_process_group reduce_gradients reduce_ipg_grads reduction_stream"
    " single_partition_of_fp32_groups step use_grad_accum_attribute use_separate_grad_accum zero_grad"
)
# The same optimisers: names that `lean_update` replaces, or calls in its replacements.
UPDATES = {1: _LEAN, 2: _LEAN, 3: f"{_NORM} _get_norm_groups fp16_groups"}
PARAMETERS = {1: "_hp_mapping", 2: "_hp_mapping", 3: "ds_numel ds_shape ds_tensor"}
FRAGMENT = "hp_fragment_address lp_fragment_address param_group_index"
ADDRESS = "numel start"
SHARE = "ds_numel"
# Names that no new engine has yet. DeepSpeed finds out on first access, which takes seconds, which operators
# compile on this machine; it sets the other names on gradients during a step. A test finds all of them in
# DeepSpeed's source.
ON_DEMAND = {
    "deepspeed.ops": "__compatible_ops__",
    "deepspeed.runtime.zero.stage_1_and_2": "_zero_padding flat_partition grad_accum",
}
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # static scalers lack some


def check_modules() -> None:
    """Check that DeepSpeed has the modules, classes and functions that this package uses.

    Raises:
        EverestError: naming the first one that is missing, and the versions that have it.
    """
    for place, names in MODULES.items():
        module, _, kind = place.partition(":")
        try:
            found = import_module(module)
        except ModuleNotFoundError:
            raise _misfit(f"without {module}") from None
        for each in (kind, "") if kind else ("",):
            _check(module, found, each)
            found = getattr(found, each) if each else found
        _check(place, found, names)


def check_engine(engine: Any, lean_stage: int) -> None:
    """Check that a new engine, its optimiser and its parameters have the names that this package uses.

    Args:
        engine: DeepSpeed's engine, before `lean_update` replaces its update.
        lean_stage: the ZeRO stage whose update is to be replaced; 0 for none.

    Raises:
        EverestError: naming the first one that is missing, and the versions that have it.
    """
    for place, part, names in _parts(engine, lean_stage):
        _check(place, part, names)


def _parts(engine: Any, lean_stage: int) -> Iterator[tuple[str, object, str]]:
    """Yield each object of an engine that has undocumented names: its place, the object, the names."""
    yield "engine", engine, ENGINE
    stage = zero_stage(engine)
    if stage == 0:
        return
    yield "engine.optimizer", engine.optimizer, OPTIMIZERS[stage]
    if lean_stage:
        yield "engine.optimizer", engine.optimizer, UPDATES[lean_stage]
    parameters = list(engine.module.parameters())
    yield "parameter", parameters[0], PARAMETERS[stage]
    if stage == 3:
        yield "parameter.ds_tensor", parameters[0].ds_tensor, SHARE
        return
    for mapping in [p._hp_mapping for p in parameters if p._hp_mapping is not None][:1]:
        yield "parameter._hp_mapping", mapping, FRAGMENT
        yield "parameter._hp_mapping.hp_fragment_address", mapping.hp_fragment_address, ADDRESS
        yield "parameter._hp_mapping.lp_fragment_address", mapping.lp_fragment_address, ADDRESS


def check_type(optimizer: object, expected: type) -> None:
    """Check that DeepSpeed chose the optimiser class that `lean_update` extends.

    Raises:
        EverestError: naming the class that DeepSpeed chose.
    """
    if type(optimizer) is not expected:
        raise _misfit(f"with a {type(optimizer).__name__}, not a {expected.__name__}")


def _check(place: str, part: object, names: str) -> None:
    for name in names.split():
        if not hasattr(part, name):
            raise _misfit(f"without `{name}` of {place}")


def _misfit(found: str) -> EverestError:
    from deepspeed import __version__  # heavy

    return EverestError(
        "this version of DeepSpeed does not have the internals that EVEREST-DS uses",
        given=f"{__version__}, {found}",
        allowed=_VERSIONS,
        fix="pip install deepspeed==0.19.8",
    )


def silence() -> None:
    """Let DeepSpeed log errors only."""
    from deepspeed.utils.logging import logger

    logger.setLevel("ERROR")


def skip_shared_memory_collectives() -> None:
    """Keep DeepSpeed from compiling shared-memory collectives: that takes 35 s and changes no result."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def forget_mpu() -> None:
    """Make `deepspeed.initialize` take the given model-parallel unit, not that of the previous engine."""
    from deepspeed.utils import groups

    groups.mpu = None


def can_build_async_io() -> bool:
    """Return whether DeepSpeed can compile its asynchronous disk access here; libaio may be missing."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())


def swap_folder_of_rank(folder: Path, rank: int) -> Path:
    """Return the folder of the optimiser states of `rank`, given the `nvme_path` of the offload."""
    return folder / "zero_stage_3" / "optimizer" / f"rank{rank}"


def validate(resolved: dict[str, Any]) -> None:
    """Validate a resolved DeepSpeed JSON as the engine does; errors are DeepSpeed's own."""
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(deepcopy(resolved))  # a copy, because DeepSpeed modifies its argument


def shard_by(zero_init: Any, parameter: nn.Parameter) -> None:
    """Reduce a parameter to this rank's part, by the settings of a `deepspeed.zero.Init`."""
    zero_init._convert_to_zero_parameters([parameter])


def zero_stage(engine: Any) -> int:
    """Return the ZeRO stage of an engine."""
    return int(engine.zero_optimization_stage())


def set_clipping(engine: Any, clip: Callable[[], None]) -> None:
    """Replace the clipping of gradients at stage 0, where DeepSpeed calls it before each update."""
    engine.clip_fp32_gradients = clip


def found_overflow(engine: Any) -> bool:
    """Return whether the optimiser's last step found a gradient that is not finite; False at stage 0."""
    return bool(getattr(engine.optimizer, "overflow", False))


def inner_optimizer(optimizer: Any) -> torch.optim.AdamW:
    """Return the optimiser that DeepSpeed's optimiser of stages 1 to 3 wraps."""
    inner: torch.optim.AdamW = optimizer.optimizer
    return inner


def loss_scale(engine: Any) -> dict[str, int | float] | None:
    """Return the state of the fp16 loss scaler; None in other precisions."""
    if not engine.fp16_enabled():
        return None
    scaler = engine.optimizer.loss_scaler
    return {name: getattr(scaler, name) for name in _LOSS_SCALE if hasattr(scaler, name)}


def set_loss_scale(engine: Any, saved: dict[str, int | float] | None) -> None:
    """Restore a saved state of the fp16 loss scaler; None keeps DeepSpeed's initial state."""
    if saved is not None and engine.fp16_enabled():
        for name, value in saved.items():
            setattr(engine.optimizer.loss_scaler, name, value)


def unsharded_shape(parameter: Any) -> tuple[int, ...]:
    """Return the shape of a parameter before stage 3 sharded it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class Fragment(NamedTuple):
    """The elements of a parameter in this rank's part of a flattened group, at stages 1 and 2.

    Attributes:
        start: first element of the range in the flattened parameter.
        numel: number of elements in the range.
        group: index of the parameter group.
        offset: position of the range in this rank's part of the group.
    """

    start: int
    numel: int
    group: int
    offset: int


def fragment_of(parameter: Any) -> Fragment | None:
    """Return the part of a parameter that this rank holds at stage 1 or 2; None if it holds no element."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    address, offset = mapping.lp_fragment_address, mapping.hp_fragment_address.start
    return Fragment(address.start, address.numel, mapping.param_group_index, offset)


def publish_masters(optimizer: Any) -> None:
    """Update the forward pass's weights from the float32 weights at stage 1 or 2."""
    optimizer.update_lp_params()


def share_numel(parameter: Any) -> int:
    """Return the number of elements in each rank's share of a parameter at stage 3, padding included."""
    return int(parameter.ds_tensor.ds_numel)


def numel_of_all_shares(parameter: Any) -> int:
    """Return the number of elements that a parameter had before stage 3 sharded it."""
    return int(parameter.ds_numel)


def set_share(parameter: Any, values: Tensor) -> None:
    """Set this rank's share of a weight at stage 3, in the training precision."""
    parameter.ds_tensor.data.copy_(values)


def regather(optimizer: Any) -> None:
    """Release the small parameters, which stage 3 keeps gathered between steps, and gather the new shares."""
    optimizer.checkpoint_event_prologue()
    optimizer.checkpoint_event_epilogue()


def flat_groups(optimizer: Any) -> list[Tensor]:
    """Return this rank's float32 weights at stage 3, a flat tensor for each group of parameters."""
    groups: list[Tensor] = optimizer.fp32_partitioned_groups_flat
    return groups


def offloads_to_disk(optimizer: Any) -> bool:
    """Return whether stage 3 keeps the optimiser states on a disk."""
    return bool(optimizer.swap_optimizer)


def place_in_groups(optimizer: Any, parameter: Any) -> tuple[int, int, int]:
    """Return a parameter's flat group at stage 3, and the start and length of this rank's share in it."""
    group, start, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return group, start, numel


def fetch_states(optimizer: Any, group: int) -> None:
    """Read the optimiser states of a flat group from the disk; small groups are always in memory."""
    if optimizer._swappable_optimizer_subgroup(group):
        optimizer._optimizer_states_and_gradient_swap_in(group)


def send_back_states(optimizer: Any, group: int) -> None:
    """Write the optimiser states of a flat group to the disk and free them; small groups stay in memory."""
    if optimizer._swappable_optimizer_subgroup(group):
        optimizer._optimizer_states_and_gradient_swap_out(group)
