"""The name of an image's content, and how a file is known again without reading it."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from hashlib import blake2b
from struct import Struct
from typing import Any

import numpy as np
from PIL import Image

from skltl.images._decode import Decoded, iter_pixels

# A file that is written twice within one tick of the file system's clock keeps size and
# time. The coarsest clocks in use tick every 2 seconds (FAT), so a file younger than
# that is not yet known by its state.
CLOCK_TICK = 2.0

# A service is sent new files for as long as it runs.
MOST_SEEN_YOUNG = 100_000

_STATE = Struct("<qqqQQ")
FILE_STATE_BYTES = _STATE.size


def content_key(decoded: Decoded) -> bytes:
    """Name a decoded image by its dtype, shape and every pixel (16 bytes)."""
    if isinstance(decoded, Image.Image):
        (width, height), is_float = decoded.size, decoded.mode == "F"
        dtype, shape = (
            np.dtype(np.float32 if is_float else np.uint8),
            (height, width, 3),
        )
    else:
        dtype, shape = decoded.dtype, decoded.shape
    name = blake2b(f"{dtype.str}{shape}".encode(), digest_size=16)
    for pixels in iter_pixels(decoded):
        name.update(np.ascontiguousarray(pixels).data)
    return name.digest()


def file_identity(path: str) -> bytes | None:
    """Name a file's content for this process, or ``None`` if it cannot be read.

    By its state, without reading it; or, if it was seen when that did not tell yet, by
    `file_digest`.
    """
    state, is_young = _look_at(path)
    if state is None or (not is_young and state not in _seen_young):
        return state
    digest = _seen_young.get(state) or file_digest(path)
    if state not in _seen_young and len(_seen_young) >= MOST_SEEN_YOUNG:
        # Their names change to their states: what was known by them is found out anew.
        _seen_young.clear()
    _seen_young[state] = None if is_young else digest
    return digest


# Files by their state when they were younger than a tick of the clock, and what they
# were found to hold later.
_seen_young: dict[bytes, bytes | None] = {}


def file_digest(path: str) -> bytes | None:
    """Name a file by all of its bytes (16 bytes), or ``None`` if it cannot be read.

    The same for a copy of the file, on any machine. Pipes and devices have no end.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            return None
        with open(path, "rb") as file:  # noqa: PTH123
            return hashlib.file_digest(file, _blake2b_of_16).digest()
    except (OSError, ValueError):  # the error comes when the file is read
        return None


def _blake2b_of_16() -> Any:
    return blake2b(digest_size=16)


def file_state(path: str) -> bytes | None:
    """Return a file's state (40 bytes), or ``None`` if it does not tell what it holds.

    Programs that copy files often keep the time of their last change (mtime); that of
    the directory entry (ctime) they cannot set.
    """
    state, is_young = _look_at(path)
    return None if is_young else state


def _look_at(path: str) -> tuple[bytes | None, bool]:
    """Return a file's state, and whether it may change without that showing."""
    try:
        # Not `Path.stat`: a search looks at each file in each fold, and making a path
        # of a text takes longer than looking.
        found = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):  # the error comes when the file is read
        return None, False
    times = (found.st_mtime_ns, found.st_ctime_ns)
    state = _STATE.pack(found.st_size, *times, found.st_ino, found.st_dev)
    return state, time.time() - max(times) / 1e9 < CLOCK_TICK
