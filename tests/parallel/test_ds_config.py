"""Tests of the DeepSpeed settings of a run: those from the run config, and those that a file may set."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from everest_ds.config.deepspeed_keys import DEEPSPEED_KEYS, SECTIONS, ZERO
from everest_ds.config.load import nested
from everest_ds.errors import ConfigError
from everest_ds.parallel.ds_config import check_by_deepspeed, resolve_ds_config
from everest_ds.shipped import shipped
from tests.parallel.equality import experiment


def resolved(stage: int, ranks: int, **kwargs: Any) -> dict[str, Any]:
    config = experiment("pretrain", stage, ranks, **kwargs)
    return resolve_ds_config(config, ranks)


def own_file(folder: Path, stage: int, **changes: Any) -> Path:
    tree = json.loads((shipped("ds_configs") / f"zero{stage}.json").read_text())
    (folder / "own.json").write_text(json.dumps(tree | changes))
    return folder / "own.json"


@pytest.mark.parametrize("stage", [1, 2])
def test_one_data_rank_reduces_nothing(stage: int, tmp_path: Path) -> None:
    alone = {"stage": 1, "overlap_comm": False, "contiguous_gradients": False}
    for ds_config in (None, own_file(tmp_path, stage)):
        assert resolved(stage, 1, ds_config=ds_config)["zero_optimization"].items() >= alone.items()
        two = resolved(stage, 2, ds_config=ds_config)["zero_optimization"]
        assert two["stage"] == stage and two["overlap_comm"]


@pytest.mark.parametrize(("stage", "offload"), [(2, True), (3, False), (3, True)])
def test_what_is_offloaded_or_sharded_whole_stays_as_the_file_says(stage: int, offload: bool) -> None:
    zero = resolved(stage, 1, offload=offload)["zero_optimization"]
    assert zero["stage"] == stage and zero["overlap_comm"] and zero["contiguous_gradients"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_micro_batches_are_summed_in_float32_unless_the_file_says_otherwise(
    stage: int, tmp_path: Path
) -> None:
    assert resolved(stage, 2, precision="bf16")["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in resolved(stage, 2, precision="fp32")
    own = own_file(tmp_path, stage, data_types={"grad_accum_dtype": "bf16"})
    kept = resolved(stage, 2, precision="bf16", ds_config=own)["data_types"]
    assert kept == {"grad_accum_dtype": "bf16"}


def test_offloaded_gradients_are_summed_as_deepspeed_does() -> None:
    assert "data_types" not in resolved(2, 2, precision="bf16", offload=True)


def test_sums_in_a_third_type_are_refused(tmp_path: Path) -> None:
    own = own_file(tmp_path, 2, data_types={"grad_accum_dtype": "fp16"})
    with pytest.raises(ConfigError, match="grad_accum_dtype` is fp16: write auto or bf16 or fp32"):
        resolved(2, 2, precision="bf16", ds_config=own)


@pytest.mark.parametrize("file", sorted(shipped("ds_configs").glob("*.json")), ids=lambda file: file.stem)
def test_shipped_files_leave_deepspeeds_timers_off(file: Path) -> None:
    """The shipped files turn off the timers, each call of which would wait for the device."""
    assert json.loads(file.read_text())["timers"] == {"throughput": {"enabled": False}}


def test_what_deepspeed_refuses_is_an_error_of_ours() -> None:
    tree = resolved(1, 1)
    tree["zero_optimization"]["reduce_bucket_size"] = 0
    with pytest.raises(ConfigError, match="DeepSpeed refuses the config.*reduce_bucket_size"):
        check_by_deepspeed(tree)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_takes_what_is_resolved(stage: int) -> None:
    check_by_deepspeed(resolved(stage, 1, precision="fp32" if stage == 0 else "bf16"))


# Values of every kind that people write, right and wrong.
VALUES = [
    *("auto", None, True, False, 0, 1, 2, 3, 8, 0.5, 1e-9, 5e8, 10**9, -1, 2.5, float("inf"), "5e8", "yes"),
    *("none", "cpu", "nvme", "fp32", "bf16", "AdamW", "WarmupCosineLR", "linear", "mean", "/disk"),
    *([], [0.9, 0.95], ["Block"], {}, {"enabled": True}, {"enabled": "auto"}, {"stage": 1}),
]


NUMBERS = count()


def taken(tree: dict[str, Any], folder: Path, stage: int) -> tuple[dict[str, Any], str]:
    """Return the resolved settings of a file, and the error if it is refused."""
    file = (
        folder / f"{next(NUMBERS)}.json"
    )  # the reader keeps files, and a second write may have the same time
    file.write_text(json.dumps(tree))
    config = EXPERIMENTS[stage]
    parallelism = config.parallelism.model_copy(update={"ds_config": file})
    try:
        return resolve_ds_config(config.model_copy(update={"parallelism": parallelism}), 1), ""
    except ConfigError as error:
        assert str(file) in str(error)
        return {}, str(error)


EXPERIMENTS = {stage: experiment("pretrain", stage, 1, precision="bf16") for stage in (1, 2, 3)}


@pytest.mark.parametrize("section", sorted({key.rpartition(".")[0] for key in DEEPSPEED_KEYS}))
def test_every_value_of_every_key_is_taken_by_deepspeed_or_refused_by_name(
    section: str, tmp_path: Path
) -> None:
    for key, row in DEEPSPEED_KEYS.items():
        if key.rpartition(".")[0] == section:
            assert taken(nested({key: "auto"}), tmp_path, 3)[0], key
            for value in VALUES:
                resolved_file, error = taken(nested({key: value}), tmp_path, 3)
                assert resolved_file or f"`{key}`" in error
                if resolved_file and row.use == "passed":
                    check_by_deepspeed(resolved_file)


def drawn_values(key: str) -> st.SearchStrategy[Any]:
    """Draw a value of a key: one that it takes three times out of four, otherwise any."""
    kind = DEEPSPEED_KEYS[key]
    valid = [one for one in VALUES if kind.use != "refused" and kind.kind.holds(one)]
    return st.integers(0, 3).flatmap(lambda n: st.sampled_from(["auto", *valid] if n else VALUES))


FILES = st.lists(
    st.sampled_from(sorted(DEEPSPEED_KEYS)).flatmap(lambda key: st.tuples(st.just(key), drawn_values(key))),
    max_size=8,
).map(lambda pairs: nested(dict(pairs)))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=FILES, stage=st.sampled_from([1, 2, 3]))
def test_a_file_is_taken_by_deepspeed_or_refused_by_name(
    tree: dict[str, Any], stage: int, tmp_path: Path
) -> None:
    resolved_file, error = taken(tree, tmp_path, stage)
    event(f"accepted: {bool(resolved_file)}")
    if resolved_file:
        check_by_deepspeed(resolved_file)
    else:
        assert any(f"`{key}" in error for key in DEEPSPEED_KEYS)


def test_every_key_of_deepspeed_is_known() -> None:
    """Every field of DeepSpeed's own config classes is in the list, so no known key is called unknown."""
    from deepspeed.runtime import config as ds
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        ZERO: DeepSpeedZeroConfig,
        f"{ZERO}.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        f"{ZERO}.offload_param": DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    known = set(DEEPSPEED_KEYS) | SECTIONS
    for section, model in models.items():
        for name, field in model.model_fields.items():
            assert {f"{section}.{name}", f"{section}.{field.alias or name}"} <= known
    top = {ds.__dict__[name] for name in TOP_LEVEL_NAMES.split()}
    assert top | set(ds._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= known
    assert {f"{ZERO}.{key}" for key in ds._REMOVED_ZERO_CONFIG_KEYS} <= known


# DeepSpeed's constants for the keys that its config reads at the top of a file.
TOP_LEVEL_NAMES = """
    TRAIN_BATCH_SIZE TRAIN_MICRO_BATCH_SIZE_PER_GPU GRADIENT_ACCUMULATION_STEPS MANAGED_GRADIENT_ACCUMULATION
    OPTIMIZER SCHEDULER STEPS_PER_PRINT DUMP_STATE DISABLE_PYTHON_GC DISABLE_ALLGATHER GRADIENT_CLIPPING
    COMMUNICATION_DATA_TYPE SEQ_PARALLEL_COMMUNICATION_DATA_TYPE PRESCALE_GRADIENTS GRADIENT_PREDIVIDE_FACTOR
    GRADIENT_ALLREDUCE_OP ZERO_ALLOW_UNTESTED_OPTIMIZER ZERO_FORCE_DS_CPU_OPTIMIZER WALL_CLOCK_BREAKDOWN
    MEMORY_BREAKDOWN BFLOAT16 BFLOAT16_OLD FP16 TORCH_AUTOCAST VOCABULARY_SIZE CHECKPOINT DATA_TYPES
    DATALOADER_DROP_LAST USE_DATA_BEFORE_EXPERT_PARALLEL LOG_LEVEL EXPERT_PARALLEL DATA_EFFICIENCY
"""
