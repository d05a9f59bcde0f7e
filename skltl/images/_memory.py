"""Memory budget of large images, which few threads may decode at the same time."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Memory of large images. Images up to this size never wait: even one per core takes
# less memory than the batches do.
LARGE_IMAGE = 20_000_000

# Memory budget of all larger images together. A single one may exceed it.
BYTES_OF_LARGE_IMAGES = 960_000_000


class _Held(threading.local):
    """Memory that this thread holds for the image it is working on."""

    n_bytes = 0
    is_open = False  # inside `one_image`


_held = _Held()
_n_bytes_held = 0  # by all threads
_released = threading.Condition()
_c_library = ctypes.CDLL(None) if sys.platform == "linux" else None


@contextmanager
def one_image() -> Iterator[None]:
    """Decode and use one image inside the block, then release the memory it reserved.

    Blocks can be nested; the outermost one counts.
    """
    global _n_bytes_held
    if _held.is_open:
        yield
        return
    _held.is_open = True
    try:
        yield
    finally:
        _held.is_open = False
        if _held.n_bytes:
            with _released:
                _n_bytes_held -= _held.n_bytes
                _held.n_bytes = 0
                _released.notify_all()


def reserve_memory(n_pixels: int, bytes_per_pixel: int) -> None:
    """Wait, before a large image is decoded, until the memory budget has room for it.

    To be called inside `one_image`.
    """
    global _n_bytes_held
    if n_pixels <= LARGE_IMAGE or not _held.is_open or _held.n_bytes:
        return
    n_bytes = n_pixels * bytes_per_pixel
    with _released:
        _released.wait_for(
            lambda: (
                not _n_bytes_held or _n_bytes_held + n_bytes <= BYTES_OF_LARGE_IMAGES
            )
        )
        _n_bytes_held += n_bytes
        _held.n_bytes = n_bytes
    # glibc keeps freed memory per thread: eight alternating threads would hold eight
    # images.
    trim = getattr(_c_library, "malloc_trim", None)
    if trim is not None:
        trim(0)


def _forget_other_threads() -> None:
    """Release all memory in a forked child, in which no other thread exists."""
    global _n_bytes_held, _released
    _held.n_bytes = _n_bytes_held = 0
    _released = threading.Condition()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
