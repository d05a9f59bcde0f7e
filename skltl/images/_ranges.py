"""Ranges of pixel values, and warnings about those that are unusual."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from skltl._caller import user_stacklevel
from skltl._locks import Lock
from skltl.exceptions import ImageRangeWarning
from skltl.images._decode import Decoded

# Advice for float images: the first whose limits hold the range of their values. The
# slack of 0.1 is the overshoot of bicubic resampling at edges.
FLOAT_ADVICE = [
    ((-0.1, 1.1), "Clip them with np.clip(X, 0, 1)."),
    ((0, 8), "Divide them by the value of white, or pass value_range."),
    ((0, 16), "Divide them by 16 if that is white, as in scikit-learn's digits."),
    ((0, 256), "Divide them by 255, or pass them as uint8."),
    ((0, 4096), "Divide them by 4095 for 12 bits, or pass value_range=(0, 4095)."),
    ((0, 65536), "Divide them by 65535, or pass them as uint16."),
    ((0, math.inf), "Divide them by the value of white, or pass value_range."),
    ((-1.1, 1.1), "If they are scaled to [-1, 1], pass (X + 1) / 2."),
    (
        (-10, 10),
        "They look normalized: pass X * std + mean, or skip the normalization that "
        "produced them; skltl applies its own.",
    ),
    (
        (-math.inf, math.inf),
        "If a mean was subtracted, add it again; then divide by the value of white "
        "(255 for 8 bits). skltl applies its own normalization.",
    ),
]

# Advice for 16-bit images by their largest value. Images that do not reach an eighth of
# the range probably hold fewer bits.
SIXTEEN_BIT_ADVICE = [
    (255, "If they hold 8 bits, pass them as uint8."),
    (4095, "If they hold 12 bits, pass value_range=(0, 4095)."),
    (8191, "If white is not 65535, pass value_range=(0, white)."),
]


class PixelRanges:
    """Ranges of the float and of the 16-bit images read so far, by any thread.

    `warned` is the advice given so far.
    """

    def __init__(
        self, subject: str = "Float images", warned: set[str] | None = None
    ) -> None:
        self.warned = set() if warned is None else warned
        self._subject = subject
        self._ranges: dict[str, tuple[float, float]] = {}
        self._lock = Lock()

    def add(self, kind: str, low: float, high: float) -> None:
        """Widen the range of a kind of images: "floats" or "16-bit"."""
        with self._lock:
            known_low, known_high = self._ranges.get(kind, (low, high))
            self._ranges[kind] = (min(low, known_low), max(high, known_high))

    def found(self) -> dict[str, tuple[float, float]]:
        """Return the ranges so far, by kind."""
        with self._lock:
            return dict(self._ranges)

    def warn_if_odd(self) -> None:
        """Warn about unusual ranges, once with each advice."""
        low, high = self._ranges.get("floats", (0, 1))
        if low < 0 or high > 1:
            remedy = next(
                advice
                for (least, most), advice in FLOAT_ADVICE
                if least <= low and high <= most
            )
            self._warn_once(
                remedy,
                f"{self._subject} should lie in [0, 1], these range from {low:.4g} to "
                f"{high:.4g}. {remedy}",
            )
        largest = round(self._ranges.get("16-bit", (0, 1))[1] * 65535)
        fitting = [advice for most, advice in SIXTEEN_BIT_ADVICE if largest <= most]
        if largest and fitting:
            self._warn_once(
                fitting[0],
                "16-bit images should use the values 0 to 65535; the largest one here "
                f"is {largest}, which is nearly black. {fitting[0]}",
            )

    def _warn_once(self, advice: str, message: str) -> None:
        """Give an `ImageRangeWarning` that points to the user's code."""
        if advice not in self.warned:
            self.warned.add(advice)
            warnings.warn(message, ImageRangeWarning, stacklevel=user_stacklevel())


def range_of(decoded: Decoded) -> tuple[float, float] | None:
    """Return the range of a float image, or ``None`` if it has 8 bits per channel."""
    if isinstance(decoded, np.ndarray):
        is_float = decoded.dtype != np.uint8
        return (float(decoded.min()), float(decoded.max())) if is_float else None
    if decoded.mode != "F":
        return None
    extrema: Any = decoded.getextrema()
    low, high = extrema
    return low, high
