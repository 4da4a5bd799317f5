"""Tests of the DeepSpeed settings of a run: those from the run config, and those that a file may set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
    with pytest.raises(ConfigError, match="grad_accum_dtype.*given: fp16; allowed: auto, fp32, bf16"):
        resolved(2, 2, precision="bf16", ds_config=own)


@pytest.mark.parametrize("file", sorted(shipped("ds_configs").glob("*.json")), ids=lambda file: file.stem)
def test_shipped_files_leave_deepspeeds_timers_off(file: Path) -> None:
    """The shipped files turn off the timers, each call of which would wait for the device."""
    assert json.loads(file.read_text())["timers"] == {"throughput": {"enabled": False}}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_takes_what_is_resolved(stage: int) -> None:
    check_by_deepspeed(resolved(stage, 1, precision="fp32" if stage == 0 else "bf16"))
