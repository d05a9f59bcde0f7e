"""Arrays that may be larger than memory."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skltl._caller import level_of_the_user

# What lies in memory; more than that lies in a file in the system's temporary folder.
MAX_BYTES_IN_MEMORY = 2**31

# So many are written at a time where room cannot be reserved otherwise.
ZEROS = 2**24


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
        another process can open. If there is no room for a file, the array lies in
        memory, with a warning.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes <= MAX_BYTES_IN_MEMORY:
        return np.empty(shape, dtype)
    try:
        memory = _map_file(n_bytes)
    except OSError as error:
        warnings.warn(
            f"An array of {n_bytes / 1e6:,.0f} MB lies in memory, since it cannot lie "
            f"in a file in {tempfile.gettempdir()!r} ({error.strerror}). Set the "
            "environment variable TMPDIR before Python starts to use another folder.",
            RuntimeWarning,
            stacklevel=level_of_the_user(),
        )
        return np.empty(shape, dtype)
    return np.frombuffer(memory, dtype).reshape(shape)


def _map_file(n_bytes: int) -> mmap.mmap:
    """Map a new file whose room on the disk is reserved.

    Without room, writing to the map would end the process.
    """
    with tempfile.TemporaryFile(prefix="skltl-") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        else:
            for start in range(0, n_bytes, ZEROS):
                file.write(bytes(min(ZEROS, n_bytes - start)))
            file.flush()
        return mmap.mmap(file.fileno(), n_bytes)
