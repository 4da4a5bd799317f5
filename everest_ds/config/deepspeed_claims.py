"""The settings of the run config that a DeepSpeed file repeats, compared with those of the run.

A file of Hugging Face's Trainer or of VideoMAE also names batch sizes, an optimiser and a schedule. The run
config decides all of them. A file that says `auto`, nothing, or the same is accepted; all other values are
named at once, with the settings of the run config that agree with the file.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from everest_ds.config.batch import BatchPlan
from everest_ds.config.deepspeed_file import DeepSpeedFile
from everest_ds.config.schema import Experiment

_GLOBAL, _MICRO = "train_batch_size", "train_micro_batch_size_per_gpu"
_ACCUM = "gradient_accumulation_steps"
STAGE_KEY, SUM_DTYPE_KEY = "zero_optimization.stage", "data_types.grad_accum_dtype"
_COSINE = "WarmupCosineLR"  # DeepSpeed's name of a run's schedule
# Key of the file that the run config decides -> key of the run config.
RUN_KEYS = {
    STAGE_KEY: "parallelism.zero_stage",
    _GLOBAL: "batch.global_batch_size",
    _MICRO: "batch.micro_batch_size",
    _ACCUM: "batch.grad_accum_steps",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "optimizer.params.max_grad_norm": "optimizer.clip_grad_norm",
    "optimizer.params.lr": "schedule.base_lr",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "scheduler.params.warmup_min_ratio": "schedule.warmup_lr",
    "scheduler.params.warmup_min_lr": "schedule.warmup_lr",
    "scheduler.params.warmup_max_lr": "schedule.base_lr",
    "scheduler.params.cos_min_ratio": "schedule.min_lr",
    "scheduler.params.warmup_num_steps": "schedule.warmup_epochs",
    "scheduler.params.total_num_steps": "schedule.epochs",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
    "activation_checkpointing.partition_activations": "recompute.partition",
    "activation_checkpointing.cpu_checkpointing": "recompute.offload_to_cpu",
}


class Claim(NamedTuple):
    """A value of the run, for comparison with a key of the DeepSpeed file.

    Attributes:
        key: dotted key of the file.
        value: the value that the run config gives.
        convert: returns the value of the run config's key with which a value of the file agrees, or None if
            there is none.
        source: the setting of the run config that gives the value; by default the key's name.
    """

    key: str
    value: Any
    convert: Callable[[Any], Any] = lambda value: value
    source: str = ""


class Contradiction(NamedTuple):
    """A key of the DeepSpeed file whose value is not that of the run.

    Attributes:
        key: dotted key of the file.
        text: human-readable fault.
        changes: settings of the run config with which the file agrees, by key.
    """

    key: str
    text: str
    changes: dict[str, Any]


def check_claims(
    file: DeepSpeedFile, config: Experiment, plan: BatchPlan, num_samples: int | None = None
) -> None:
    """Check a DeepSpeed file, and that it agrees with the run config.

    Args:
        file: the DeepSpeed file of the run.
        config: the run config.
        plan: the clips of an optimiser step of the run.
        num_samples: samples per epoch, for schedules that count steps; None if it is not known yet.

    Raises:
        ConfigError: naming every fault of the file and every contradiction, and how to remove them.
    """
    found = list(_contradictions(file, config, plan, num_samples))
    changes = {key: value for one in found for key, value in one.changes.items()}
    fix = f'write "auto" for {"it" if len(found) == 1 else "the keys that contradict"} in the file'
    if changes:
        fix += f", or change the run config: {' '.join(map(_override, changes, changes.values()))}"
    file.check([*_impossible(file, config), *(one.text for one in found)], fix if found else None)


def _contradictions(
    file: DeepSpeedFile, config: Experiment, plan: BatchPlan, num_samples: int | None = None
) -> Iterator[Contradiction]:
    """Yield the keys of a DeepSpeed file that contradict the run config; see `check_claims`."""
    claimed = _claimed_plan(file, config, plan)
    yield from _batch_contradictions(file, config, plan, claimed)
    # The other claims are compared at the file's batch, so that all changes can be made at once.
    scale = config.schedule.rate_scale(max(1, claimed.samples_per_step))
    per_epoch = (num_samples or 0) // max(1, claimed.samples_per_step)
    for claim in (
        *_run_claims(file, config),
        *_rate_claims(file, config, scale),
        *_step_claims(config, per_epoch),
    ):
        given = file.settings.get(claim.key)
        if given is not None and not _agree(given, claim.value):
            agreeing = claim.convert(given)
            yield _contradiction(file, claim, {} if agreeing is None else {RUN_KEYS[claim.key]: agreeing})


def _contradiction(file: DeepSpeedFile, claim: Claim, changes: dict[str, Any]) -> Contradiction:
    source = claim.source or RUN_KEYS[claim.key]
    says = f"{_text(file.settings[claim.key])} in the file, {_text(claim.value)} by {source}"
    return Contradiction(claim.key, f"`{claim.key}` contradicts the run config ({says})", changes)


def _text(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else json.dumps(value)


def _override(key: str, value: Any) -> str:
    """Return a setting of the run config as it is typed in a shell."""
    text = value if isinstance(value, str) else _text(value).replace(" ", "")
    return shlex.quote(f"{key}={text}")


def _agree(given: Any, value: Any) -> bool:
    if isinstance(value, list):
        return len(given) == len(value) and all(map(_agree, given, value))
    if isinstance(value, str | bool):
        return bool(given == value)
    return math.isclose(given, value, rel_tol=1e-6)


def _claimed_plan(file: DeepSpeedFile, config: Experiment, plan: BatchPlan) -> BatchPlan:
    """Return the batch plan by the sizes in the file; sizes that are not in the file follow from the run."""
    micro = file.settings.get(_MICRO, plan.micro_batch_size)
    total = file.settings.get(_GLOBAL, config.batch.global_batch_size)
    derived = max(1, total // (micro * plan.data_parallel_degree)) if total else plan.grad_accum_steps
    accum = file.settings.get(_ACCUM, derived)
    return replace(plan, micro_batch_size=micro, grad_accum_steps=accum)


def _batch_contradictions(
    file: DeepSpeedFile, config: Experiment, plan: BatchPlan, claimed: BatchPlan
) -> Iterator[Contradiction]:
    total, found = file.settings.get(_GLOBAL), claimed.global_batch_size
    if total not in (None, found):
        sizes = (
            f"{claimed.micro_batch_size} clips x {claimed.grad_accum_steps} accumulated micro-batches"
            f" x {claimed.data_parallel_degree} data-parallel ranks"
        )
        yield Contradiction(_GLOBAL, f"`{_GLOBAL}` is {total}, but {sizes} are {found}", {})
        return
    for claim in _batch_claims(plan):
        if file.settings.get(claim.key, claim.value) != claim.value:
            yield _contradiction(file, claim, _batch_changes(config, plan, claimed))


def _batch_claims(plan: BatchPlan) -> Iterator[Claim]:
    yield Claim(_GLOBAL, plan.global_batch_size)
    yield Claim(_MICRO, plan.micro_batch_size)
    yield Claim(_ACCUM, plan.grad_accum_steps)


def _batch_changes(config: Experiment, plan: BatchPlan, claimed: BatchPlan) -> dict[str, Any]:
    """Return the settings of the run config that turn `plan` into `claimed`."""
    changes = {
        RUN_KEYS[own.key]: wanted.value
        for own, wanted in zip(_batch_claims(plan), _batch_claims(claimed), strict=True)
        if own.value != wanted.value
    }
    # Accumulation follows from a global batch, unless the run config sets both.
    has_total = config.batch.global_batch_size is not None
    needless = RUN_KEYS[_GLOBAL if not has_total else _ACCUM]
    if not has_total or config.batch.grad_accum_steps is None:
        changes.pop(needless, None)
    return changes


def _run_claims(file: DeepSpeedFile, config: Experiment) -> Iterator[Claim]:
    """Yield the claims that depend on no batch."""
    optimizer, clipping = config.optimizer, config.optimizer.clip_grad_norm or 0.0
    yield Claim(STAGE_KEY, config.parallelism.zero_stage)
    for key in ("gradient_clipping", "optimizer.params.max_grad_norm"):
        yield Claim(key, clipping, lambda value: value or "null")
    yield Claim("optimizer.params.betas", list(optimizer.betas))
    yield Claim("optimizer.params.eps", optimizer.eps)
    yield Claim("optimizer.params.weight_decay", optimizer.weight_decay)
    own, agreeing = f"precision={config.precision}", _precision(file, config)
    for precision in ("bf16", "fp16"):
        yield Claim(f"{precision}.enabled", config.precision == precision, lambda value: agreeing, own)
    yield Claim("activation_checkpointing.partition_activations", config.recompute.partition)
    yield Claim("activation_checkpointing.cpu_checkpointing", config.recompute.offload_to_cpu)


def _precision(file: DeepSpeedFile, config: Experiment) -> str:
    """Return the precision of a run that agrees with the file."""
    switches = {name: file.settings.get(f"{name}.enabled") for name in ("bf16", "fp16")}
    enabled = [name for name, switch in switches.items() if switch]
    return enabled[0] if enabled else "fp32" if switches.get(config.precision) is False else config.precision


def _rate_claims(file: DeepSpeedFile, config: Experiment, scale: float) -> Iterator[Claim]:
    """Yield the claims about learning rates, which a run multiplies by `scale`."""
    schedule, rates = config.schedule, {"optimizer.params.lr": "base_lr"}
    rates |= {"scheduler.params.warmup_max_lr": "base_lr", "scheduler.params.warmup_min_lr": "warmup_lr"}
    for key, name in rates.items():
        own = getattr(schedule, name)
        source = f"schedule.{name}={own:.7g}, which the batch scales by {scale:.7g}"
        yield Claim(key, own * scale, lambda value: value / scale, source)
    base_lr = file.settings.get("optimizer.params.lr", 0) / scale or schedule.base_lr
    for key, name in (("warmup_min_ratio", "warmup_lr"), ("cos_min_ratio", "min_lr")):
        ratio = getattr(schedule, name) / base_lr
        yield Claim(f"scheduler.params.{key}", ratio, lambda value: value * base_lr)


def _step_claims(config: Experiment, per_epoch: int) -> Iterator[Claim]:
    """Yield the claims about numbers of steps, if the steps per epoch are known."""
    if per_epoch:
        schedule = config.schedule
        yield Claim(
            "scheduler.params.total_num_steps",
            schedule.epochs * per_epoch,
            lambda steps: None if steps % per_epoch else steps // per_epoch or None,
        )
        warmup = round(schedule.warmup_epochs * per_epoch)
        yield Claim("scheduler.params.warmup_num_steps", warmup, lambda steps: steps / per_epoch)


def _impossible(file: DeepSpeedFile, config: Experiment) -> Iterator[str]:
    """Yield the faults of a file that no change of the run config's values removes."""
    settings, zero = file.settings, "zero_optimization"
    stage = settings.get(STAGE_KEY, config.parallelism.zero_stage)
    for part, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = settings.get(f"{zero}.{part}.device", "none")
        if device == "nvme" and config.parallelism.offload_to_nvme is None:
            yield (
                f"`{zero}.{part}.device` is nvme, which only the run config may set: remove it and set"
                " parallelism.offload_to_nvme; weights offload to host memory at most"
            )
        elif device != "none" and stage < lowest:
            yield f"`{zero}.{part}.device` is {device}: DeepSpeed ignores it below stage {lowest}; remove it"
    if settings.get("bf16.enabled") and settings.get("fp16.enabled"):
        yield "`bf16.enabled` and `fp16.enabled` are both true: remove one of them"
    allowed = {"fp32", _precision(file, config)} - {"tf32"}
    if settings.get(SUM_DTYPE_KEY, "fp32") not in allowed:
        given = settings[SUM_DTYPE_KEY]
        yield f"`{SUM_DTYPE_KEY}` is {given}: write {' or '.join(['auto', *sorted(allowed)])}"
    yield from _impossible_schedule(file)


def _impossible_schedule(file: DeepSpeedFile) -> Iterator[str]:
    kind = file.settings.get("scheduler.type", _COSINE)
    given = [key for key in file.settings if key.startswith("scheduler.params.")]
    if given and kind.lower() != _COSINE.lower():
        yield (
            f'`scheduler.type` is {kind}, but a run decays by a cosine: write {_COSINE}, or "auto" for'
            f" {', '.join(given)}"
        )
    if file.settings.get("scheduler.params.warmup_type", "linear") != "linear":
        yield '`scheduler.params.warmup_type` is log, but the warm-up of a run is linear: write "linear"'


def notes_on(file: DeepSpeedFile) -> list[str]:
    """Return a line for each group of keys of an accepted file that a run replaces by its own."""
    found = []
    if file.ignored:
        found.append(
            f"ignored, because a run logs, profiles, loads and saves by itself: {', '.join(file.ignored)}"
        )
    kind = file.settings.get("scheduler.type", _COSINE)
    if kind.lower() != _COSINE.lower():
        found.append(
            f"scheduler.type {kind} is replaced by the run's schedule (linear warm-up, then cosine decay),"
            " because all parameters of the scheduler are auto"
        )
    return found
