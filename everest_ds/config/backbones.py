"""The Vision Transformers of the paper, by name: widths, depths and heads of encoder and decoder.

The sizes S, B, L and H follow VideoMAE (patch 16, tubelet 2, MLP ratio 4), with a decoder of half the
width and depth 4, which reproduces the published GFLOPs of every size. `vit_tiny` serves tests and the demo.
"""

from __future__ import annotations

from dataclasses import dataclass

MLP_RATIO = 4
LAYER_NORM_EPS = 1e-6
# Attention logits that are computed at a time in bfloat16 on a CPU: they fit into the caches of a few cores.
CHUNK_LOGITS = 2**20


@dataclass(frozen=True)
class TransformerShape:
    """The width (channels), depth (blocks) and attention heads of one stack of blocks."""

    width: int
    depth: int
    heads: int


@dataclass(frozen=True)
class Backbone:
    """An encoder and the light decoder that pre-training puts on top of it."""

    encoder: TransformerShape
    decoder: TransformerShape


BACKBONES: dict[str, Backbone] = {
    "vit_tiny": Backbone(TransformerShape(128, 4, 4), TransformerShape(64, 2, 2)),
    "vit_small": Backbone(TransformerShape(384, 12, 6), TransformerShape(192, 4, 3)),
    "vit_base": Backbone(TransformerShape(768, 12, 12), TransformerShape(384, 4, 6)),
    "vit_large": Backbone(TransformerShape(1024, 24, 16), TransformerShape(512, 4, 8)),
    "vit_huge": Backbone(TransformerShape(1280, 32, 16), TransformerShape(640, 4, 8)),
}


def logits_per_chunk(num_tokens: int) -> tuple[int, int]:
    """Return the size of the pieces in which attention is computed in bfloat16 on a CPU.

    Returns:
        The number of heads, at least two, and the number of rows (query tokens) of each: all `num_tokens`, or
        in clips of more than 2048 tokens, as many as have 4 · `CHUNK_LOGITS` logits.
    """
    heads = max(2, CHUNK_LOGITS // num_tokens**2)
    return heads, max(1, min(num_tokens, 4 * CHUNK_LOGITS // num_tokens))
