"""The name of a picture's content, and how a file is known again without reading it."""

from __future__ import annotations

import time
from hashlib import blake2b
from pathlib import Path

import numpy as np

from skltl.images._decode import Pixels

# A file that is written twice within one tick of the file system's clock keeps size and
# time. The coarsest clocks in use tick every 2 seconds (FAT), so a file younger than
# that is not yet known by its state.
CLOCK_TICK = 2.0


def content_key(pixels: Pixels) -> bytes:
    """Name a decoded picture by its dtype, shape and every pixel (16 bytes)."""
    header = f"{pixels.dtype.str}{pixels.shape}".encode()
    name = blake2b(header, digest_size=16)
    name.update(np.ascontiguousarray(pixels).data)
    return name.digest()


def file_state(path: str) -> bytes | None:
    """Name a file's state (16 bytes), or return ``None`` if it cannot be asked for.

    Programs that copy files often keep the time of their last change (mtime); that of
    the directory entry (ctime) they cannot set.
    """
    try:
        stat = Path(path).stat()
    except (OSError, ValueError):  # the error comes when the file is read
        return None
    times = (stat.st_mtime_ns, stat.st_ctime_ns)
    if time.time() - max(times) / 1e9 < CLOCK_TICK:
        return None
    state = (stat.st_size, *times, stat.st_ino, stat.st_dev)
    return blake2b(repr(state).encode(), digest_size=16).digest()
