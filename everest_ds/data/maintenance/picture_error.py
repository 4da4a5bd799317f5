"""The error of encoded pictures, as peak signal-to-noise ratio (PSNR)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from everest_ds.errors import DataError

MIN_PSNR_DB = 20.0  # a lower value cannot be due to compression alone
_LEAST_ERROR = 1e-3  # mean squared error that stands for pictures without any


def psnr_db(before: NDArray[Any], after: NDArray[Any]) -> float:
    """Return the PSNR of two 8-bit pictures of one size, in dB; it is at most 78."""
    error = np.square(before.astype(np.float32) - after).mean()
    return float(10 * np.log10(255**2 / max(error, _LEAST_ERROR)))


def check_psnr(value_db: float) -> None:
    """Check that an encoded picture is similar to its source.

    Raises:
        DataError: if it is not.
    """
    if value_db < MIN_PSNR_DB:
        raise DataError(
            "re-encoded with too large an error",
            given=f"{value_db:.1f} dB PSNR",
            allowed=f"{MIN_PSNR_DB:g} dB or more",
        )
