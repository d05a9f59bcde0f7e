"""What decoding threads share: memory, and images that stand at several places."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

from skltl._locks import Lock

# Images with fewer pixels never wait for each other: however many cores decode them,
# they take less memory than the batches do.
LARGE_IMAGE = 20_000_000

# What the larger ones may take together. One alone may always be decoded.
BYTES_OF_LARGE_IMAGES = 960_000_000


class _Ledger:
    """How many bytes large images take at this moment."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self.changed = threading.Condition()

    def take(self, n_bytes: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self._has_room(n_bytes))
            self.n_bytes += n_bytes

    def give_back(self, n_bytes: int) -> None:
        with self.changed:
            self.n_bytes -= n_bytes
            self.changed.notify_all()

    def _has_room(self, n_bytes: int) -> bool:
        return not self.n_bytes or self.n_bytes + n_bytes <= BYTES_OF_LARGE_IMAGES


class _Block(threading.local):
    """Where this thread took memory for the image it works on, and how much."""

    taken: tuple[_Ledger, int] | None = None
    is_open = False


_ledger = _Ledger()
_block = _Block()
_c_library = ctypes.CDLL(None) if sys.platform == "linux" else None


@contextmanager
def one_image() -> Iterator[None]:
    """Decode and use one image inside of this block; its memory is given back after it.

    Blocks may be nested: the outermost counts.
    """
    if _block.is_open:
        yield
        return
    _block.is_open = True
    try:
        yield
    finally:
        taken, _block.taken, _block.is_open = _block.taken, None, False
        if taken is not None:
            ledger, n_bytes = taken
            ledger.give_back(n_bytes)


def wait_for_memory(n_pixels: int, bytes_per_pixel: int) -> None:
    """Wait, before a large image is decoded, until others have given memory back."""
    if n_pixels > LARGE_IMAGE and _block.is_open and _block.taken is None:
        ledger, n_bytes = _ledger, n_pixels * bytes_per_pixel
        ledger.take(n_bytes)
        _block.taken = (ledger, n_bytes)
        _return_freed_memory()


def _return_freed_memory() -> None:
    """Let the system have what large images took that are gone.

    The allocator of glibc keeps freed memory for each thread apart, so that eight
    threads in turn would hold eight images.
    """
    trim = getattr(_c_library, "malloc_trim", None)
    if trim is not None:
        trim(0)


def _renew_ledger() -> None:
    # In a forked child, whose only thread cannot wait for the others.
    global _ledger
    _ledger = _Ledger()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_ledger)


_locks: WeakValueDictionary[int, Lock] = WeakValueDictionary()
_locks_lock = Lock()


def lock_of(shared: object) -> Lock:
    """Return the lock of an object that threads must use one after the other.

    It exists as long as a thread uses it, so that no other object can have its name.
    """
    with _locks_lock:
        lock = _locks.get(id(shared))
        if lock is None:
            lock = _locks[id(shared)] = Lock()
        return lock
