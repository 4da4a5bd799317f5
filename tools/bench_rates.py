"""Lower bounds for the time of a step: its matrix products, each timed alone.

A dispatch mode records every product and fused attention that a step runs, with shapes, strides and dtypes;
each distinct operation is then timed by itself. The sum is the time of a step that ran nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from everest_ds.models.linear import multiply
from everest_ds.profiling.device_rates import best_time

# Index of the first factor among the arguments of each product.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}


@dataclass(frozen=True)
class Layout:
    """The shape, strides and dtype of a tensor, which determine the speed of a product."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """Return the layout of `tensor`."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def make(self, device: torch.device) -> Tensor:
        """Return a tensor of noise in this layout, or a dense one if the layout repeats elements."""
        if 0 in self.strides:
            return torch.randn(self.shape, device=device).to(self.dtype)
        empty = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)
        return empty.normal_()


@dataclass(frozen=True)
class Product:
    """A kind of matrix product: (m, k) by (k, n), or a batch of such products."""

    left: Layout
    right: Layout
    by_onednn: bool = False

    @property
    def macs(self) -> int:
        """Number of multiply-accumulates."""
        *batch, m, k = self.left.shape
        return (batch[0] if batch else 1) * m * k * self.right.shape[-1]


@dataclass(frozen=True)
class Attention:
    """A kind of fused attention: layouts of q, k and v, each (B, heads, n, width)."""

    q: Layout
    k: Layout
    v: Layout

    @property
    def macs(self) -> int:
        """Number of multiply-accumulates, forward and backward, without work that a kernel repeats.

        The forward pass has 2 products, and the backward pass has 2 for each of them.
        """
        batch, heads, n, width = self.q.shape
        return 3 * 2 * batch * heads * n * self.k.shape[2] * width


class Recorder(TorchDispatchMode):
    """A dispatch mode that counts the matrix products and fused attentions that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()
        self.attentions: Counter[Attention] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            first = _PRODUCTS[name]
            self.products[Product(Layout.of(args[first]), Layout.of(args[first + 1]))] += 1
        elif name == "_linear_pointwise":  # oneDNN's x @ weightᵀ
            x, weight = args[0].flatten(0, -2), args[1].t()
            self.products[Product(Layout.of(x), Layout.of(weight), by_onednn=True)] += 1
        elif name.startswith("_scaled_dot_product") and not name.endswith("backward"):
            self.attentions[Attention(*(Layout.of(tensor) for tensor in args[:3]))] += 1
        return func(*args, **(kwargs or {}))

    @property
    def product_macs(self) -> int:
        """Multiply-accumulates of all matrix products."""
        return sum(product.macs * count for product, count in self.products.items())

    @property
    def attention_macs(self) -> int:
        """Multiply-accumulates of all fused attentions, forward and backward."""
        return sum(attention.macs * count for attention, count in self.attentions.items())


@dataclass(frozen=True)
class Rate:
    """An amount of work, and the time that it takes when nothing else runs."""

    macs: int
    seconds: float

    @property
    def gflops(self) -> float:
        """Rate in GFLOP/s, with two floating-point operations per multiply-accumulate."""
        return 2 * self.macs / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(frozen=True)
class StepRates:
    """The rates of one step's matrix products and fused attentions.

    Attributes:
        products: all matrix products together, each timed alone.
        attention: all fused attentions together, each timed alone.
        rows: one row per distinct product, the longest in total first.
    """

    products: Rate
    attention: Rate
    rows: list[dict[str, Any]]


def record(step: Callable[[], object]) -> Recorder:
    """Run `step` once and record its products and attentions, including those of a backward pass."""
    with Recorder() as recorder:
        step()
    return recorder


def measure_rates(recorder: Recorder, device: torch.device) -> StepRates:
    """Time every recorded distinct product and attention, taking the best of several runs of each."""
    rows = [_row(product, count, device) for product, count in recorder.products.items()]
    rows.sort(key=lambda row: -row["in_all_s"])
    products = Rate(recorder.product_macs, sum(row["in_all_s"] for row in rows))
    attention_s = sum(count * _time_attention(a, device) for a, count in recorder.attentions.items())
    return StepRates(products, Rate(recorder.attention_macs, attention_s), rows)


def _row(product: Product, count: int, device: torch.device) -> dict[str, Any]:
    seconds = _time_product(product, device)
    return {
        "product": f"{_describe(product.left)} by {_describe(product.right)}",
        "dtype": str(product.left.dtype).removeprefix("torch."),
        "count": count,
        "gmacs_each": product.macs / 1e9,
        "seconds_each": seconds,
        "in_all_s": count * seconds,
        "gflops": Rate(product.macs, seconds).gflops,
    }


def _describe(layout: Layout) -> str:
    """Format the shape of a layout, such as `512x768`, with a T appended if it is transposed."""
    transposed = layout.strides[-2] < layout.strides[-1]
    return "x".join(map(str, layout.shape)) + ("T" if transposed else "")


def _time_product(product: Product, device: torch.device) -> float:
    left, right = product.left.make(device), product.right.make(device)
    if product.by_onednn:
        return best_time(lambda: multiply(left, right), device)
    return best_time(lambda: torch.matmul(left, right), device)


def _time_attention(attention: Attention, device: torch.device) -> float:
    q, k, v = (layout.make(device).requires_grad_() for layout in (attention.q, attention.k, attention.v))
    gradient = torch.randn_like(q)

    def both_ways() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), gradient)

    return best_time(both_ways, device)
