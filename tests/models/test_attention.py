"""Tests of every attention kernel against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from everest_ds.models.attention import ATTENTION
from everest_ds.profiling.launches import count_launches


def formula(qkv_Bn3hd: Tensor) -> Tensor:
    """Compute attention one token at a time, as a weighted mean of the values."""
    clips = []
    for clip in qkv_Bn3hd:
        q, k, v = clip.unbind(1)  # each (n, h, d)
        rows = []
        for token in q:
            logits = (token[None] * k).sum(-1) / k.shape[-1] ** 0.5  # (n, h)
            rows.append((logits.softmax(0)[..., None] * v).sum(0).flatten())
        clips.append(torch.stack(rows))
    return torch.stack(clips)


@pytest.mark.parametrize("chunk_logits", [2**20, 200, 10])
@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_output_and_gradient_are_the_formulas(
    kind: str, dtype: torch.dtype, tolerance: float, chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everest_ds.config.backbones.CHUNK_LOGITS", chunk_logits)
    generator = torch.Generator().manual_seed(0)
    rounded = torch.randn(2, 9, 3, 3, 8, generator=generator).to(dtype)
    direction = torch.randn(2, 9, 24, generator=generator).to(dtype)
    ours, exact = rounded.clone().requires_grad_(), rounded.double().requires_grad_()
    output, expected = ATTENTION[kind](ours), formula(exact)
    output.backward(direction)
    expected.backward(direction.double())
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_keeps_no_matrix_of_tokens_by_tokens(dtype: torch.dtype) -> None:
    num_tokens = 64
    qkv = torch.randn(1, num_tokens, 3, 2, 8).to(dtype).requires_grad_()
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ATTENTION["fused"](qkv)
    assert kept and not any(shape.count(num_tokens) > 1 for shape in kept)


def test_fused_attention_copies_its_gradients_once() -> None:
    """The gradients of q, k and v are copied once, into one tensor in the order of qkv (in float32)."""
    qkv = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
    out = ATTENTION["fused"](qkv)
    backward = count_launches(lambda: out.backward(torch.ones_like(out)))
    assert backward.launches["stack"] == 1 and "clone" not in backward.launches


def test_a_single_token_of_a_single_head_is_left_alone() -> None:
    """Scaling q in place does not change the input, even if its layout is contiguous without a copy."""
    qkv = torch.randn(1, 1, 3, 1, 4).bfloat16()
    before = qkv.clone()
    ATTENTION["fused"](qkv)
    assert torch.equal(qkv, before)
