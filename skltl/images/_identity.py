"""Keys of image contents, and ways to notice that a file has changed."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from hashlib import blake2b
from struct import Struct

import numpy as np
from PIL import Image

from skltl.images._decode import Decoded, iter_pixels

# Two writes within one tick of the file system's clock may leave the same size and
# times. The coarsest clocks in use tick every 2 seconds (FAT), so the state of a
# younger file does not identify its content.
CLOCK_TICK = 2.0

_STATE = Struct("<qqqQQ")
FILE_STATE_BYTES = _STATE.size


def content_key(decoded: Decoded) -> bytes:
    """Hash the dtype, shape and pixels of a decoded image (16 bytes)."""
    if isinstance(decoded, Image.Image):
        (width, height), is_float = decoded.size, decoded.mode == "F"
        dtype = np.dtype(np.float32 if is_float else np.uint8)
        shape: tuple[int, ...] = (height, width, 3)
    else:
        dtype, shape = decoded.dtype, decoded.shape
    key = blake2b(f"{dtype.str}{shape}".encode(), digest_size=16)
    for pixels in iter_pixels(decoded):
        key.update(np.ascontiguousarray(pixels).data)
    return key.digest()


def file_identity(path: str) -> bytes | None:
    """Return the state of a file, or its digest while the state does not identify it.

    ``None`` if the file cannot be read. For this process: other machines have other
    states, and the digest of a new file gives way to its state.
    """
    return file_state(path) or file_digest(path)


def file_digest(path: str) -> bytes | None:
    """Hash the bytes of a file (16 bytes), or return ``None`` if it cannot be read.

    Copies have equal digests, on any machine. Pipes and devices have none, since they
    need not end.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            return None
        with open(path, "rb") as file:  # noqa: PTH123
            return hashlib.file_digest(file, lambda: blake2b(digest_size=16)).digest()
    except (OSError, ValueError):  # raised again when the file is decoded
        return None


def file_state(path: str) -> bytes | None:
    """Return size, times, inode and device of a file (40 bytes), without reading it.

    ``None`` if the file is too young for its state to identify its content, is no
    regular file, such as a folder whose files may change, or cannot be read. Besides
    the time of the last change (mtime), which programs that copy files often preserve,
    the state has that of the inode (ctime), which they cannot set.
    """
    try:
        # Not `Path.stat`: a search asks for each file in each fold, and creating the
        # path takes longer than the call.
        state = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):  # raised again when the file is decoded
        return None
    if not stat.S_ISREG(state.st_mode):
        return None
    times = (state.st_mtime_ns, state.st_ctime_ns)
    if time.time() - max(times) / 1e9 < CLOCK_TICK:
        return None
    return _STATE.pack(state.st_size, *times, state.st_ino, state.st_dev)
