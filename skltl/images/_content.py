"""The name of a picture's content, and how a file is known again without reading it."""

from __future__ import annotations

import os
import time
from hashlib import blake2b
from struct import Struct

import numpy as np

from skltl.images._decode import Pixels

# A file that is written twice within one tick of the file system's clock keeps size and
# time. The coarsest clocks in use tick every 2 seconds (FAT), so a file younger than
# that is not yet known by its state.
CLOCK_TICK = 2.0

_STATE = Struct("<qqqQQ")
FILE_STATE_BYTES = _STATE.size


def content_key(pixels: Pixels) -> bytes:
    """Name a decoded picture by its dtype, shape and every pixel (16 bytes)."""
    header = f"{pixels.dtype.str}{pixels.shape}".encode()
    name = blake2b(header, digest_size=16)
    name.update(np.ascontiguousarray(pixels).data)
    return name.digest()


def file_state(path: str) -> bytes | None:
    """Return a file's state (40 bytes), or ``None`` if it cannot be asked for.

    Programs that copy files often keep the time of their last change (mtime); that of
    the directory entry (ctime) they cannot set.
    """
    try:
        # Not `Path.stat`: a search looks at each file in each fold, and making a path
        # of a text takes longer than looking.
        stat = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):  # the error comes when the file is read
        return None
    times = (stat.st_mtime_ns, stat.st_ctime_ns)
    if time.time() - max(times) / 1e9 < CLOCK_TICK:
        return None
    return _STATE.pack(stat.st_size, *times, stat.st_ino, stat.st_dev)
