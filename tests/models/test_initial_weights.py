"""Tests of weights drawn one module at a time against those of a model built as a whole."""

from __future__ import annotations

import pytest
import torch

from everest_ds.models import build_model
from everest_ds.models.initial_weights import draw_initial_weights, outline
from tests.parallel.equality import TASKS, experiment


@pytest.mark.parametrize("task", TASKS)
def test_every_tensor_is_drawn_as_in_the_whole_model(task: str) -> None:
    config = experiment(task, stage=0, data_degree=1)
    torch.manual_seed(config.run.seed)
    whole = build_model(config)
    expected = dict(whole.named_parameters()) | dict(whole.named_buffers())
    drawn = {name: tensor.clone() for name, tensor in draw_initial_weights(config)}
    assert drawn.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(drawn[name], tensor), name


def test_drawing_leaves_the_process_its_random_state() -> None:
    before = torch.get_rng_state()
    for _ in draw_initial_weights(experiment("pretrain", stage=0, data_degree=1)):
        assert torch.equal(torch.get_rng_state(), before)


def test_an_outline_has_no_memory() -> None:
    model = outline(experiment("finetune", stage=0, data_degree=1))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
