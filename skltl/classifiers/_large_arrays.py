"""Arrays that may be larger than memory."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What lies in memory; more than that lies in a file in the system's temporary folder.
MAX_BYTES_IN_MEMORY = 2**31


def new_array(shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    """Make an array, in a file if it is too large for memory.

    The file has no name any more when this returns, and ends with the array.

    Parameters
    ----------
    shape : tuple of int
        Its shape.
    dtype : type
        Of its numbers.

    Returns
    -------
    array
        Its numbers are whatever was there before.
    """
    if math.prod(shape) * np.dtype(dtype).itemsize <= MAX_BYTES_IN_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="skltl-") as file:
        return np.memmap(file, dtype, "w+", shape=shape)
