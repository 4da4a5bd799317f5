"""Tests of the operators' formulas, against PyTorch's counter or, where that falls short, by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from everest_ds.profiling.mac_counter import ComputeCount, count_forward, count_training_step
from everest_ds.profiling.operator_formulas import macs_of

aten = torch.ops.aten
Call = Callable[[], object]


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def count(call: Call) -> ComputeCount:
    class Calling(nn.Module):
        def forward(self) -> None:
            call()

    return count_forward(Calling())


def flops_by_torch(call: Call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def convolve(*weight: int, transposed: bool = False, **geometry: object) -> Call:
    """Return a call of a convolution on 2 samples of 6 channels; a weight of 5 dimensions makes it 3D."""
    sides = (8, 9, 10)[: len(weight) - 2]
    functions: dict[tuple[int, bool], Callable[..., Tensor]] = {
        (4, False): F.conv2d,
        (4, True): F.conv_transpose2d,
        (5, False): F.conv3d,
        (5, True): F.conv_transpose3d,
    }
    return lambda: functions[len(weight), transposed](meta(2, 6, *sides), meta(*weight), **geometry)


@pytest.mark.parametrize(
    "call",
    {
        "mm": lambda: meta(3, 4) @ meta(4, 5),
        "bmm": lambda: meta(2, 3, 4) @ meta(2, 4, 5),
        "addmm": lambda: F.linear(meta(7, 4), meta(5, 4), meta(5)),
        "baddbmm": lambda: torch.baddbmm(meta(2, 3, 5), meta(2, 3, 4), meta(2, 4, 5)),
        "einsum": lambda: torch.einsum("bihd,bjhd->bhij", meta(2, 3, 2, 4), meta(2, 5, 2, 4)),
        "convolution": convolve(9, 6, 3, 3, stride=2, padding=1),
        "dilated": convolve(9, 6, 3, 3, dilation=2),
        "three-dimensional": convolve(9, 6, 2, 3, 3, stride=(2, 1, 1)),
        "in groups": convolve(9, 2, 3, 3, groups=3),
        "depthwise": convolve(6, 1, 3, 3, 3, groups=6, padding=1),
        "transposed": convolve(6, 9, 3, 3, transposed=True, stride=2),
    }.values(),
)
def test_a_forward_operator_costs_half_the_flops_that_torch_counts(call: Call) -> None:
    counted = count(call)
    assert counted.flops == flops_by_torch(call) > 0
    assert not counted.uncounted


FUSED = ["flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"]


@pytest.mark.parametrize("kernel", FUSED)
def test_fused_attention_is_two_products(kernel: str) -> None:
    q, k, v = meta(2, 3, 8, 16), meta(2, 3, 5, 16), meta(2, 3, 5, 16)
    operator = getattr(aten, f"_scaled_dot_product_{kernel}").default
    formula = macs_of(operator)
    assert formula is not None and formula(None, q, k, v) == 2 * (2 * 3) * 8 * 5 * 16


@pytest.mark.parametrize("kernel", FUSED)
def test_the_backward_pass_of_fused_attention_is_four_products_without_the_repeated_one(kernel: str) -> None:
    q, k, v = meta(2, 3, 8, 16), meta(2, 3, 5, 16), meta(2, 3, 5, 16)
    operator = getattr(aten, f"_scaled_dot_product_{kernel}_backward").default
    formula = macs_of(operator)
    assert formula is not None and formula(None, q, q, k, v) == 4 * (2 * 3) * 8 * 5 * 16


def test_torch_counts_the_repeated_product_of_fused_attention_as_well() -> None:
    q = torch.randn(2, 3, 8, 16, device="meta", requires_grad=True)
    out = aten._scaled_dot_product_efficient_attention(q, q, q, None, True)[0]
    ours = count_training_step(
        lambda: aten._scaled_dot_product_efficient_attention(q, q, q, None, True)[0].sum(), nn.Module()
    )
    backward = flops_by_torch(lambda: out.sum().backward())
    product = 2 * 3 * 8 * 8 * 16
    assert ours.macs == (2 + 4) * product
    assert backward == 2 * 5 * product


@pytest.mark.parametrize(("of_input", "groups"), [(False, 1), (True, 1), (True, 3)])
def test_the_backward_pass_of_a_convolution_costs_a_forward_pass_for_each_gradient(
    of_input: bool, groups: int
) -> None:
    conv = nn.Conv3d(6, 9, (2, 3, 3), stride=(2, 1, 1), groups=groups, device="meta")
    x = meta(2, 6, 4, 8, 8).requires_grad_(of_input)
    forward = count_forward(conv, x)
    step = count_training_step(lambda: conv(x).sum(), conv)
    assert step.macs == (3 if of_input else 2) * forward.macs
    if groups == 1:  # with groups, torch counts the weight's gradient as if the convolution were dense
        assert step.flops == flops_by_torch(lambda: conv(x).sum().backward())


@pytest.mark.parametrize(
    ("call", "macs"),
    [
        (lambda: meta(3, 4) @ meta(4), 12),
        (lambda: meta(4) @ meta(4), 4),
        (lambda: torch.addmv(meta(3), meta(3, 4), meta(4)), 12),
        (lambda: torch.addbmm(meta(3, 5), meta(2, 3, 4), meta(2, 4, 5)), 2 * 3 * 4 * 5),
    ],
)
def test_operators_that_torch_does_not_count(call: Call, macs: int) -> None:
    assert count(call).macs == macs


def test_the_linear_map_of_onednn() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch is built without oneDNN")
    x, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    linear = torch.ops.mkldnn._linear_pointwise
    assert count(lambda: linear(x, weight, None, "none", [], "")).macs == 2 * 3 * 4 * 5


def test_what_computes_without_a_formula_is_listed_and_what_only_moves_values_is_not() -> None:
    def call() -> Tensor:
        x = torch.zeros(4, 6).view(6, 4).t().reshape(-1).clone()
        x = torch.cat([x, x])[torch.arange(4)].to(torch.float64)
        return x.softmax(0) + x.sort().values

    counted = count(call)
    assert counted.uncounted == {"aten._softmax": 1, "aten.sort": 1, "aten.add": 1}
    assert counted.macs == 0


def test_only_a_layer_norm_with_gain_and_bias_counts_its_elements() -> None:
    x = torch.zeros(3, 8)
    affine = count_forward(nn.LayerNorm(8), x)
    plain = count_forward(nn.LayerNorm(8, elementwise_affine=False), x)
    assert affine.layer_norm_elements == 24 and not affine.uncounted
    assert plain.layer_norm_elements == 0 and plain.uncounted == {"aten.native_layer_norm": 1}
