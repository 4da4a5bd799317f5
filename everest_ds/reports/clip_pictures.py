"""Pictures that show how a model processed a clip, for TensorBoard, `visualize` and the reports.

Shape legend: F frames, H x W pixels, C = 3 colours, S candidate slots, T slots, h x w tokens per slot.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from everest_ds.reports.figure import new_figure, to_image
from everest_ds.reports.kept_tokens import KeptMask, dim_discarded, draw_kept, spread
from everest_ds.reports.tiles import Image, tile

CAPTIONS = {
    "kept_tokens": "The clip and its kept tokens, with one column per slot.",
    "reconstruction": "The clip, its kept tokens, the tokens visible to the encoder, and the reconstruction.",
    "attention": "Attention rollout: the share of each token in the encoder's output.",
    "slots": "Number of ReRo tokens in each slot, with the selected slots coloured.",
}
_COLDEST = 0.15  # colour map position of the smallest share; black marks tokens that are not encoded
_KEPT_COLOR, _LEFT_COLOR = "#d1603d", "#c9d1d9"


def draw_clip(
    clip_FHWC: Image,
    kept_Thw: KeptMask,
    visible_Thw: KeptMask,
    attention_Thw: NDArray[np.float32],
    counts_S: NDArray[np.int64],
    slots_T: NDArray[np.int64],
    restored_FHWC: Image | None,
) -> dict[str, Image]:
    """Return the uint8 pictures of one clip by name, with the names of CAPTIONS.

    The arguments are the fields of `models.watch.Seen` for one clip. Without `restored_FHWC`, the picture
    `reconstruction` is left out.
    """
    pictures = {
        "kept_tokens": draw_kept(clip_FHWC, kept_Thw),
        "attention": draw_attention(clip_FHWC, attention_Thw),
        "slots": draw_slot_bars(counts_S, slots_T),
    }
    if restored_FHWC is not None:
        shown = [clip_FHWC, dim_discarded(clip_FHWC, kept_Thw), dim_discarded(clip_FHWC, visible_Thw)]
        restored = dim_discarded(restored_FHWC, kept_Thw)
        step = len(clip_FHWC) // len(kept_Thw)
        pictures["reconstruction"] = tile(np.stack([*shown, restored])[:, ::step])
    return pictures


def draw_attention(clip_FHWC: Image, attention_Thw: NDArray[np.float32]) -> Image:
    """Draw the first frame of each slot, and below it the frame in grey under a heat map of attention.

    The map ranges from the smallest share of an encoded token to the largest; all other tokens are black.
    """
    from matplotlib import colormaps  # slow to import

    step = len(clip_FHWC) // len(attention_Thw)
    frames = clip_FHWC[::step]
    heat_THW = spread(_relative(attention_Thw), frames.shape[:3])
    grey = frames.mean(axis=-1, keepdims=True) / 255
    mixed = 0.4 * grey + 0.6 * colormaps["inferno"](heat_THW)[..., :3]
    return tile(np.stack([frames, np.rint(mixed * 255).astype(np.uint8)]))


def _relative(attention_Thw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale the shares of encoded tokens to the range from `_COLDEST` to 1; other tokens are 0."""
    encoded = attention_Thw[attention_Thw > 0]
    low, high = float(encoded.min()), float(encoded.max())
    place = (attention_Thw - low) / (high - low) if high > low else np.ones_like(attention_Thw)
    return np.where(attention_Thw > 0, _COLDEST + (1 - _COLDEST) * place, 0)


def draw_slot_bars(counts_S: NDArray[np.int64], slots_T: NDArray[np.int64]) -> Image:
    """Draw the number of ReRo tokens of each slot as bars, with the selected slots coloured."""
    figure, axes = new_figure(6, 2.6)
    taken = set(slots_T.tolist())
    colors = [_KEPT_COLOR if slot in taken else _LEFT_COLOR for slot in range(len(counts_S))]
    axes.bar(range(len(counts_S)), counts_S, color=colors)
    all_taken = len(taken) == len(counts_S)
    axes.set_xlabel("slot" if all_taken else f"candidate slot ({len(taken)} selected, coloured)")
    axes.set_ylabel("tokens")
    return to_image(figure)
