"""The tubelet grid of a clip and the token counts of a model: fixed numbers that give tensors a static shape.

Symbols as in the paper: N tokens, K kept by the selection, V visible to the pre-training encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


def exact_floor(ratio: float, count: int) -> int:
    """Return ⌊ratio · count⌋, with `ratio` taken as the decimal number that was written.

    Binary floating point would give wrong counts: `int(0.29 * 100)` is 28.
    """
    product = Fraction(repr(ratio)) * count
    return product.numerator // product.denominator  # torch.compile fails on int(Fraction) in Python 3.10


_MOST_TOKENS = 2**20  # 20 times those of 128 frames of 448 x 448; a config from elsewhere may hold any number


@dataclass(frozen=True)
class ClipGeometry:
    """The grid of tubelets that a clip is cut into.

    Attributes:
        num_frames: frames per clip.
        tubelet_size: frames per tubelet.
        image_size: height and width of a frame, pixels.
        patch_size: height and width of a tubelet, pixels.
    """

    num_frames: int = 16
    tubelet_size: int = 2
    image_size: int = 224
    patch_size: int = 16

    @property
    def num_slots(self) -> int:
        """The number T of slots: tubelets along the time axis."""
        return self.num_frames // self.tubelet_size

    @property
    def grid_size(self) -> int:
        """The number of tubelets along the height (and the width) of a frame."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_slot(self) -> int:
        """The number L of tokens per slot."""
        return self.grid_size**2

    @property
    def num_tokens(self) -> int:
        """The number of tokens per clip, N = T · L."""
        return self.num_slots * self.tokens_per_slot

    @property
    def tubelet_values(self) -> int:
        """The number P of pixel values per tubelet, over all three colours."""
        return 3 * self.tubelet_size * self.patch_size**2

    def check_sizes(self, section: str = "") -> None:
        """Check that clips divide into tubelets, and that neither their number nor their size is absurd.

        Args:
            section: prefix of the keys in an error, such as `positions_from.`.

        Raises:
            ValueError: if a size is impossible.
        """
        if self.num_frames % self.tubelet_size:
            raise ValueError(
                f"{section}num_frames={self.num_frames} is not a multiple of tubelet_size={self.tubelet_size}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"{section}image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )
        if max(self.num_tokens, self.tubelet_values) > _MOST_TOKENS:
            raise ValueError(
                f"{section}num_frames={self.num_frames} and {section}image_size={self.image_size} give"
                f" {self.num_tokens} tokens of {self.tubelet_values} values; allowed: at most {_MOST_TOKENS}"
            )


@dataclass(frozen=True)
class TokenCounts:
    """The token counts of one model: `num_visible` in the encoder, `num_kept` in the decoder.

    In fine-tuning nothing is masked, so `num_visible == num_kept` and `num_predicted == 0`.
    """

    num_tokens: int
    num_kept: int
    num_visible: int

    @property
    def num_predicted(self) -> int:
        """The number K - V of tokens that the decoder predicts and the loss covers."""
        return self.num_kept - self.num_visible
