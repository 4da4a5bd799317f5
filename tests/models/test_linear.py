"""Tests of linear maps through oneDNN against those of torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from everest_ds.models import linear as module
from everest_ds.models.linear import Linear, linear


class Operators(TorchDispatchMode):
    """Dispatch mode that records the names of the called operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def not_intel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let linear maps choose their library as on a processor that is not Intel's."""
    monkeypatch.setattr(module, "_PREFERS_ONEDNN", torch.backends.mkldnn.is_available())


@pytest.mark.parametrize(("maker", "detour"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_only_processors_of_other_makers_than_intel_take_the_detour(
    maker: str, detour: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large maps run on oneDNN except on Intel processors, for which MKL, PyTorch's default, is faster."""
    processors = tmp_path / "cpuinfo"
    processors.write_text(f"processor\t: 0\nvendor_id\t: {maker}\nmodel name\t: some processor\n")
    assert module.prefers_onednn(processors) is detour
    monkeypatch.setattr(module, "_PREFERS_ONEDNN", detour)
    with Operators() as called:
        linear(torch.randn(400, 64), torch.randn(4096, 64))
    assert ("mkldnn::_linear_pointwise" in called.names) is detour


def test_a_machine_that_does_not_name_its_processors_takes_the_detour(tmp_path: Path) -> None:
    assert module.prefers_onednn(tmp_path / "missing")


@pytest.mark.usefixtures("not_intel")
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_of_a_large_map_are_those_of_torch(bias: bool) -> None:
    torch.manual_seed(0)
    ours, plain = Linear(64, 4096, bias=bias), torch.nn.Linear(64, 4096, bias=bias)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(4, 100, 64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with Operators() as called:
        outputs = [model(each) for model, each in zip((ours, plain), inputs, strict=True)]
        direction = torch.randn_like(outputs[0])
        for output in outputs:
            output.backward(direction)
    assert "mkldnn::_linear_pointwise" in called.names
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("not_intel")
def test_pixels_get_no_gradient() -> None:
    """The input of the patch embedding does not require a gradient, and no gradient is computed for it."""
    x, weight = torch.randn(400, 64), torch.randn(4096, 64, requires_grad=True)
    with Operators() as called:
        output = linear(x, weight)
    output.sum().backward()
    assert x.grad is None and weight.grad is not None
    assert "mkldnn::_linear_pointwise" in called.names


@pytest.mark.usefixtures("not_intel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_maps_and_other_precisions_stay_with_torch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.bfloat16:
        monkeypatch.setattr(module, "_WORTHWHILE_MACS", 0)
    x, weight = torch.randn(3, 8).to(dtype), torch.randn(5, 8).to(dtype)
    with Operators() as called:
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert "mkldnn::_linear_pointwise" not in called.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_reads_the_weight_where_it_is_by_then(dtype: torch.dtype) -> None:
    """The backward pass reads `weight.data` anew, so ZeRO-3 can release a weight between the passes."""
    weight = torch.nn.Parameter(torch.randn(6, 4).to(dtype))
    x = torch.randn(3, 4).to(dtype).requires_grad_()
    output = linear(x, weight)
    weight.data = elsewhere = 2 * weight.detach()
    output.backward(torch.ones_like(output))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(output) @ elsewhere)
