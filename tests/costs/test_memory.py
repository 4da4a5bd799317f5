"""Tests of predicted memory, against the traced model, measured allocations and known inequalities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.config.selections import GPU_CHUNK_TOKENS
from everest_ds.costs.compute import count_parameters
from everest_ds.costs.layer_memory import layers
from everest_ds.costs.memory import MemoryPrediction, predict_memory, predict_step_bytes
from everest_ds.models import build_model
from everest_ds.models.selection import rero
from everest_ds.parallel.recompute import apply_recompute
from everest_ds.profiling.allocations import track_allocations
from everest_ds.profiling.memory_trace import trace_memory

MODES = ("none", "gelu", "attention", "mlp", "blocks", "full")
TASKS = ("pretrain", "finetune")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def scores_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score tokens in the chunk size of a GPU, which the predictions assume; a CPU uses smaller chunks."""
    monkeypatch.setattr(rero, "_CPU_CHUNK_TOKENS", GPU_CHUNK_TOKENS)


def experiment(
    task: str = "pretrain",
    backbone: str = "vit_small",
    *,
    clips: int = 2,
    precision: str = "fp32",
    recompute: dict[str, Any] | None = None,
    tokens: dict[str, Any] | None = None,
    zero_stage: int = 2,
    **model: Any,
) -> Experiment:
    own = {"num_classes": 400, "drop_path": 0.1} if task == "finetune" else {}
    return Experiment.model_validate(
        {
            "task": task,
            "model": {"backbone": backbone, **own, **model},
            "tokens": {"keep_ratio": 0.3 if task == "pretrain" else 0.6, **(tokens or {})},
            "batch": {"micro_batch_size": clips},
            "precision": precision,
            "recompute": recompute or {},
            "parallelism": {"zero_stage": zero_stage},
        }
    )


def build(config: Experiment) -> nn.Module:
    model = build_model(config).to(DTYPES[config.precision])
    apply_recompute(model, config.recompute)
    return model


def inputs(config: Experiment) -> Sequence[Tensor]:
    clip, size = config.candidate_geometry, config.batch.micro_batch_size
    pixels = torch.zeros(size, clip.num_frames, clip.image_size, clip.image_size, 3, dtype=torch.uint8)
    return pixels, torch.arange(size), torch.zeros(size, dtype=torch.int64)


def loss(config: Experiment, model: nn.Module, clip_BFHWC: Tensor, key_B: Tensor, label_B: Tensor) -> Tensor:
    output = model(clip_BFHWC, key_B)
    found: Tensor = output.loss if config.task == "pretrain" else F.cross_entropy(output.float(), label_B)
    return found


def counted_bytes(config: Experiment) -> int:
    """Return the peak bytes of the traced model's forward and backward pass beyond the resting bytes."""
    trace = trace_memory(partial(build, config), partial(inputs, config), partial(loss, config))
    passes = [moment.total_bytes for moment in trace.timeline if moment.phase != "optimizer"]
    return max(passes) - sum(trace.resting_bytes.values())


def measured_bytes(config: Experiment) -> int:
    """Return the peak bytes of forward and backward pass that torch allocates on a CPU."""
    model, batch = build(config), inputs(config)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    return track_allocations(lambda: loss(config, model, *batch).backward(), torch.device("cpu")).peak_bytes


CHECKED = [
    experiment("pretrain"),
    experiment("finetune"),
    experiment("pretrain", recompute={"mode": "gelu"}),
    experiment("finetune", attention="unfused"),
    experiment("finetune", attention="unfused", clips=1),
    experiment("pretrain", tokens={"selection": "tube"}, attention="unfused"),
    experiment("pretrain", recompute={"mode": "full"}),
    experiment("finetune", recompute={"mode": "full"}, attention="unfused"),
    experiment("finetune", recompute={"mode": "attention"}, attention="unfused"),
    experiment("finetune", recompute={"mode": "mlp"}),
    experiment("finetune", recompute={"mode": "blocks", "every": 5}),
    experiment("pretrain", tokens={"frame_oversampling": 1.5}, num_frames=64),
    experiment("pretrain", tokens={"score": "pixel"}, recompute={"mode": "full"}),
    experiment("pretrain", tokens={"score": "sketch"}, recompute={"mode": "full"}, clips=1),
]


def name(config: Experiment) -> str:
    facts = (config.task, config.tokens.selection, config.tokens.score, config.recompute.mode)
    clips = f"{config.batch.micro_batch_size}x{config.model.num_frames}"
    return "-".join((*facts, config.model.attention, clips))


def assert_predicted_as_counted(config: Experiment) -> None:
    """Assert that prediction and count agree within 1 %.

    The prediction may be higher by the squared errors inside `mse_loss`, which a trace cannot see.
    """
    predicted, counted = predict_step_bytes(config), counted_bytes(config)
    predicted_tokens = config.batch.micro_batch_size * config.token_counts.num_predicted
    unseen = 2 * predicted_tokens * config.model.geometry.tubelet_values * torch.float32.itemsize
    assert 0.99 * counted < predicted < 1.01 * counted + unseen, name(config)


@pytest.mark.parametrize("config", CHECKED, ids=name)
def test_prediction_is_what_the_traced_model_holds(config: Experiment) -> None:
    assert_predicted_as_counted(config)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vit_small", "vit_base", "vit_large", "vit_huge"])
@pytest.mark.parametrize("task", TASKS)
def test_prediction_holds_for_every_size_precision_attention_and_mode(task: str, backbone: str) -> None:
    for precision, attention, mode in product(("fp32", "fp16"), ("fused", "unfused"), MODES):
        recompute = {"mode": mode}
        assert_predicted_as_counted(
            experiment(
                task, backbone, clips=16, precision=precision, attention=attention, recompute=recompute
            )
        )


@pytest.mark.parametrize(
    "config",
    [
        experiment("pretrain", "vit_tiny"),
        experiment("finetune", "vit_tiny", precision="bf16", attention="unfused"),
        experiment("finetune", "vit_tiny", recompute={"mode": "full"}),
        experiment("finetune", "vit_tiny", num_frames=64, image_size=112),
    ],
    ids=name,
)
def test_prediction_is_what_the_allocator_hands_out(config: Experiment) -> None:
    assert predict_step_bytes(config) == pytest.approx(measured_bytes(config), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vit_small", "vit_base"])
@pytest.mark.parametrize("task", TASKS)
def test_prediction_is_within_five_per_cent_of_measured(task: str, backbone: str) -> None:
    for precision, attention in product(("fp32", "bf16"), ("fused", "unfused")):
        config = experiment(task, backbone, clips=1, precision=precision, attention=attention)
        assert predict_step_bytes(config) == pytest.approx(measured_bytes(config), rel=0.05)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("backbone", ["vit_small", "vit_base", "vit_large", "vit_huge"])
def test_layers_hold_every_parameter_once(task: str, backbone: str) -> None:
    config = experiment(task, backbone)
    assert sum(layer.num_parameters for layer in layers(config)) == count_parameters(config)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_rests_is_what_rests_in_the_traced_model(precision: str) -> None:
    config = experiment(precision=precision, zero_stage=0 if precision == "fp32" else 1)
    traced = trace_memory(partial(build, config), partial(inputs, config), partial(loss, config))
    predicted, resting = predict_memory(config).parts(), traced.resting_bytes
    for category in ("parameters", "master_parameters", "inputs"):
        assert predicted[category] == resting[category], category
    # AdamW also keeps a float32 step counter per weight.
    assert predicted["optimizer_states"] == pytest.approx(resting["optimizer_states"], rel=1e-4)


def test_the_peak_moves_from_the_many_tokens_of_the_decoder_to_the_encoder() -> None:
    videomae = experiment("pretrain", "vit_base", tokens={"selection": "tube"}, attention="unfused", clips=32)
    assert "decoder" in predict_memory(videomae).peak_at
    assert "encoder" in predict_memory(experiment("finetune", "vit_base", clips=32)).peak_at


def peak(prediction: MemoryPrediction) -> int:
    assert min(prediction.parts().values()) >= 0
    return prediction.peak_bytes


configs = st.builds(
    experiment,
    st.sampled_from(TASKS),
    st.sampled_from(["vit_tiny", "vit_small", "vit_huge"]),
    clips=st.integers(1, 64),
    precision=st.sampled_from(["bf16", "fp16", "fp32"]),
    recompute=st.fixed_dictionaries({"mode": st.sampled_from(MODES)}),
    zero_stage=st.integers(1, 3),
    attention=st.sampled_from(["fused", "unfused"]),
)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_more_clips_take_more_and_more_ranks_take_less(config: Experiment) -> None:
    more = config.model_copy(
        update={
            "batch": config.batch.model_copy(update={"micro_batch_size": config.batch.micro_batch_size + 1})
        }
    )
    assert peak(predict_memory(config, 8)) < peak(predict_memory(more, 8))
    # The comparison starts at two ranks, because a single rank gathers nothing under ZeRO-3.
    assert peak(predict_memory(config, 16)) <= peak(predict_memory(config, 2))


@settings(max_examples=60, deadline=None)
@given(configs.filter(lambda config: config.model.backbone != "vit_small"))
def test_tensor_parallelism_takes_from_every_rank(config: Experiment) -> None:
    """Tensor parallelism lowers the peak of every rank at the same number of data-parallel ranks."""
    split = config.model_copy(update={"parallelism": config.parallelism.model_copy(update={"tensor": 2})})
    assert peak(predict_memory(split, 16)) < peak(predict_memory(config, 8))


def test_recompute_saves_in_the_order_of_what_it_forgets() -> None:
    for task, attention in product(TASKS, ("fused", "unfused")):
        none, *some, full = (
            predict_step_bytes(
                experiment(task, "vit_base", clips=8, recompute={"mode": mode}, attention=attention)
            )
            for mode in MODES
        )
        assert full < min(some) and max(some) < none


def test_offload_to_the_host_takes_from_the_device() -> None:
    for mode in MODES[2:]:
        kept, offloaded = (
            predict_step_bytes(experiment("finetune", recompute={"mode": mode, "offload_to_cpu": offload}))
            for offload in (False, True)
        )
        assert offloaded < kept


def with_tensor(config: Experiment, **recompute: Any) -> Experiment:
    tree = {**config.model_dump(), "recompute": {"mode": "full", **recompute}, "parallelism": {"tensor": 2}}
    return Experiment.model_validate(tree)


def test_a_partitioned_input_is_split_over_the_tensor_group() -> None:
    """Each of two ranks keeps half of every block's input and gathers the whole for one block at a time."""
    config = experiment("finetune", "vit_base", clips=8)
    whole, split = (predict_step_bytes(with_tensor(config, partition=on)) for on in (False, True))
    an_input = 8 * config.token_counts.num_visible * 768 * 4
    depth = config.model.shape.encoder.depth
    assert whole - split == depth * an_input // 2 - an_input


def test_what_is_offloaded_is_in_host_memory() -> None:
    config = experiment("finetune", "vit_base", precision="bf16")
    kept, offloaded = (
        predict_memory(Experiment.model_validate({**config.model_dump(), "parallelism": sharding}), 4)
        for sharding in ({"zero_stage": 2}, {"zero_stage": 2, "offload_to_cpu": True})
    )
    share = -(-count_parameters(config) // 4)
    assert kept.host_bytes == 0 and offloaded.host_bytes == (4 + 8 + 4 + 2) * share
    assert (offloaded.master_parameters, offloaded.optimizer_states, offloaded.gradients) == (0, 0, 0)
    assert offloaded.parameters == kept.parameters and offloaded.peak_bytes <= kept.peak_bytes - 12 * share
    activations = experiment("finetune", clips=2, recompute={"mode": "full", "offload_to_cpu": True})
    an_input = 2 * activations.token_counts.num_visible * 384 * 4
    assert predict_memory(activations).host_bytes == 12 * an_input
