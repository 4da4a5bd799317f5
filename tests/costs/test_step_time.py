"""Tests of each term of a predicted step, against formulas in this file, on a machine of round numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from everest_ds.config.schema import Experiment
from everest_ds.costs.compute import count_parameters, predict_macs
from everest_ds.costs.hardware.data_sheet import machine_from_sheet
from everest_ds.costs.hardware.gpus import DEVICES
from everest_ds.costs.hardware.machine import Link, Machine, level, same_link
from everest_ds.costs.step_time import StepPrediction, predict_step
from everest_ds.errors import ConfigError

FLOPS, BYTES, COPY, FRESH, LINK = 1e13, 1e11, 5e10, 2e10, 1e10
CPU = replace(
    machine_from_sheet("T4", DEVICES["T4"]),
    asynchronous=False,
    products=dict.fromkeys(("fp32", "bf16"), level(FLOPS)),
    attention=dict.fromkeys(("fp32", "bf16"), level(FLOPS / 2)),
    moving=dict.fromkeys(("fp32", "bf16"), level(BYTES)),
    copy_bytes_per_s=COPY,
    fresh_bytes_per_s=FRESH,
    adam_values_per_s=1e9,
    host_adam_values_per_s=1e8,
    host_link=Link(0.0, 1e9),
    inside=same_link(Link(0.0, LINK)),
    launch_s=1e-6,
    step_s=0.5,
    parameter_s={0: 0.0, 1: 0.0, 2: 1e-3, 3: 2e-3},
    decode_s=0.1,
    decode_pixels_per_s=1e9,
    spare_cores=0.0,
)
GPU = replace(CPU, asynchronous=True, spare_cores=8.0)


def experiment(task: str = "pretrain", **sections: dict[str, Any]) -> Experiment:
    tree: dict[str, Any] = {
        "task": task,
        "model": {"num_classes": 10 if task == "finetune" else None},
        "batch": {"micro_batch_size": 4},
        "precision": "fp32",
        "parallelism": {"zero_stage": 2},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return Experiment.model_validate(tree)


def predict(ranks: int = 1, machine: Machine = CPU, **sections: Any) -> StepPrediction:
    return predict_step(experiment(**sections), ranks, machine)


def product_s(found: StepPrediction, *names: str) -> float:
    """Return the seconds that terms spend on products, without their passes over memory."""
    terms = [found.term(name) for name in names]
    return sum(term.seconds - 1e6 * term.numbers["moved MB"] / BYTES for term in terms)


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_products_take_the_macs_of_the_compute_prediction(task: str) -> None:
    """Backward takes twice the forward products; attention has its own rate and repeats a product."""
    found, config = predict(task=task), experiment(task)
    macs, clips = predict_macs(config), 4
    encoder, tokens = config.model.shape.encoder, config.token_counts.num_visible
    attention = encoder.depth * 2 * tokens**2 * encoder.width
    linear = macs.encoder_macs - attention
    forward = clips * 2 * (linear / FLOPS + attention / (FLOPS / 2))
    backward = clips * 2 * (2 * linear / FLOPS + 2.5 * attention / (FLOPS / 2))
    assert product_s(found, "encoder forward") == pytest.approx(forward)
    assert product_s(found, "encoder backward") == pytest.approx(backward)
    assert product_s(found, "embedding forward") == pytest.approx(clips * 2 * macs.embed_macs / FLOPS)
    assert product_s(found, "embedding backward") == pytest.approx(clips * 2 * macs.embed_macs / FLOPS)
    assert product_s(found, "selection forward") == pytest.approx(clips * 2 * macs.score_macs / FLOPS)


def test_the_decoder_and_the_pixels_are_counted_in_pretraining() -> None:
    found, macs = predict(), predict_macs(experiment())
    assert product_s(found, "head forward") == pytest.approx(4 * 2 * macs.head_macs / FLOPS)
    assert product_s(found, "projection backward") == pytest.approx(4 * 4 * macs.projection_macs / FLOPS)
    assert product_s(found, "decoder forward") > 4 * 2 * macs.decoder_macs / FLOPS


def test_a_block_moves_its_tensors_as_often_as_said() -> None:
    config = experiment(task="finetune", model={"drop_path": 0.1})
    found = predict_step(config, 1, CPU)
    tensor = 4 * config.token_counts.num_visible * 768 * 4
    assert found.term("encoder forward").numbers["moved MB"] == pytest.approx(12 * (14 + 8) * tensor / 1e6)
    assert found.term("encoder backward").numbers["moved MB"] == pytest.approx(12 * (18 + 19) * tensor / 1e6)


@pytest.mark.parametrize(
    ("recompute", "share"),
    [({"mode": "gelu"}, 0.0), ({"mode": "full"}, 1.0), ({"mode": "blocks", "every": 2}, 0.5)],
)
def test_recompute_repeats_gelu_and_forward_passes_of_blocks(recompute: dict[str, Any], share: float) -> None:
    found, none = predict(recompute=recompute), predict(recompute={"mode": "none"})
    assert none.split()["recompute"] == 0
    blocks = found.term("encoder forward").seconds + found.term("decoder forward").seconds
    config = experiment(recompute=recompute)
    tensors = [12 * config.token_counts.num_visible * 768, 4 * config.token_counts.num_kept * 384]
    gelu_mb = 8 * sum(tensors) * config.batch.micro_batch_size * 4 / 1e6
    moved = share * sum(
        found.term(f"{stack} forward").numbers["moved MB"] for stack in ("encoder", "decoder")
    )
    assert found.term("recompute").numbers["moved MB"] == pytest.approx(gelu_mb + moved)
    assert share * blocks < found.split()["recompute"] < share * blocks + 0.2 * blocks


def test_recompute_of_parts_repeats_less_than_a_block() -> None:
    full, attention, mlp = (
        predict(recompute={"mode": mode}).split()["recompute"] for mode in ("full", "attention", "mlp")
    )
    assert 0 < attention < full and 0 < mlp < full and attention + mlp < full


@pytest.mark.parametrize(
    ("stage", "gradient_passes", "weight_passes"), [(0, 2, 0), (1, 2, 1), (2, 2, 1), (3, 1, 2)]
)
def test_zero_sends_what_its_stage_needs(stage: int, gradient_passes: int, weight_passes: int) -> None:
    """Each pass of a ring over two ranks sends half of eΨ over the link."""
    found = predict(2, parallelism={"zero_stage": stage})
    weights = 4 * count_parameters(experiment())
    sent = {term.name: term.seconds * LINK for term in found.terms if term.group == "communication"}
    assert sent.pop("reduce gradients") == pytest.approx(gradient_passes * weights / 2)
    assert sum(sent.values()) == pytest.approx(weight_passes * weights / 2)


@pytest.mark.parametrize(("stage", "reductions"), [(0, 1), (1, 1), (2, 3), (3, 3)])
def test_stages_2_and_3_reduce_every_micro_batch(stage: int, reductions: int) -> None:
    once, thrice = (
        predict(2, parallelism={"zero_stage": stage}, batch={"grad_accum_steps": count}) for count in (1, 3)
    )
    name = "reduce gradients"
    assert thrice.term(name).seconds == pytest.approx(reductions * once.term(name).seconds)


def test_gradients_go_through_buckets_where_ranks_share_them() -> None:
    def copied(ranks: int, **sections: Any) -> float:
        found = predict(ranks, parallelism={"zero_stage": 2}, **sections)
        return 1e6 * found.term("gradients").numbers["copied MB"] / count_parameters(experiment())

    assert copied(1) == 0
    assert copied(2) == pytest.approx(4 * 4)
    # Two bf16 micro-batches are added to a float32 sum, which is read and written each time.
    assert copied(1, precision="bf16", batch={"grad_accum_steps": 2}) == pytest.approx(2 * (2 + 2 * 4))


def test_tensor_parallelism_sums_kept_tokens_four_times_a_block() -> None:
    config = experiment(parallelism={"tensor": 2})
    found, counts = predict_step(config, 2, CPU), config.token_counts
    summed = 4 * 4 * (12 * counts.num_visible * 768 + 4 * counts.num_kept * 384) * 4
    assert found.term("tensor-parallel sums").seconds == pytest.approx(summed / LINK)
    assert product_s(found, "encoder forward") == pytest.approx(product_s(predict(), "encoder forward") / 2)


def test_recompute_repeats_sums_as_well() -> None:
    plain, full = (
        predict(2, parallelism={"tensor": 2}, recompute={"mode": mode}).term("tensor-parallel sums").seconds
        for mode in ("none", "full")
    )
    assert full == pytest.approx(1.5 * plain)


def test_the_optimiser_steps_this_ranks_part() -> None:
    num_parameters = count_parameters(experiment())
    stage0, stage2 = (
        predict(4, parallelism={"zero_stage": stage}).term("update of weights") for stage in (0, 2)
    )
    assert stage0.seconds == pytest.approx(num_parameters / 1e9)
    part = num_parameters / 4
    # Flat gradients are a new copy of the reduced ones, weights are written back, and the norm reads once.
    moved = 4 * part / FRESH + 16 * part / COPY + 4 * part / BYTES
    assert stage2.seconds == pytest.approx(part / 1e9 + moved, rel=1e-6)


def test_offloaded_states_are_stepped_by_the_host_and_travel() -> None:
    found = predict(2, parallelism={"offload_to_cpu": True})
    part = count_parameters(experiment()) / 2
    assert found.term("update of weights").seconds > part / 1e8
    gradients_and_weights = 2 * 4 * part
    assert found.split()["offload"] == pytest.approx(gradients_and_weights / 1e9, rel=1e-6)


def test_offloaded_activations_travel_both_ways() -> None:
    config = experiment(recompute={"mode": "full", "offload_to_cpu": True})
    counts = config.token_counts
    kept = 4 * (12 * counts.num_visible * 768 + 4 * counts.num_kept * 384) * 4
    assert predict_step(config, 1, CPU).split()["offload"] == pytest.approx(2 * kept / 1e9)


def test_gpus_hide_reductions_behind_the_backward_pass() -> None:
    here, there = (predict(2, machine).term("reduce gradients") for machine in (CPU, GPU))
    assert here.seconds == here.busy_s == there.busy_s
    assert there.seconds < there.busy_s / 4
    assert (
        there.seconds >= there.busy_s / there.numbers["collectives"]
    )  # no compute is left to hide the last bucket


def test_stage_0_hides_nothing() -> None:
    """DeepSpeed reduces after the backward pass at stage 0, so nothing hides it."""
    term = predict(2, GPU, parallelism={"zero_stage": 0}).term("reduce gradients")
    assert term.seconds == term.busy_s


def test_stage_3_flattens_gradients_and_an_offloaded_norm_is_of_float64() -> None:
    part = count_parameters(experiment()) / 4
    for offload, norm in ((False, 4), (True, 12)):
        found = predict(4, parallelism={"zero_stage": 3, "offload_to_cpu": offload})
        moved = 4 * part / FRESH + 16 * part / COPY + norm * part / BYTES
        rate = 1e8 if offload else 1e9
        assert found.term("update of weights").seconds == pytest.approx(part / rate + moved, rel=1e-6)


PHASES = ("forward", "backward", "update")


def host_s(found: StepPrediction) -> list[float]:
    return [found.term(f"host {phase}").seconds for phase in PHASES]


def test_a_host_launches_operators_and_runs_python_for_every_tensor() -> None:
    """ViT-B pre-trains 16 blocks of 13 tensors and 10 others; at stage 3, Python runs in every phase."""
    config = experiment(parallelism={"zero_stage": 3})
    found = predict_step(config, 1, CPU)
    launches = [found.term(f"host {phase}").numbers["operators"] for phase in PHASES]
    python_s = (16 * 13 + 10) * 2e-3
    assert sum(host_s(found)) == pytest.approx(sum(launches) * 1e-6 + python_s + 0.5)
    assert all(seconds > 0.05 * python_s for seconds in host_s(found))


def test_a_phase_takes_as_long_as_the_host_or_the_device_whichever_is_longer() -> None:
    found = predict(machine=GPU)
    ways = {way: [t.seconds for t in found.terms if t.name.endswith(f" {way}")] for way in PHASES}
    device_s = [sum(ways["forward"][:-1]), sum(ways["backward"][:-1]), found.split()["optimizer"]]
    for phase, device in zip(PHASES, device_s, strict=True):
        term = found.term(f"host {phase}")
        assert device > 0 and term.seconds == pytest.approx(max(0.0, term.busy_s - device))
    assert host_s(found)[0] == 0.0  # a launch of a microsecond is hidden
    slow = predict(machine=replace(GPU, launch_s=1.0))
    assert slow.step_s == pytest.approx(sum(slow.term(f"host {phase}").busy_s for phase in PHASES))


def test_each_micro_batch_is_launched_anew_and_updated_once() -> None:
    once, thrice = (predict(batch={"grad_accum_steps": count}) for count in (1, 3))
    assert host_s(thrice) == pytest.approx([3 * host_s(once)[0], 3 * host_s(once)[1], host_s(once)[2]])


def test_data_count_where_they_take_longer_than_the_rest() -> None:
    quick, slow = replace(GPU, decode_s=0.0, decode_pixels_per_s=1e12), replace(GPU, decode_s=10.0)
    assert predict(machine=quick).split()["data"] == 0.0
    waits = predict(machine=slow)
    assert waits.step_s == pytest.approx(waits.term("data").busy_s)  # 4 clips of 10 s by 4 workers
    assert waits.term("data").busy_s == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize(("workers", "videos"), [(4, 2), (0, 4)])
def test_the_workers_of_a_tensor_group_share_its_clips(workers: int, videos: int) -> None:
    """Two ranks decode two of the group's four clips each; without workers, one waits for the other."""
    split = experiment(parallelism={"tensor": 2}, data={"num_workers": workers})
    found = predict_step(split, 2, replace(CPU, decode_s=10.0)).term("data")
    assert found.numbers["videos"] == videos
    assert found.seconds == pytest.approx(videos * 10, rel=0.05)


def test_clips_a_second_and_mfu() -> None:
    config = experiment(batch={"grad_accum_steps": 2})
    found = predict_step(config, 2, replace(CPU, peak_flops_per_s={"fp32": 1e14}))
    assert found.clips == 16
    assert found.clips_per_s == pytest.approx(16 / found.step_s)
    useful = 2 * predict_macs(config).training_macs * 16
    assert found.mfu_pct == pytest.approx(100 * useful / found.step_s / 2e14)
    assert predict_step(config, 2, replace(CPU, peak_flops_per_s={})).mfu_pct is None


def test_terms_add_up_and_explain_themselves() -> None:
    found = predict(2, recompute={"mode": "full"})
    assert sum(found.split().values()) == pytest.approx(found.step_s)
    assert all(term.seconds <= term.busy_s and term.formula for term in found.terms)


def test_what_the_machine_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="no rates"):
        predict(precision="fp16")
    with pytest.raises(ConfigError, match="NVMe offload is not in the cost model"):
        predict(parallelism={"zero_stage": 3, "offload_to_nvme": "/somewhere"})
