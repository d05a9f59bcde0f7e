"""Locks that a forked child finds open."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from weakref import WeakSet


class Lock:
    """A reentrant lock that is made anew in a forked child.

    A fork copies a lock in the state it has, but only the thread that forks: if another
    one holds the lock at that moment, nobody in the child would ever release it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held = threading.local()
        _all_locks.add(self)

    def renew(self) -> None:
        """Forget which other threads hold or wait for the lock."""
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
        # The lock that this thread acquired: a fork inside of the block has renewed it.
        self._held.locks.pop().release()


_all_locks: WeakSet[Lock] = WeakSet()


def _renew_all() -> None:
    for lock in list(_all_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
