"""Tests of the MLP, with GELU stored and with GELU recomputed, against the modules of torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from everest_ds.models.mlp import MLP
from everest_ds.profiling.launches import count_launches


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_those_of_linear_gelu_linear(
    dtype: torch.dtype, autocast: bool, recompute: bool
) -> None:
    torch.manual_seed(0)
    ours = MLP(16).to(dtype)
    ours.recomputes_gelu = recompute
    plain = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).to(dtype)
    plain.load_state_dict(dict(zip(plain.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(3, 5, 16).to(dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [model(each) for model, each in zip((ours, plain), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    direction = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(direction)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize(("recompute", "num_kept"), [(False, 3), (True, 2)])
def test_the_input_and_one_or_two_hidden_activations_are_kept(recompute: bool, num_kept: int) -> None:
    model, x = MLP(16), torch.randn(3, 5, 16, requires_grad=True)
    model.recomputes_gelu = recompute
    kept: set[int] = set()

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        output = model(x)
    assert output.shape == x.shape
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(kept - weights) == num_kept  # the input, the output of fc1, and its GELU if stored


def test_gelu_is_computed_once_unless_it_is_recomputed() -> None:
    for recompute, times in ((False, 1), (True, 2)):
        model, x = MLP(16), torch.randn(3, 5, 16, requires_grad=True)
        model.recomputes_gelu = recompute
        assert count_launches(lambda: model(x).sum().backward()).launches["gelu"] == times  # noqa: B023
