"""Tests of DeepSpeed files as people have them: accepted, compared, ignored or refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from everest_ds.config import Experiment, build_experiment, plan_ranks
from everest_ds.config.deepspeed_claims import check_claims, notes_on
from everest_ds.config.deepspeed_file import ds_config_path, read_deepspeed_file
from everest_ds.config.zero_settings import zero_settings
from everest_ds.errors import ConfigError
from everest_ds.shipped import shipped

BATCH = {"micro_batch_size": 8, "global_batch_size": 64}
SAMPLES = 640  # ten steps per epoch
# A run of 64 clips per step on four ranks: learning rates are multiplied by 64 / 256.
RUN: dict[str, Any] = {
    "task": "pretrain",
    "batch": BATCH,
    "schedule": {"epochs": 20, "warmup_epochs": 2, "base_lr": 4e-4, "warmup_lr": 4e-5, "min_lr": 8e-5},
    "optimizer": {"betas": [0.9, 0.95], "weight_decay": 0.05, "clip_grad_norm": 0.5},
}


def written(folder: Path, content: object) -> Path:
    file = folder / "mine.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def run_with(file: Path, *overrides: str, stage: int = 2) -> Experiment:
    overrides = (f"parallelism.ds_config={file}", f"parallelism.zero_stage={stage}", *overrides)
    return build_experiment(json.loads(json.dumps(RUN)), overrides, file)


def checked(config: Experiment, ranks: int = 4) -> list[str]:
    """Check the DeepSpeed file of a run, and return the notes on it."""
    file = read_deepspeed_file(config)
    check_claims(file, config, plan_ranks(config, ranks), SAMPLES)
    return notes_on(file)


def refusal(config: Experiment, ranks: int = 4) -> str:
    with pytest.raises(ConfigError) as error:
        checked(config, ranks)
    return str(error.value)


def autos(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, "auto")


TRAINER = {
    **autos("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    "fp16": {**autos("enabled"), "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": autos("enabled"),
    "optimizer": {"type": "AdamW", "params": autos("lr", "betas", "eps", "weight_decay")},
    "scheduler": {"type": "WarmupLR", "params": autos("warmup_min_lr", "warmup_max_lr", "warmup_num_steps")},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "reduce_scatter": True,
        **autos("reduce_bucket_size", "overlap_comm"),
    },
    "gradient_clipping": "auto",
    "steps_per_print": 100,
    "wall_clock_breakdown": False,
    "amp": {"enabled": "auto", "opt_level": "auto"},
}
ACCELERATE = {
    **autos("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "nvme_path": None},
        "offload_param": {"device": "none", "nvme_path": None},
    },
    "steps_per_print": float(2**31),
    "fp16": {"enabled": False},
    "bf16": {"enabled": True},
    "wandb": {"enabled": True, "project": "video"},
}
VIDEO = {  # written by a training script with `--enable_deepspeed`; names no stage
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {
        "type": "Adam",
        "adam_w_mode": True,
        "params": {"lr": 1e-4, "weight_decay": 0.05, "bias_correction": True, "betas": [0.9, 0.95]},
    },
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 7, "loss_scale_window": 128},
}
LANGUAGE = {  # of a pre-training script that switches everything else off
    "train_batch_size": 64,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 2, "cpu_offload": False, "reduce_bucket_size": 5e7},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {
            "total_num_steps": 200,
            "warmup_num_steps": 20,
            "warmup_min_ratio": 0.1,
            "cos_min_ratio": 0.2,
            "warmup_type": "linear",
        },
    },
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "gradient_clipping": 0.5,
    "prescale_gradients": False,
    "curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"},
    "data_efficiency": {"enabled": False, "seed": 1234},
    "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False},
    "tensorboard": {"enabled": True, "output_path": "logs"},
}


@pytest.mark.parametrize("tree", [TRAINER, ACCELERATE, VIDEO, LANGUAGE])
def test_files_as_people_have_them_are_accepted(tree: dict[str, Any], tmp_path: Path) -> None:
    config = run_with(written(tmp_path, tree))
    notes = "; ".join(checked(config))
    for key in ("steps_per_print", "wandb", "tensorboard"):
        assert (key in notes) == (key in tree)
    assert "wall_clock_breakdown" not in notes
    assert ("WarmupLR is replaced by the run's schedule" in notes) == (tree is TRAINER)
    settings = zero_settings(config)
    assert settings.offloads_optimizer == (tree is TRAINER) and not settings.offloads_parameters


def test_auto_means_the_value_of_the_shipped_file(tmp_path: Path) -> None:
    sizes = autos("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_module_granularity_threshold")
    zero = {"stage": "auto", "overlap_comm": "auto", "sub_group_size": 1e9, "stage3_max_live_parameters": 7e8}
    own = zero_settings(run_with(written(tmp_path, {"zero_optimization": sizes | zero}), stage=3))
    shipped_zero = json.loads((shipped("ds_configs") / "zero3.json").read_text())["zero_optimization"]
    assert own.reduce_bucket_values == shipped_zero["reduce_bucket_size"]
    assert own.prefetch_values == shipped_zero["stage3_prefetch_bucket_size"]
    assert own.overlap_comm and (own.sub_group_values, own.live_values) == (10**9, 7 * 10**8)
    assert own.reuse_values == 10**9  # absent: DeepSpeed's default


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_file_without_the_section_shards_as_the_shipped_file(stage: int, tmp_path: Path) -> None:
    own = zero_settings(run_with(written(tmp_path, {"gradient_clipping": 0.5}), stage=stage))
    assert own == zero_settings(build_experiment(dict(RUN), [f"parallelism.zero_stage={stage}"], tmp_path))


def test_every_contradiction_is_named_at_once_and_the_named_changes_remove_them(tmp_path: Path) -> None:
    claims: dict[str, Any] = {
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.5,
        "bf16": {"enabled": False},
        "fp16": {"enabled": True},
        "optimizer": {
            "type": "adamw",
            "params": {"lr": 3e-3, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.3},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": 80,
                "warmup_num_steps": 5,
                "warmup_min_ratio": 0.25,
                "cos_min_ratio": 0.5,
            },
        },
        "zero_optimization": {"stage": 1},
        "activation_checkpointing": {"cpu_checkpointing": True},
    }
    file = written(tmp_path, claims)
    said = refusal(run_with(file))
    for key in (
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        *("gradient_clipping", "bf16.enabled", "fp16.enabled", "zero_optimization.stage"),
        *(f"optimizer.params.{name}" for name in claims["optimizer"]["params"]),
        *(f"scheduler.params.{name}" for name in claims["scheduler"]["params"]),
        "activation_checkpointing.cpu_checkpointing",
    ):
        assert f"`{key}` contradicts the run config (" in said
    assert "`train_batch_size` contradicts the run config (256 in the file, 64 by batch.global_batch" in said
    assert "(0.003 in the file, 0.0004 by schedule.base_lr=0.0004, which the batch scales by 1)" in said
    changes = shlex.split(said.partition("change the run config: ")[2])
    assert "schedule.base_lr=0.003" in changes and "schedule.min_lr=0.0015" in changes
    checked(run_with(file, *changes, "recompute.mode=full", stage=1))


@pytest.mark.parametrize(
    ("claims", "own"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, BATCH),
        ({"gradient_accumulation_steps": 4}, BATCH),
        ({"gradient_accumulation_steps": 1}, BATCH | {"grad_accum_steps": 2}),
        ({"train_batch_size": 32}, BATCH | {"grad_accum_steps": 2}),
        ({"train_batch_size": 96}, {"micro_batch_size": 12}),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, BATCH),
        ({"train_micro_batch_size_per_gpu": 2}, {"micro_batch_size": 12, "grad_accum_steps": 2}),
    ],
)
def test_changes_of_the_batch_agree_with_the_ranks(
    claims: dict[str, int], own: dict[str, int], tmp_path: Path
) -> None:
    file = written(tmp_path, claims)
    given = [f"batch={json.dumps(own)}"]
    said = refusal(run_with(file, *given))
    changes = shlex.split(said.partition("change the run config: ")[2])
    checked(run_with(file, *given, *changes))


def test_sizes_that_no_batch_on_these_ranks_has_are_explained(tmp_path: Path) -> None:
    file = written(tmp_path, {"train_batch_size": 100, "train_micro_batch_size_per_gpu": 8})
    said = refusal(run_with(file))
    assert "is 100, but 8 clips x 3 accumulated micro-batches x 4 data-parallel ranks are 96" in said


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"zero_optimisation": {}}, "`zero_optimisation` is not a key of DeepSpeed (did you mean zero_opt"),
        (
            {"zero_optimization": {"stag": 2}},
            "`zero_optimization.stag` is not a key of DeepSpeed (did",
        ),
        ({"optimizer": {"params": {"learning_rate": 1}}}, "`optimizer.params.learning_rate` is not a key"),
        ({"zero_optimization": True}, "`zero_optimization` is true, not an object in braces"),
        (
            {"zero_optimization": {"stage": 4}},
            "`zero_optimization.stage` is 4, not a whole number from 0",
        ),
        ({"zero_optimization": {"stage": True}}, "`zero_optimization.stage` is true, not a whole number"),
        (
            {"zero_optimization": {"reduce_bucket_size": "5e8"}},
            '`zero_optimization.reduce_bucket_size` is "5e8", not a whole number from 1',
        ),
        (
            {"zero_optimization": {"sub_group_size": 2.5}},
            "`zero_optimization.sub_group_size` is 2.5, not a whole number from 1",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
            '`zero_optimization.offload_optimizer.device` is "gpu", not none or cpu or nvme',
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "`zero_optimization.offload_param.device` is cpu: DeepSpeed ignores it below stage 3",
        ),
        (
            {"zero_optimization": {"cpu_offload": True}},
            '`zero_optimization.cpu_offload` is true: it is an old name; write "offload_optimizer"',
        ),
        (
            {"optimizer": {"type": "Lamb", "params": {"max_coeff": 0.3}}},
            '`optimizer.type` is "Lamb": a run',
        ),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "`optimizer.params.adam_w_mode`"),
        (
            {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1}}},
            '`scheduler.type` is "One',
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 200}}},
            "`scheduler.type` is WarmupDecayLR, but a run decays by a cosine",
        ),
        ({"gradient_allreduce_op": "sum"}, '`gradient_allreduce_op` is "sum": a run averages'),
        ({"torch_autocast": {"enabled": True}}, "`torch_autocast` is"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "are both true"),
    ],
)
def test_what_a_run_cannot_do_is_refused_with_the_key_and_the_reason(
    tree: dict[str, Any], said: str, tmp_path: Path
) -> None:
    error = refusal(run_with(written(tmp_path, tree)))
    assert said in error and str(tmp_path / "mine.json") in error and "\n" not in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n  // mine\n  "bf16": {}\n}', "line 2, column 3: JSON has no comments"),
        ('{"bf16": {} # mine\n}', "line 1, column 13: JSON has no comments"),
        ('{"zero_optimization": {\n"stage": 2,\n}}', "the comma after the last entry is not allowed"),
        ("{'stage': 2}", "line 1, column 2: text is in double quotes in JSON"),
        ('{"bf16": {"enabled": True}}', "line 1, column 22: expecting value"),
        ('{"fp16": {}, "fp16": {}}', "key `fp16` is given twice"),
        ('{"optimizer": {"params": {"lr": NaN}}}', "`optimizer.params.lr` is NaN, not a number from 0"),
        (
            '{"optimizer": {"params": {"lr": 1e999}}}',
            "`optimizer.params.lr` is Infinity, not a number",
        ),
        ('{"optimizer": {"params": {"lr": 1' + "0" * 400 + "}}}", "`optimizer.params.lr` is 1000"),
        ('{"gradient_clipping": -1}', "`gradient_clipping` is -1, not a number from 0"),
        ('[{"bf16": {}}]', "not an object in braces"),
        ("", "line 1, column 1: expecting value"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1' + "0" * 5000 + "}", "not readable as DeepSpeed JSON"),
        ("\udcff", "codec can't decode"),
    ],
)
def test_a_damaged_file_is_named_with_its_line_or_key(text: str, said: str, tmp_path: Path) -> None:
    file = written(tmp_path, "")
    file.write_bytes(text.encode(errors="surrogateescape"))
    error = refusal(run_with(file))
    assert said in error and str(file) in error


def test_a_byte_order_mark_is_not_a_damage(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(json.dumps({"gradient_clipping": 0.5}).encode("utf-8-sig"))
    assert checked(run_with(file)) == []


@pytest.mark.parametrize("name", ["absent.json", ""])
def test_a_file_that_cannot_be_read_is_named_with_its_key(name: str, tmp_path: Path) -> None:
    config = run_with(tmp_path / name)
    assert ds_config_path(config) == tmp_path / name
    with pytest.raises(ConfigError, match=f"parallelism.ds_config: .*given: {tmp_path / name}.*fix: name a"):
        zero_settings(config)
