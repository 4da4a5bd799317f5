"""Tests of the search: against an exhaustive search, and the reasons that it gives for what it leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from everest_ds.config import Experiment, load_experiment, plan_ranks
from everest_ds.config.load import flatten
from everest_ds.costs.hardware.data_sheet import machine_from_sheet
from everest_ds.costs.hardware.gpus import DEVICES
from everest_ds.costs.hardware.machine import Machine
from everest_ds.costs.memory import predict_memory
from everest_ds.costs.step_time import predict_step
from everest_ds.errors import ConfigError, EverestError, UsageError
from everest_ds.tuning.batches import keep_global_batch
from everest_ds.tuning.cluster import Cluster
from everest_ds.tuning.explain import fits_nowhere, slower_families, why_slower
from everest_ds.tuning.knobs import KNOBS, SEARCHED, bucket_sizes
from everest_ds.tuning.search import Options, SearchResult, search
from everest_ds.tuning.space import Space
from everest_ds.units import format_bytes

MIB = 2**20
EIGHT_RANKS = 8


def machine(device: str = "H100 SXM", memory_bytes: int | None = None) -> Machine:
    found = machine_from_sheet(device, DEVICES[device])
    return replace(found, memory_bytes=memory_bytes or found.memory_bytes)


def recipe(*overrides: str, name: str = "k400_pretrain_vit_base") -> Experiment:
    return load_experiment(name, overrides)


def find(
    config: Experiment, ranks: int = EIGHT_RANKS, on: Machine | None = None, **options: object
) -> SearchResult:
    return search(config, Cluster(on or machine(), ranks), Options(**options))  # type: ignore[arg-type]


def everything(config: Experiment) -> Iterator[Experiment]:
    """Yield every config that a config file can express and that passes its own validation."""
    tree = config.model_dump()
    axes = product(
        (0, 1, 2, 3),
        (1, 2, 4, 8),
        (False, True),
        ("none", "gelu", "attention", "mlp", "blocks", "full"),
        (2, 3, 4),
        (False, True),
        (False, True),
        (1, 2, 4, 8, 16, 32),
    )
    for stage, tensor, offload, mode, every, on_host, partition, clips in axes:
        if mode != "blocks" and every != 2:
            continue
        sharding = {"zero_stage": stage, "tensor": tensor, "offload_to_cpu": offload}
        recompute = {"mode": mode, "every": every, "offload_to_cpu": on_host, "partition": partition}
        batch = {"micro_batch_size": clips, "global_batch_size": config.batch.global_batch_size}
        try:
            one = Experiment.model_validate(
                {**tree, "parallelism": sharding, "recompute": recompute, "batch": batch}
            )
            plan_ranks(one, EIGHT_RANKS)
        except (ValueError, EverestError):
            continue
        yield one


def family_of(config: Experiment) -> tuple[object, ...]:
    parallelism = config.parallelism
    return config.precision, parallelism.zero_stage, parallelism.tensor, parallelism.offload_to_cpu


@pytest.mark.parametrize("memory_mib", [900, 1400, 40_000])
def test_the_search_finds_what_a_search_of_everything_finds(memory_mib: int) -> None:
    """The memory sizes call for offload, for recompute, and for neither."""
    config = recipe("batch.global_batch_size=64", "data.num_workers=14")
    on = machine(memory_bytes=memory_mib * MIB)
    fitting = [
        one for one in everything(config) if predict_memory(one, EIGHT_RANKS).peak_bytes <= on.memory_bytes
    ]
    best_s = min(predict_step(one, EIGHT_RANKS, on).step_s for one in fitting)
    found = find(config, on=on)
    assert found.ranked[0].step.step_s == pytest.approx(best_s, rel=0.02)
    ranked = find(config, on=on, exhaustive=True).ranked
    assert {family_of(one.config) for one in ranked} == {family_of(one) for one in fitting}


@pytest.mark.parametrize("ranks", [1, 8, 64, 1024])
def test_every_candidate_can_run_fits_and_keeps_the_batch(ranks: int) -> None:
    on = machine("A100 40GB")
    result = find(recipe("model.backbone=vit_huge"), ranks, on, global_batch=2048)
    assert result.ranked
    for one in result.ranked:
        assert Experiment.model_validate(one.config.model_dump()) == one.config
        assert plan_ranks(one.config, ranks).global_batch_size == 2048
        assert one.needed_bytes == one.memory.peak_bytes <= on.memory_bytes
        assert one.memory == predict_memory(one.config, ranks, one.zero)
        assert (
            load_experiment("k400_pretrain_vit_base", ["model.backbone=vit_huge", *one.overrides])
            == one.config
        )


def test_the_full_search_is_small() -> None:
    """The search makes fewer than 800 predictions, each of a third of a millisecond."""
    config = recipe("model.backbone=vit_huge")
    assert sum(find(config, 8, global_batch=1024).evaluations) < 800
    assert sum(find(config, 1024, global_batch=8192).evaluations) < 800


@pytest.mark.parametrize(
    "given",
    [
        "parallelism.tensor=2 recompute.mode=full batch.micro_batch_size=8",
        "parallelism.zero_stage=3 parallelism.offload_to_cpu=true",
        "recompute.mode=blocks recompute.every=6",  # an interval that the search does not try by itself
        "recompute.mode=full recompute.offload_to_cpu=true recompute.partition=true parallelism.tensor=2",
        "batch.grad_accum_steps=2 precision=fp16",
    ],
)
def test_a_key_that_was_given_is_not_searched(given: str) -> None:
    words = given.split()
    keys = frozenset(word.partition("=")[0] for word in words)
    assert keys <= SEARCHED
    ranked = find(recipe(*words), pinned=keys).ranked
    assert ranked
    for one in ranked:
        assert load_experiment("k400_pretrain_vit_base", [*one.overrides, *words]) == one.config
        assert plan_ranks(one.config, EIGHT_RANKS).global_batch_size == 256


def test_every_knob_changes_its_own_key_alone() -> None:
    config, cluster = keep_global_batch(recipe(), EIGHT_RANKS), Cluster(machine(), EIGHT_RANKS)
    before = dict(flatten(config.model_dump()))
    for knob in KNOBS:
        value = list(knob.values(config, cluster))[-1]
        assert dict(flatten(knob.chosen(config, value).model_dump())) == before | {knob.key: value}


def test_own_buckets_are_recommended_only_where_they_pay() -> None:
    """The latency of a message matters between slow nodes but not within a node."""
    slow = machine_from_sheet("H100 SXM", DEVICES["H100 SXM"], "ethernet-10")
    result = find(recipe("data.num_workers=14"), 64, slow, global_batch=1024)
    for one in result.ranked:
        assert one.zero.reduce_bucket_values in bucket_sizes(one.config) if one.own_buckets else (12_500_000,)
    assert not any(one.own_buckets for one in find(recipe(), 8).ranked)


def test_what_does_not_fit_says_by_how_much_and_what_would() -> None:
    """Neither recompute nor sharding makes the attention matrices of 5,644 tokens fit."""
    config = recipe(
        "model.backbone=vit_huge", "model.num_frames=64", "tokens.keep_ratio=0.9", "model.attention=unfused"
    )
    cluster, options = Cluster(machine("A10", 700 * MIB), 2), Options(global_batch=2)
    result = search(config, cluster, options)
    assert not result.ranked
    best = min(one.shortage_bytes for one in result.dropped if one.shortage_bytes)
    said = str(fits_nowhere(config, cluster, options, result.dropped))
    assert "does not fit on 2 x A10" in said and f"out of memory by {format_bytes(best)} at best" in said
    assert "fix: --gpus 4, --gpu" in said and "model.attention=fused" in said


def test_a_batch_that_cannot_be_split_is_refused_with_the_nearest_that_can() -> None:
    """ViT-H on 64 ranks has groups of 8 and 8 data-parallel ranks; ViT-B has groups of 2 and 32."""
    with pytest.raises(UsageError, match="nearest sizes: 96 or 104; fix: --global-batch 104"):
        find(recipe("model.backbone=vit_huge"), 64, global_batch=100)
    with pytest.raises(UsageError, match="nearest sizes: 96 or 128"):
        find(recipe(), 64, global_batch=100)
    mixing = ("augment.mixup_alpha=0.8", "batch.micro_batch_size=2", "batch.global_batch_size=20")
    config = recipe(*mixing, name="k400_finetune_vit_base")
    with pytest.raises(
        UsageError, match="nearest sizes: 16 or 24"
    ):  # mixing needs pairs of clips; the heads split by 4
        find(config, 16)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "parallelism.tensor=8",
            "no candidate can run; given: parallelism.tensor=8 does not divide the ranks of a node; given: 4",
        ),
        ("batch.micro_batch_size=24", "no allowed micro-batch divides the 64 clips of a data-parallel rank"),
    ],
)
def test_keys_with_which_nothing_runs_are_said(given: str, said: str) -> None:
    config, pinned = recipe("model.backbone=vit_huge", given), frozenset((given.partition("=")[0],))
    with pytest.raises(UsageError, match=said):
        find(config, 4, pinned=pinned)


@pytest.mark.parametrize(
    ("num_ranks", "ranks_per_node", "said"),
    [
        (12, 8, "the ranks of the run; given: 12 ranks"),
        (4, 4, "the ranks of a node; given: 4 ranks per node"),
    ],
)
def test_a_tensor_degree_that_does_not_divide_names_what_it_does_not_divide(
    num_ranks: int, ranks_per_node: int, said: str
) -> None:
    config = recipe("model.backbone=vit_huge", "parallelism.tensor=8")
    space = Space(config, Cluster(replace(machine(), ranks_per_node=ranks_per_node), num_ranks), free=())
    with pytest.raises(ConfigError, match=f"parallelism.tensor=8 does not divide {said}"):
        space.check_sharded(config)


def test_a_precision_that_was_given_is_not_replaced() -> None:
    with pytest.raises(UsageError, match="no fast bf16; given: bf16; allowed: fp32, fp16"):
        find(recipe("precision=bf16"), on=machine("T4"), pinned=frozenset(("precision",)))


def test_a_precision_that_the_device_lacks_is_replaced_and_said() -> None:
    result = find(recipe(), on=machine("V100 SXM 32GB"))
    assert {one.config.precision for one in result.ranked} == {"fp32", "fp16"}
    assert any(one.family == "bf16" and "no fast bf16" in one.reason for one in result.dropped)
    assert {one.config.precision for one in find(recipe()).ranked} == {"bf16"}


def test_families_that_are_refused_quote_the_check_that_refuses_them() -> None:
    reasons = {one.family: one.reason for one in find(recipe(), 4).dropped}
    assert "bf16 needs parallelism.zero_stage 1, 2 or 3" in reasons["ZeRO-0; tensor 1, 2, 4; bf16"]
    assert "heads" in reasons["ZeRO-1, 2, 2 offload, 3, 3 offload; tensor 4; bf16"]  # the decoder has 6 heads
    assert (
        "does not divide the ranks of a node"
        in reasons["ZeRO-0, 1, 2, 2 offload, 3, 3 offload; tensor 8; bf16"]
    )


def test_what_is_slower_says_which_part_of_the_step_makes_it_so() -> None:
    on = machine_from_sheet("L40S", DEVICES["L40S"], ranks_per_node=8)
    result = find(recipe("model.backbone=vit_huge", "data.num_workers=14"), 8, on)
    best = result.ranked[0]
    tensor = next(one for one in result.ranked if one.config.parallelism.tensor == 8)
    assert "communication-bound" in why_slower(tensor, best)
    families = [one.family for one in slower_families(result.ranked, 1)]
    assert str(best.sharding) not in families and len(families) == len(set(families))
