"""2-D rows of numbers and the shape of the picture that each row holds."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skltl.exceptions import shorten

CHANNEL_COUNTS = (1, 3, 4)


def rows_as_images(rows: NDArray[Any], image_shape: tuple[int, ...]) -> NDArray[Any]:
    """Reshape each row to ``image_shape``, as ``numpy.reshape`` would.

    Parameters
    ----------
    rows : array of shape (n, n_columns)
        One picture in each row.
    image_shape : tuple of 2 or 3 ints
        (h, w) or (h, w, channels); one of them may be -1, "whatever is left".

    Returns
    -------
    array of shape (n, *image_shape)
        A view of ``rows`` where numpy can give one.

    Raises
    ------
    ValueError
        If it is no shape of a picture, or a row has not as many columns as it needs.
    """
    _check_image_shape(image_shape)
    n_columns = rows.shape[1]
    known = math.prod(size for size in image_shape if size != -1)
    fits = n_columns % known == 0 if -1 in image_shape else n_columns == known
    if not fits:
        raise ValueError(
            f"image_shape={shorten(str(image_shape))} does not fit rows of {n_columns} "
            "numbers."
        )
    return rows.reshape(len(rows), *image_shape)


def as_pixels(rows: NDArray[Any]) -> NDArray[Any]:
    """Bring numbers to types that pictures have.

    uint8, uint16 and bool say what white is, and stay; all others become float32, with
    the values they have. The byte order becomes this machine's.
    """
    rows = rows.astype(rows.dtype.newbyteorder("="), copy=False)
    if rows.dtype in (np.uint8, np.uint16, np.bool_):
        return rows
    return rows.astype(np.float32, copy=False)


def suggest_image_shape(n_columns: int) -> str:
    """Say, as code, which ``image_shape`` rows of this many numbers may have."""
    for n_channels in (1, 3, 4):
        side = math.isqrt(n_columns // n_channels)
        if n_channels * side**2 == n_columns:
            shape = (side, side) if n_channels == 1 else (side, side, n_channels)
            return f"image_shape={shape}"
    return "image_shape=(height, width)"


def _check_image_shape(image_shape: tuple[Any, ...]) -> None:
    is_shape = len(image_shape) in (2, 3) and all(
        not isinstance(size, bool)
        and isinstance(size, Integral)
        and (int(size) > 0 or int(size) == -1)
        for size in image_shape
    )
    if not is_shape or image_shape.count(-1) > 1:
        raise ValueError(
            f"image_shape={shorten(str(image_shape))} is not the shape of a picture: "
            "expected (h, w) or (h, w, channels), in pixels; one of them may be -1."
        )
