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

from skltl._caller import user_stacklevel

# Size above which arrays are stored in a file in the system's temporary folder.
MAX_BYTES_IN_MEMORY = 2**31

# Number of zeros written at a time where disk space cannot be reserved otherwise.
ZEROS = 2**24


def new_array(shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    """Return an uninitialized array, backed by a temporary file if it is large.

    The file is unlinked at once, and its space is released with the array. The array is
    not a `numpy.memmap`, which joblib would take for a file that other processes can
    open. Without disk space, the array is in memory, with a warning.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes <= MAX_BYTES_IN_MEMORY:
        return np.empty(shape, dtype)
    try:
        buffer = _map_file(n_bytes)
    except OSError as error:
        warnings.warn(
            f"An array of {n_bytes / 1e6:,.0f} MB is allocated in memory, because no "
            f"file of that size can be created in {tempfile.gettempdir()!r} "
            f"({error.strerror}). To use another folder, set the environment variable "
            "TMPDIR before Python starts.",
            RuntimeWarning,
            stacklevel=user_stacklevel(),
        )
        return np.empty(shape, dtype)
    return np.frombuffer(buffer, dtype).reshape(shape)


def _map_file(n_bytes: int) -> mmap.mmap:
    """Map a new file, with its disk space reserved.

    Without the space, writing to the array would kill the process.
    """
    with tempfile.TemporaryFile(prefix="skltl-") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        else:
            for start in range(0, n_bytes, ZEROS):
                file.write(bytes(min(ZEROS, n_bytes - start)))
            file.flush()
        return mmap.mmap(file.fileno(), n_bytes)
