"""Which pixel values were read, and whether they mean what their type says."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from PIL import Image

from skltl._caller import level_of_the_user
from skltl._locks import Lock
from skltl.exceptions import ImageRangeWarning
from skltl.images._decode import Decoded

# What resampling with a bicubic filter adds at edges.
_OVERSHOOT = 0.1

# 16-bit images whose largest value is below are likely to hold fewer bits.
_WHITE_16 = 65535
_EIGHTH_OF_16 = 8192


class PixelRanges:
    """The range of all floats, and the largest of all 16-bit values, read so far."""

    def __init__(self) -> None:
        self._floats: tuple[float, float] | None = None
        self._largest_deep: float | None = None
        self._lock = Lock()

    def see(self, decoded: Decoded, is_float: bool) -> None:
        """Take note of an image, whether it was of floats; or else of 8 or 16 bits."""
        if isinstance(decoded, Image.Image):
            if decoded.mode != "F":
                return
            extrema: Any = decoded.getextrema()
            low, high = extrema
        elif decoded.dtype == np.uint8:
            return
        else:
            low, high = float(decoded.min()), float(decoded.max())
        if is_float:
            self.see_floats(low, high)
        else:
            self.see_deep(high)

    def see_floats(self, low: float, high: float) -> None:
        """Take note of the range of an image of floats."""
        with self._lock:
            if self._floats is not None:
                low, high = min(low, self._floats[0]), max(high, self._floats[1])
            self._floats = (low, high)

    def see_deep(self, high: float) -> None:
        """Take note of the largest value, in [0, 1], of an image of 16 bits."""
        with self._lock:
            self._largest_deep = max(high, self._largest_deep or 0.0)

    def warn_if_odd(self) -> None:
        """Warn once if the values seen so far are not what pixels look like."""
        if self._floats is not None and (self._floats[0] < 0 or self._floats[1] > 1):
            low, high = self._floats
            _warn(
                f"Float images should lie in [0, 1], these range from {low:.4g} to "
                f"{high:.4g}. {_remedy(low, high)}"
            )
        if self._largest_deep:
            largest = round(self._largest_deep * _WHITE_16)
            if largest < _EIGHTH_OF_16:
                _warn(
                    "16-bit images should use the values 0 to 65535; the largest one "
                    f"here is {largest}, which is nearly black. {_deep_remedy(largest)}"
                )


def _warn(text: str) -> None:
    warnings.warn(text, ImageRangeWarning, stacklevel=level_of_the_user())


def _remedy(low: float, high: float) -> str:
    """Say what to do with floats of this range."""
    if low < 0:
        return _remedy_for_negatives(low, high)
    if high <= 1 + _OVERSHOOT:
        return "Clip them with np.clip(X, 0, 1)."
    if 8 < high <= 16:
        return "Divide them by 16 if they go from 0 to 16, as scikit-learn's digits do."
    if 16 < high <= 256:
        return "Divide them by 255, or pass them as uint8."
    if 256 < high <= 4096:
        return "Divide them by 4095 if they hold 12 bits; else by the value of white."
    if 4096 < high <= 65536:
        return "Divide them by 65535, or pass them as uint16."
    return "Divide them by the value that stands for white."


def _remedy_for_negatives(low: float, high: float) -> str:
    if low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        return "Clip them with np.clip(X, 0, 1)."
    if low >= -1 - _OVERSHOOT and high <= 1 + _OVERSHOOT:
        return "If they are scaled to [-1, 1], pass (X + 1) / 2."
    if low >= -10 and high <= 10:
        return (
            "They look normalized: undo it (X * std + mean), or leave out the "
            "normalization that made them; skltl applies its own."
        )
    return (
        "If a mean was subtracted, add it again; then divide by the value that stands "
        "for white (255 for 8 bits). skltl applies its own normalization."
    )


def _deep_remedy(largest: int) -> str:
    """Say what to do with 16-bit images that are this dark."""
    if largest <= 255:
        return "If they hold 8 bits, pass them as uint8."
    if largest <= 4095:
        return (
            "If they hold 12 bits, scale them by 65535 / 4095, or divide by 4095 and "
            "pass the floats."
        )
    return (
        "If white is not 65535, divide by the value of white and pass the floats, "
        "which are then in [0, 1]."
    )
