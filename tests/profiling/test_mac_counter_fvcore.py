"""Tests of counted compute against fvcore, which reads a TorchScript graph with formulas of its own."""

from __future__ import annotations

import logging
from math import prod
from typing import Any

import pytest
import torch

from everest_ds.models import build_model
from everest_ds.profiling.mac_counter import count_forward
from tests.models import experiment

fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed: pip install everest-ds[dev]")


def linear(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the MACs of a custom autograd function, inside of which fvcore sees nothing."""
    x, weight = (fvcore.jit_handles.get_shape(value) for value in inputs[:2])
    return prod(x) * weight[0]


@pytest.mark.parametrize(
    ("task", "selection", "backbone"),
    [
        ("pretrain", "tube", "vit_base"),
        ("pretrain", "rero", "vit_large"),
        ("finetune", "none", "vit_small"),
        ("finetune", "rero", "vit_huge"),
    ],
)
def test_fvcore_counts_the_same(task: str, selection: str, backbone: str) -> None:
    """Both counts are equal, including LayerNorm at 5 per element.

    Attention is unfused, because fvcore has no handle for fused attention.
    """
    config = experiment(
        task, selection, backbone=backbone, num_frames=16, image_size=224, attention="unfused"
    )
    with torch.device("meta"):
        model = build_model(config).eval()
        inputs = torch.empty(1, 16, 224, 224, 3, dtype=torch.uint8), torch.empty(1, dtype=torch.int64)
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    analysis = fvcore.FlopCountAnalysis(model, inputs)
    for function in ("_Linear", "_GELULinear"):
        analysis.set_op_handle(f"prim::PythonOp.{function}", linear)
    assert analysis.total() == count_forward(model, *inputs).literature_macs
