"""How many tokens each part of a model sees: the fixed counts that give every tensor a static shape.

Symbols as in the paper: N tokens, K kept by the selection, V visible to the pre-training encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache


def exact_floor(ratio: float, count: int) -> int:
    """⌊ratio · count⌋ with `ratio` read as the decimal it was written as.

    Binary floating point gets such counts wrong: `int(0.29 * 100)` is 28.
    """
    product = Fraction(repr(ratio)) * count
    return product.numerator // product.denominator  # not int(): torch.compile fails on it in Python 3.10


@dataclass(frozen=True)
class ClipGeometry:
    """The grid of tubelets of a clip.

    Attributes:
        num_frames: frames of a clip.
        tubelet_size: frames of a tubelet.
        image_size: height and width of a frame, pixels.
        patch_size: height and width of a tubelet, pixels.
    """

    num_frames: int = 16
    tubelet_size: int = 2
    image_size: int = 224
    patch_size: int = 16

    @property
    def num_slots(self) -> int:
        """T: tubelet rows in time."""
        return self.num_frames // self.tubelet_size

    @property
    def grid_size(self) -> int:
        """Tubelets along the height (and the width) of a frame."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_slot(self) -> int:
        """L: tokens of one slot."""
        return self.grid_size**2

    @property
    def num_tokens(self) -> int:
        """N = T · L."""
        return self.num_slots * self.tokens_per_slot

    @property
    def tubelet_values(self) -> int:
        """P: pixel values of one tubelet, all three colours."""
        return 3 * self.tubelet_size * self.patch_size**2


@dataclass(frozen=True)
class TokenCounts:
    """What flows through one model: `num_visible` through the encoder, `num_kept` through the decoder.

    In fine-tuning nothing is masked, so `num_visible == num_kept` and `num_predicted == 0`.
    """

    num_tokens: int
    num_kept: int
    num_visible: int

    @property
    def num_predicted(self) -> int:
        """K - V: tokens that the decoder predicts and the loss is taken over."""
        return self.num_kept - self.num_visible


# VideoMAE v2's decoder predicts a cell's four places in turn, each in 2 of 4 consecutive slots.
RUNNING_CELL_PERIOD = 4


@lru_cache  # asked for in every part of every prediction
def pretrain_counts(
    geometry: ClipGeometry, selection: str, keep_ratio: float, mask_ratio: float
) -> TokenCounts:
    """Token counts of a pre-training step (paper section 3; VideoMAE's for `tube`, its v2's for `dual`).

    `rero` and `random` keep K = ⌊keep_ratio·N⌋ tokens, `none` all N; ⌊(1 - mask_ratio)·N⌋ of them are
    visible. `tube` and `dual` hide the same ⌊mask_ratio·L⌋ places in every slot from the encoder; the
    decoder predicts all of those, or half of them.
    """
    n, num_slots = geometry.num_tokens, geometry.num_slots
    if selection in ("tube", "dual"):
        hidden_places = exact_floor(mask_ratio, geometry.tokens_per_slot)
        predicted = hidden_places * num_slots // (2 if selection == "dual" else 1)
        visible = num_slots * (geometry.tokens_per_slot - hidden_places)
        return TokenCounts(n, visible + predicted, visible)
    kept = n if selection == "none" else exact_floor(keep_ratio, n)
    return TokenCounts(n, kept, int((1 - Fraction(repr(mask_ratio))) * n))


@lru_cache
def classify_counts(geometry: ClipGeometry, selection: str, keep_ratio: float) -> TokenCounts:
    """Token counts of fine-tuning and inference: the K kept tokens, or all N for `none`."""
    n = geometry.num_tokens
    kept = n if selection == "none" else exact_floor(keep_ratio, n)
    return TokenCounts(n, kept, kept)


def sketch_width(width: int) -> int:
    """Features of a sketch of a `width`-wide embedding: at most a tenth, and a multiple of 8 if 8 or more."""
    tenth = max(1, width // 10)
    return tenth - tenth % 8 if tenth >= 8 else tenth
