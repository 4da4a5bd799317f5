"""Tests of predicted compute, against the published tables, hand-derived figures and the built models."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from everest_ds.config import Experiment
from everest_ds.config.backbones import BACKBONES
from everest_ds.costs.compute import count_parameters, predict_macs
from everest_ds.models import build_model
from everest_ds.models.pretrain import Reconstruction
from tests.models import TASKS_AND_SELECTIONS

FULL = {"S": "vit_small", "B": "vit_base", "L": "vit_large", "H": "vit_huge"}


def pretrain(size: str, selection: str = "rero", keep_ratio: float = 0.3, **more: object) -> Experiment:
    tokens = {"selection": selection, "keep_ratio": keep_ratio, **more}
    return Experiment.model_validate(
        {"task": "pretrain", "model": {"backbone": FULL[size]}, "tokens": tokens}
    )


def finetune(size: str, selection: str = "rero", num_classes: int = 400, **more: object) -> Experiment:
    model = {"backbone": FULL[size], "num_classes": num_classes}
    tokens = {"selection": selection, "keep_ratio": 0.6, **more}
    return Experiment.model_validate({"task": "finetune", "model": model, "tokens": tokens})


def longer(config: Experiment, num_frames: int) -> Experiment:
    model = config.model.model_copy(update={"num_frames": num_frames})
    return config.model_copy(update={"model": model})


# Published GFLOPs with one decimal, as printed in the K400 table of EVEREST's poster (ICML 2024).
PUBLISHED = {
    "VideoMAE pre-training": (lambda size: pretrain(size, "tube"), {"S": 11.6, "B": 35.5, "L": 83.1}),
    "EVEREST pre-training": (
        lambda size: pretrain(size, keep_ratio=0.4),
        {"S": 6.3, "B": 21.5, "L": 60.8},
    ),
    "VideoMAE fine-tuning": (lambda size: finetune(size, "none"), {"S": 57.0, "B": 180.5, "L": 597.2}),
    "EVEREST fine-tuning": (finetune, {"S": 29.1, "B": 98.1, "L": 330.0}),
}


@pytest.mark.parametrize("row", PUBLISHED)
@pytest.mark.parametrize("size", "SBL")
def test_literature_macs_are_the_published_gflops_to_the_printed_digit(row: str, size: str) -> None:
    config_of, printed = PUBLISHED[row]
    assert round(predict_macs(config_of(size)).literature_macs / 1e9, 1) == printed[size]


# Hand-derived GMACs, without and with LayerNorm, of the same rows and of unpublished ones.
HAND_DERIVED = [
    (pretrain("S", keep_ratio=0.4), 6.33, 6.34),
    (pretrain("S"), 5.74, 5.75),
    (finetune("S"), 29.03, 29.07),
    (pretrain("B", keep_ratio=0.4), 21.52, 21.54),
    (pretrain("B"), 19.78, 19.81),
    (finetune("B"), 97.98, 98.06),
    (pretrain("L", keep_ratio=0.4), 60.72, 60.78),
    (pretrain("L"), 57.92, 57.97),
    (finetune("L"), 329.77, 330.00),
    (pretrain("H", "tube"), 150.77, 150.89),
    (pretrain("H", keep_ratio=0.4), 118.15, 118.24),
    (pretrain("H"), 114.03, 114.11),
    (finetune("H", "none"), 1190.99, 1191.64),
    (finetune("H"), 666.86, 667.25),
    (longer(pretrain("B", "tube"), 64), 238.06, 238.22),
    (longer(pretrain("B"), 64), 93.01, 93.10),
    (longer(finetune("L", "none"), 64), 3837.49, 3839.03),
    (longer(finetune("L"), 64), 1842.25, 1843.18),
    (longer(finetune("L"), 32), 746.88, 747.35),
]


@pytest.mark.parametrize(("config", "without_norms", "with_norms"), HAND_DERIVED)
def test_literature_macs_of_rows_derived_by_hand(
    config: Experiment, without_norms: float, with_norms: float
) -> None:
    compute = predict_macs(config)
    assert round(compute.literature_macs_without_norms / 1e9, 2) == without_norms
    assert round(compute.literature_macs / 1e9, 2) == with_norms


# VideoMAE's MACs without LayerNorm, LayerNorm elements and parameters, counted from its released code.
VIDEOMAE = [
    (finetune("S", "none"), 56_878_061_568, 14_451_072, 22_033_936),
    (finetune("B", "none"), 180_344_893_440, 28_902_144, 86_534_800),
    (finetune("L", "none"), 596_833_091_584, 77_071_360, 304_270_736),
    (pretrain("S", "tube"), 11_536_171_008, 4_214_784, None),
    (pretrain("B", "tube"), 35_439_771_648, 8_429_568, 94_210_944),
    (pretrain("L", "tube"), 83_034_636_288, 15_171_584, None),
]


@pytest.mark.parametrize(("config", "macs", "norm_elements", "parameters"), VIDEOMAE)
def test_videomae_to_the_last_integer(
    config: Experiment, macs: int, norm_elements: int, parameters: int | None
) -> None:
    compute = predict_macs(config)
    assert compute.literature_macs_without_norms == macs
    assert compute.layer_norm_elements == norm_elements
    assert parameters is None or count_parameters(config) == parameters


def test_parts_of_videomae_pretraining_with_vit_base() -> None:
    compute = predict_macs(pretrain("B", "tube"))
    parts = (compute.embed_all_macs, compute.encoder_macs, compute.projection_macs)
    assert [round(part / 1e9, 3) for part in parts] == [1.850, 14.061, 0.047]
    assert round(compute.decoder_macs / 1e9, 3) == 18.651
    assert compute.head_macs == 1408 * 384 * 1536


# GMACs of fine-tuning on the sparse path without scoring: only the kept tokens are embedded.
@pytest.mark.parametrize(("size", "gmacs"), [("S", 28.66), ("B", 97.23), ("L", 328.78), ("H", 665.63)])
def test_finetuning_embeds_only_the_kept_tokens_with_gradient(size: str, gmacs: float) -> None:
    compute = predict_macs(finetune(size))
    assert round((compute.forward_macs - compute.score_macs) / 1e9, 2) == gmacs
    # Eight slots have seven pairs of neighbours.
    assert compute.score_macs == 7 * 196 * 1536 * BACKBONES[FULL[size]].encoder.width
    assert compute.embed_all_macs == 1568 * 1536 * BACKBONES[FULL[size]].encoder.width


def test_only_rero_pays_for_scoring_and_tube_embeds_only_the_visible_tokens() -> None:
    tube, dense = predict_macs(pretrain("B", "tube")), predict_macs(finetune("B", "none"))
    assert tube.score_macs == dense.score_macs == 0
    assert tube.embed_macs == 160 * 1536 * 768
    assert dense.forward_macs == dense.literature_macs_without_norms


def test_training_costs_three_forwards_less_what_needs_no_gradient() -> None:
    compute = predict_macs(pretrain("B"))
    missing = 2 * compute.score_macs + compute.embed_macs
    assert compute.training_macs == 3 * compute.forward_macs - missing


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    ("task", "selection"),
    [("pretrain", "rero"), ("pretrain", "tube"), ("finetune", "rero"), ("finetune", "none")],
)
def test_parameters_are_those_of_the_built_model(backbone: str, task: str, selection: str) -> None:
    num_classes = 174 if task == "finetune" else None
    config = Experiment.model_validate(
        {
            "task": task,
            "model": {"backbone": backbone, "num_classes": num_classes},
            "tokens": {"selection": selection},
        }
    )
    with torch.device("meta"):
        model = build_model(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        *(
            pretrain("B", rule) if task == "pretrain" else finetune("B", rule)
            for task, rule in TASKS_AND_SELECTIONS
        ),
        pretrain("B", score="pixel"),
        finetune("B", distance="cosine"),
        finetune("B", distance="l1", frame_oversampling=1.5),
        longer(pretrain("B", frame_oversampling=1.5), 64),
    ],
)
def test_forward_and_training_macs_are_what_torch_counts(config: Experiment) -> None:
    geometry = config.candidate_geometry
    side = geometry.image_size
    with torch.device("meta"):
        model = build_model(config)
        clip = torch.empty(1, geometry.num_frames, side, side, 3, dtype=torch.uint8)
        key = torch.empty(1, dtype=torch.int64)
    # torch does not count fused attention on a CPU; the MATH backend splits it into matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(clip, key)
        forward_flops = counter.get_total_flops()
        (output.loss if isinstance(output, Reconstruction) else output.sum()).backward()
    compute = predict_macs(config)
    assert forward_flops == 2 * compute.forward_macs
    assert counter.get_total_flops() == 2 * compute.training_macs


def test_a_sketch_scores_at_a_tenth_of_the_multiplies() -> None:
    """Scoring with a sketch costs about a tenth of scoring with the embedding.

    The sketch's map is built once per step, so the difference between two clips and one is the cost per clip.
    """
    config = pretrain("B", score="sketch")
    compute = predict_macs(config)
    assert 0.9 * compute.score_macs < predict_macs(pretrain("B")).score_macs / 10 < 1.1 * compute.score_macs
    flops = []
    for num_clips in (1, 2):
        with torch.device("meta"):
            model = build_model(config)
            clip, key = (
                torch.empty(num_clips, 16, 224, 224, 3, dtype=torch.uint8),
                torch.empty(num_clips).long(),
            )
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(clip, key)
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == 2 * compute.forward_macs
