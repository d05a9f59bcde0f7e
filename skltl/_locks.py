"""Locks that are released in a forked child."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from weakref import WeakSet


class Lock:
    """A reentrant lock that is released in a forked child.

    A fork copies every lock in its current state, but only the forking thread: a lock
    that another thread holds at that moment would never be released in the child.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held = threading.local()
        _all_locks.add(self)

    def renew(self) -> None:
        """Replace the lock by a released one."""
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        lock = self._lock
        lock.acquire()
        self._held.locks = [*getattr(self._held, "locks", ()), lock]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The lock that was acquired; a fork inside the block has replaced `_lock`.
        self._held.locks.pop().release()


_all_locks: WeakSet[Lock] = WeakSet()


def _renew_all() -> None:
    """Replace all locks in a forked child."""
    for lock in list(_all_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)

# Tracing and exporting change states of torch and of warnings that belong to the
# process: one thread at a time.
CONVERSIONS = Lock()
