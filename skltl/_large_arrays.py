"""Arrays that may be larger than memory."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What lies in memory; more than that lies in a file in the system's temporary folder.
MAX_BYTES_IN_MEMORY = 2**31


def new_array(shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    """Make an array, in a file if it is too large for memory.

    Parameters
    ----------
    shape : tuple of int
        Its shape.
    dtype : type
        Of its numbers.

    Returns
    -------
    array
        Its numbers are whatever was there before. A file has no name any more, and ends
        with the array. Not a `numpy.memmap`, which would be taken for a file that
        another process can open.

    Raises
    ------
    OSError
        If there is no room for the file.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes <= MAX_BYTES_IN_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="skltl-") as file:
        _reserve(file.fileno(), n_bytes)
        memory = mmap.mmap(file.fileno(), n_bytes)
    return np.frombuffer(memory, dtype).reshape(shape)


def _reserve(file: int, n_bytes: int) -> None:
    """Give a file its size, and room on the disk.

    Without room, writing to the array would end the process.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, n_bytes)
        else:
            os.truncate(file, n_bytes)
    except OSError as error:
        raise OSError(
            error.errno,
            f"no room for an array of {n_bytes / 1e9:.1f} GB in the temporary folder "
            f"(the environment variable TMPDIR names another): {error.strerror}",
            tempfile.gettempdir(),
        ) from error
